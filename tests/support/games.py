"""Small games that agents play in tests."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from helpers import random_images, toy
from vitprune_env.agents.learners.buffer import Trajectory
from vitprune_env.agents.learners.exploration import ExploringPolicy
from vitprune_env.agents.networks import TokenActor
from vitprune_env.envs.actions import KeepActions
from vitprune_env.game.rewards import SharedOutcome, log_probability
from vitprune_env.game.rollout import play
from vitprune_env.game.token_game import TokenGame
from vitprune_env.types import Episode, Step

NAME = "vit_tiny_patch16_224"


@dataclass(frozen=True)
class Teacher:
    """A reward that anybody can learn: +1 for keeping the tokens of the left half of the grid, -1 for the others."""

    left: Tensor  # [N] bool

    def score(self, logits: Tensor, labels: Tensor) -> Tensor:
        return torch.zeros(len(logits))

    def immediate(self, step: Step) -> Tensor:
        return step.kept * torch.where(self.left, 1.0, -1.0)

    def deferred(self, steps: list[Step], score: Tensor) -> Tensor:
        return torch.zeros(len(steps), *steps[0].kept.shape)


class OwnLabels:
    """Random images labelled by the dense model itself, so that pruning can only lose."""

    def __init__(self, size: int, name: str = NAME, seed: int = 0) -> None:
        backbone = toy(name)
        self.images = random_images(backbone, size, seed)
        with torch.no_grad():
            self.labels = backbone(self.images).argmax(dim=1)

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return self.images[indices], self.labels[indices]


def toy_game(needs: frozenset[str] = frozenset()) -> TokenGame:
    """Three steps; the outcome varies continuously."""
    return TokenGame(toy(NAME), (1, 2, 3), reward=SharedOutcome(price=0.1, outcome=log_probability), needs=needs)


def explored(game: TokenGame, actor: TokenActor, seed: int, images: int = 6) -> tuple[Episode, Trajectory]:
    """A batch of games, and its live agent-steps."""
    data = OwnLabels(images, seed=seed)
    policy = ExploringPolicy(actor, torch.Generator().manual_seed(seed))
    episode = play(game, policy, data.images, data.labels, record=True)
    seen = replace(episode, observations=tuple(map(policy.view, episode.observations)))
    return episode, Trajectory.of(seen, policy.actions, policy.log_probs)


def keep_log_prob(logit: Tensor, keep: Tensor) -> Tensor:
    """Log-probability of the actions `keep` (bool) given the log-odds of keeping, as learners compute it."""
    return _coin(logit).log_prob(keep.long())


def keep_entropy(logit: Tensor) -> Tensor:
    """Entropy of keep-or-prune in nats given the log-odds of keeping, as learners compute it."""
    return _coin(logit).entropy()


def _coin(logit: Tensor) -> Any:
    flat = torch.stack([torch.zeros_like(logit), logit], dim=-1).flatten(0, -2)
    return _Shaped(KeepActions().distribution(flat), logit.shape)


@dataclass(frozen=True)
class _Shaped:
    """A distribution over rows, for tensors of any shape."""

    rows: Any
    shape: torch.Size

    def log_prob(self, actions: Tensor) -> Tensor:
        return self.rows.log_prob(actions.flatten()).view(self.shape)

    def entropy(self) -> Tensor:
        return self.rows.entropy().view(self.shape)
