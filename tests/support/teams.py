"""Small games with one agent for all tokens of an image."""

from __future__ import annotations

from typing import Any

from tianshou.data import ReplayBuffer
from tianshou.utils.torch_utils import policy_within_training_step

from games import toy_game
from vitprune_env.agents import TokenActor
from vitprune_env.agents.learners.buffer import GameBuffer, Trajectory
from vitprune_env.agents.learners.ppo_single import ImageCritic
from vitprune_env.game.rewards import TeamOutcome, log_probability
from vitprune_env.game.token_game import TokenGame

DIM = 48


def networks() -> tuple[TokenActor, ImageCritic]:
    return TokenActor(DIM, (16,)), ImageCritic(DIM, (32, 16))


def team_game() -> TokenGame:
    game = toy_game()
    game.reward = TeamOutcome(price=0.1, outcome=log_probability)
    return game


def buffer_of(rows: Trajectory) -> GameBuffer:
    buffer = GameBuffer()
    buffer.store(rows)
    return buffer


def update(algorithm: Any, buffer: ReplayBuffer, batch_size: int | None = None, repeat: int = 1) -> Any:
    with policy_within_training_step(algorithm.policy):
        return algorithm.update(buffer, batch_size, repeat)
