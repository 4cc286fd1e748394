"""Bring your own learner: COMA, counterfactual multi-agent policy gradients (Foerster et al., 2018), in one file.

    python examples/custom_learner.py
    python examples/custom_learner.py --target-share 0.25 --updates 150

The critic sees what all agents do and gives a value Q to each action of one agent, with the actions of the others held
fixed. The advantage of an action is its Q minus the mean of Q over the agent's own policy: what this action changed.
`train` plays the games, follows the budget, saves, resumes, and deploys the policy.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, mse_loss, one_hot

from vitprune_env import TokenGame, evaluate, load_backbone
from vitprune_env.agents import Learner, LearnerConfig, Parts, RunConfig, Share, Trajectory, mlp, train
from vitprune_env.cli import explained
from vitprune_env.cli.flags import TEST_SEED, ResumableFlags, read_flags
from vitprune_env.data import Digits, batches_of


class JointCritic(nn.Module):
    """Q of every action of an agent, given its token, its image, and the tokens and actions of the other agents."""

    def __init__(self, embed_dim: int, num_actions: int, generator: torch.Generator) -> None:
        super().__init__()
        self.num_actions = num_actions
        inputs = 2 * embed_dim + num_actions * (embed_dim + 1)
        self.layers = mlp((inputs, 64, 64, num_actions), 0.1, generator)

    def forward(self, games: Trajectory) -> Tensor:
        """`[M, A]`, one row per agent-step."""
        tokens, cls = (layer_norm(each, each.shape[-1:]) for each in (games.tokens, games.cls))
        chosen = one_hot(games.action, self.num_actions).float()
        own = torch.cat([chosen, (chosen[:, :, None] * tokens[:, None]).flatten(1)], dim=1)
        # Agents of one image at one site share a row of `cls`: sum over them, and leave the agent itself out.
        everyone = own.new_zeros(len(cls), own.shape[1]).index_add(0, games.image, own)
        others = (everyone[games.image] - own) / games.alive.shape[2]
        return self.layers(torch.cat([tokens, cls[games.image], others], dim=1))


@dataclass(frozen=True)
class COMAConfig(LearnerConfig):
    """Settings of COMA; each update takes `epochs` gradient steps on all agent-steps."""

    minibatch: int | None = None
    epochs: int = 4
    trace: float = 0.8
    """lambda of the critic's targets, TD(lambda)."""
    entropy: float = 0.01
    """Weight of the entropy bonus."""

    def critic(self, embed_dim: int, num_actions: int, generator: torch.Generator) -> JointCritic:
        """The centralised critic."""
        return JointCritic(embed_dim, num_actions, generator)

    def algorithm(self, parts: Parts) -> COMA:
        """The update."""
        return COMA(parts, self)


class COMA(Learner):
    """Counterfactual advantages, and a critic that learns TD(lambda) returns."""

    config: COMAConfig
    metrics = ("actor_loss", "vf_loss", "ent_loss")

    def prepare(self, games: Trajectory) -> Mapping[str, Tensor]:
        """Advantages and returns `[M]` with the critic as it is before the update."""
        values, policy = self.critic(games), self.actor(games.tokens).softmax(dim=1)
        taken = values.gather(1, games.action[:, None]).squeeze(1)
        advantage = taken - (policy * values).sum(dim=1)
        returns = taken + games.advantage(taken, discount=1.0, trace=self.config.trace)
        return {"advantage": advantage / (advantage.std() + 1e-8), "returns": returns}

    def loss(
        self, games: Trajectory, prepared: Mapping[str, Tensor], rows: Tensor
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Policy gradient with the counterfactual advantage, squared error of the critic, entropy bonus."""
        chance, action = self.actions.distribution(self.actor(games.tokens[rows])), games.action[rows]
        actor_loss = -(chance.log_prob(action) * prepared["advantage"][rows]).mean()
        value = self.critic(games)[rows].gather(1, action[:, None]).squeeze(1)
        critic_loss, entropy = mse_loss(value, prepared["returns"][rows]), chance.entropy().mean()
        loss = actor_loss + critic_loss - self.config.entropy * entropy
        return loss, {"actor_loss": actor_loss, "vf_loss": critic_loss, "ent_loss": entropy}


@dataclass(frozen=True)
class Args(ResumableFlags):
    """COMA on the game of token pruning."""

    output: Path = Path("runs/coma")
    """Folder for checkpoints, history and the policy."""
    target_share: float = 0.35
    """Budget: share of the dense model's MACs, the policy's own included."""
    updates: int = 80
    """Updates; each plays 128 images."""


def main(argv: Sequence[str] | None = None) -> None:
    """Train to the budget, and measure on held-out scenes."""
    args = read_flags(Args, argv, __doc__)
    args.prepare(results=("policy.safetensors", "training.safetensors"))
    run = RunConfig(args.updates, seed=args.seed)
    if args.quick:
        run = RunConfig(3, 16, args.seed, cache_images=64, calibration_images=64)
    backbone, data = load_backbone("vit_digits"), Digits("train", size=64 if args.quick else 2048, seed=args.seed)
    place = {"output": args.output, "resume": args.resume, "device": args.device}
    policy = train(backbone, data, Share(args.target_share), COMAConfig(), run=run, **place).policy
    game = TokenGame.for_policy(backbone, policy)
    test = batches_of(Digits("test", size=100 if args.quick else 2000, seed=TEST_SEED), 100, args.device)
    measured = evaluate(game, policy, test)
    print(f"COMA: accuracy {measured.accuracy:.1%} at {measured.macs / game.cost.dense():.1%} of the dense MACs")


if __name__ == "__main__":
    with explained(Args):
        main(sys.argv[1:])
