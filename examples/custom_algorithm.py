"""Bring your own algorithm: independent REINFORCE with a learned baseline, in plain PyTorch over `TokenVectorEnv`.

Nothing here knows the trainer of this package. Every token decides by itself from its own feature, is paid the image's
outcome minus the price of the blocks it uses, and a dual variable moves that price until the budget is met. At the end
the network becomes a `Policy`, and is compared with EViT, and with MAPPO if a checkpoint is given, at equal GMACs.
`--pettingzoo` plays the result through the PettingZoo environment instead, one image at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro
from common import CommonArgs, Row, at_budget, batches_of, table
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce
from torch.nn.functional import mse_loss
from tqdm import trange

from vitprune_env import BasePolicy, Decision, Observation, SharedOutcome, TokenGame, TokenVectorEnv
from vitprune_env import evaluate, load_backbone, parallel_env
from vitprune_env.agents import calibrate_threshold, load_policy
from vitprune_env.baselines import EViT
from vitprune_env.data import Digits


@dataclass(frozen=True)
class Args(CommonArgs):
    """REINFORCE on the game of token pruning."""

    output: Path = Path("runs/custom")
    """Folder for the trained network."""
    target: float = 0.35
    """Budget: share of the dense model's MACs, the policy's own included."""
    updates: int = 150
    """Policy gradient steps."""
    batch_size: int = 128
    """Images per update."""
    learning_rate: float = 2e-3
    """Of actor and baseline."""
    checkpoint: Path | None = None
    """Folder of a trained MAPPO policy to compare with (the output of train_mappo.py)."""
    pettingzoo: bool = False
    """Play twenty images through the PettingZoo environment at the end."""


class ReinforcePolicy(BasePolicy):
    """Greedy play of the trained network; this is all that evaluation, benchmarks and `PrunedViT` need to know."""

    def __init__(self, actor: nn.Sequential, threshold: float = 0.0) -> None:
        self.actor = actor
        self.threshold = threshold
        self.macs_per_token = sum(layer.weight.numel() for layer in actor if isinstance(layer, nn.Linear))

    @torch.no_grad()
    def decide(self, obs: Observation) -> Decision:
        logits = self.actor(obs.tokens).squeeze(-1)
        keep = obs.scatter(logits > self.threshold, fill=False)
        return Decision(keep, macs=obs.num_alive.double() * self.macs_per_token)


def rollout(env: TokenVectorEnv, actor: nn.Module, generator: torch.Generator) -> tuple[list[Tensor], dict]:
    """One batch of games; the network is asked for all tokens and dead ones are masked out of the loss."""
    obs, info = env.reset()
    observations, alive, actions, rewards = [], [], [], []
    for _ in range(env.num_steps):
        observations.append(obs)
        alive.append(info["alive"])
        with torch.no_grad():
            keep = torch.rand(obs.shape[:2], generator=generator) < actor(obs).squeeze(-1).sigmoid()
        obs, reward, _, _, info = env.step(keep)
        actions.append(keep)
        rewards.append(reward)
    returns = torch.stack(rewards).flip(0).cumsum(0).flip(0)  # undiscounted reward-to-go, [T, B, N]
    return [torch.stack(observations), torch.stack(actions).float(), returns, torch.stack(alive)], info


def train(args: Args, env: TokenVectorEnv, game: TokenGame, target_macs: float) -> nn.Sequential:
    """REINFORCE: increase the log-probability of what turned out better than the baseline expected."""
    width = game.backbone.embed_dim
    torch.manual_seed(args.seed)
    actor = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 1))
    baseline = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, 1))
    optimizer = torch.optim.Adam([*actor.parameters(), *baseline.parameters()], lr=args.learning_rate)
    generator = torch.Generator().manual_seed(args.seed)
    nn.init.constant_(actor[-1].bias, 1.0)  # begin by keeping most tokens
    reward = SharedOutcome()
    for update in (bar := trange(args.updates, desc="REINFORCE")):
        game.reward = reward
        (obs, action, returns, alive), info = rollout(env, actor, generator)
        obs, action, returns = obs[alive], action[alive], returns[alive]  # live agent-steps only
        value = baseline(obs).squeeze(-1)
        log_prob = -bce(actor(obs).squeeze(-1), action, reduction="none")
        loss = -(log_prob * (returns - value.detach())).mean() + mse_loss(value, returns)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        dense, spent = game.cost.dense(), float(info["macs"].mean())
        aim = target_macs + max(0.0, 1 - 2 * update / args.updates) * (0.7 * dense - target_macs)  # tighten slowly
        reward = replace(reward, price=max(0.0, reward.price + 0.02 * (spent - aim) / dense))
        bar.set_postfix(accuracy=f"{float(info['correct'].float().mean()):.2f}", macs=f"{spent / dense:.2f}")
    return actor
