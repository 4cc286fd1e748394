"""Bring your own algorithm: independent REINFORCE with a learned baseline, in plain PyTorch over `TokenVectorEnv`.

    python examples/custom_algorithm.py
    python examples/custom_algorithm.py --checkpoint runs/mappo    # compare with a policy of train_mappo.py

Every token decides from its own feature and is paid the image's outcome minus the price of the blocks it uses; the
price moves until the budget is met. The result is a `Policy` like any other.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss
from tqdm import trange

import vitprune_env as vp
from vitprune_env.cli import explained
from vitprune_env.cli.flags import TEST_SEED, TUNE_SEED, CommonFlags, read_flags
from vitprune_env.data import Digits


@dataclass(frozen=True)
class Args(CommonFlags):
    """REINFORCE on the game of token pruning."""

    target_share: float = 0.35
    """Budget: share of the dense model's MACs, the policy's own included."""
    updates: int = 200
    """Policy-gradient steps."""
    images: int = 128
    """Games per update."""
    checkpoint: Path | None = None
    """Output folder of train_mappo.py to compare with."""


class ReinforcePolicy(vp.BasePolicy):
    """Greedy play of the trained network: all that evaluation and benchmarks need to know."""

    def __init__(self, actor: nn.Sequential, threshold: float) -> None:
        self.actor, self.threshold = actor, threshold
        self.macs_per_token = sum(m.weight.numel() for m in actor if isinstance(m, nn.Linear))

    @torch.no_grad()
    def decide(self, obs: vp.Observation) -> vp.Decision:
        """Keep the tokens whose logit exceeds the threshold."""
        keep = obs.scatter(self.actor(obs.tokens).squeeze(-1) > self.threshold, fill=False)
        return vp.Decision(keep, macs=obs.num_alive.double() * self.macs_per_token)


def play_batch(env: vp.TokenVectorEnv, actor: nn.Module, noise: torch.Generator) -> tuple[list[Tensor], dict[str, Any]]:
    """Games with sampled actions: observations, actions and rewards-to-go of the live agent-steps."""
    obs, info = env.reset()
    seen, alive, actions, rewards = [], [], [], []
    for _ in range(env.num_steps):
        seen.append(obs)
        alive.append(info["alive"])
        with torch.no_grad():
            chance = actor(obs).squeeze(-1).sigmoid()
        actions.append(torch.rand(chance.shape, generator=noise).to(chance.device) < chance)
        obs, reward, _, _, info = env.step(actions[-1])
        rewards.append(reward)
    live = torch.stack(alive)
    to_go = torch.stack(rewards).flip(0).cumsum(0).flip(0)  # undiscounted
    return [torch.stack(seen)[live], torch.stack(actions)[live].float(), to_go[live]], info


def reinforce(args: Args, game: vp.TokenGame, env: vp.TokenVectorEnv, updates: int) -> nn.Sequential:
    """Make what came out better than the baseline expected more probable."""
    width, dense = game.backbone.embed_dim, game.cost.dense()
    torch.manual_seed(args.seed)
    actor = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width // 2), nn.GELU(), nn.Linear(width // 2, 1))
    critic = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, 1))
    optimizer = torch.optim.Adam(nn.ModuleList([actor, critic]).to(args.device).parameters(), lr=3e-3)
    noise, price = torch.Generator().manual_seed(args.seed), 0.02
    for update in (bar := trange(updates, desc="REINFORCE")):
        game.reward = vp.SharedOutcome(price)
        (obs, action, returns), info = play_batch(env, actor, noise)
        value = critic(obs).squeeze(-1)
        log_prob = -binary_cross_entropy_with_logits(actor(obs).squeeze(-1), action, reduction="none")
        advantage = (returns - value.detach()) / (returns.std() + 1e-8)
        loss = mse_loss(value, returns) - (log_prob * advantage).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        spent = float(info["macs"].mean()) / dense
        aim = args.target_share + max(0.0, 1 - 2 * update / updates) * (0.7 - args.target_share)  # tighten slowly
        price *= 1 + 0.3 * (spent / aim - 1)
        bar.set_postfix(accuracy=f"{float(info['correct'].float().mean()):.2f}", of_dense=f"{spent:.2f}")
    return actor


def main(argv: Sequence[str] | None = None) -> None:
    """Train, compare."""
    args = read_flags(Args, argv, __doc__)
    args.prepare()
    backbone = vp.load_backbone("vit_digits").to(args.device)
    game = vp.TokenGame(backbone)
    env = vp.TokenVectorEnv(game, Digits("train", 4096, args.seed), args.images, args.seed)
    actor = reinforce(args, game, env, 3 if args.quick else args.updates)

    tune = Digits("train", 32 if args.quick else 256, TUNE_SEED)
    test = Digits("test", 100 if args.quick else 2000, TEST_SEED)
    logits = actor(game.reset(tune.batch(range(len(tune)))[0].to(args.device)).tokens).detach().squeeze(-1)
    policies = {"REINFORCE": lambda rate: ReinforcePolicy(actor, float(logits.quantile(1 - rate))), "EViT": "evit"}
    if args.checkpoint is not None:
        policies["MAPPO"] = args.checkpoint
    result = vp.benchmark(policies, backbone, test, tune=tune, budgets=[args.target_share], controls=False, timing=None)
    print(result.table())


if __name__ == "__main__":
    with explained(Args):
        main(sys.argv[1:])
