"""Small environments on random backbones, for the tests of the PettingZoo facade."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from helpers import random_images, toy
from vitprune_env.envs.parallel import TokenPruningEnv, parallel_env
from vitprune_env.game.rewards import PaperReward, RewardFn, SharedOutcome, log_probability

CLASS_TOKEN, REGISTERS, AVERAGE = (
    "deit_tiny_patch16_224",
    "vit_small_patch14_reg4_dinov2",
    "vit_medium_patch16_gap_240",
)
BACKBONES = (CLASS_TOKEN, REGISTERS, AVERAGE)
REWARDS: tuple[RewardFn, ...] = (SharedOutcome(outcome=log_probability), PaperReward(outcome=log_probability))


def images_for(name: str, size: int = 12) -> TensorDataset:
    backbone = toy(name)
    labels = torch.randint(backbone.num_classes, (size,), generator=torch.Generator().manual_seed(1))
    return TensorDataset(random_images(backbone, size), labels)


def make_env(name: str = CLASS_TOKEN, **options: Any) -> TokenPruningEnv:
    return parallel_env(toy(name), cast(Any, images_for(name)), **options)


def sample(environment: TokenPruningEnv, rng: np.random.Generator, rate: float = 0.6) -> dict[str, Any]:
    return {agent: int(rng.random() < rate) for agent in environment.agents}


def rollout(environment: TokenPruningEnv, actions_seed: int, rate: float = 0.6) -> Iterator[tuple[Any, ...]]:
    """Play the episode that has begun to its end with random actions."""
    rng = np.random.default_rng(actions_seed)
    while environment.agents:
        acted, actions = list(environment.agents), sample(environment, rng, rate)
        yield acted, actions, environment.step(actions)


def total(environment: TokenPruningEnv, actions_seed: int, rate: float = 0.6) -> dict[str, float]:
    returns = dict.fromkeys(environment.possible_agents, 0.0)
    for _, _, (_, rewards, _, _, _) in rollout(environment, actions_seed, rate):
        for agent, reward in rewards.items():
            returns[agent] += reward
    return returns


def merge_env(name: str = CLASS_TOKEN, **options: Any) -> TokenPruningEnv:
    return make_env(name, action_space="merge", **options)


def draw_arrows(agents: int, seed: int, batch: int = 1, stay: float = 0.6) -> Tensor:
    """Random actions of the merge game `[B, N]`, many of which stay."""
    generator = torch.Generator().manual_seed(seed)
    actions = torch.randint(agents + 1, (batch, agents), generator=generator)
    stays = torch.rand(batch, agents, generator=generator) < stay
    return torch.where(stays, 1 + torch.arange(agents), actions)
