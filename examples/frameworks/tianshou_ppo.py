"""PPO of tianshou: every token of every game is a row of one vector environment.

    pip install vitprune_env
    python examples/frameworks/tianshou_ppo.py --iterations 20

tianshou's own `PettingZooEnv` plays one agent's turn at a time, a hundred turns for each step of the game. Here all
tokens of the batched environment act together, and one call of the policy decides for all of them.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
import tyro
from gymnasium.spaces import Discrete
from tianshou.algorithm import PPO
from tianshou.algorithm.modelfree.reinforce import DiscreteActorPolicy
from tianshou.algorithm.optim import AdamOptimizerFactory
from tianshou.data import Collector, VectorReplayBuffer
from tianshou.env import BaseVectorEnv
from tianshou.trainer import OnPolicyTrainerParams
from tianshou.utils.net.common import Net
from tianshou.utils.net.discrete import DiscreteCritic
from torch import nn

from vitprune_env import TokenGame, TokenVectorEnv, benchmark, load_backbone
from vitprune_env.agents import ModulePolicy
from vitprune_env.data import Digits

IMAGES = 32  # per iteration, one game each


class TokenRows:
    """What tianshou's collector asks of a vector environment; all rows end, and are reset, together."""

    is_async, action_space = False, Discrete(2)

    def __init__(self, env: TokenVectorEnv) -> None:
        self.env = env

    def __len__(self) -> int:
        return self.env.num_envs * self.env.game.num_agents

    def reset(self, env_id: Any = None) -> tuple[np.ndarray, np.ndarray]:
        """Observations `[rows, D]` and infos."""
        return self.env.reset()[0].flatten(0, 1).numpy(), np.array([{}] * len(self))

    def step(self, actions: np.ndarray, env_id: Any = None) -> list[np.ndarray]:
        """Observations, rewards, terminations, truncations and infos, a row per token of each game."""
        *values, _ = self.env.step(actions.reshape(self.env.num_envs, -1))
        return [*(each.flatten(0, 1).numpy() for each in values), np.array([{"env_id": i} for i in range(len(self))])]


def train(iterations: int = 20, seed: int = 0) -> nn.Module:
    """Train, and return the network that gives the tokens `[rows, D]` their logits `[rows, 2]`."""
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002, tianshou draws minibatches from it
    game = TokenGame(load_backbone())
    rows = TokenRows(TokenVectorEnv(game, Digits("train", 4096), IMAGES, seed))
    width, steps = game.backbone.embed_dim, game.num_steps * len(rows)
    actor = Net(state_shape=width, action_shape=2, hidden_sizes=(64, 64))
    critic = DiscreteCritic(preprocess_net=Net(state_shape=width, hidden_sizes=(64, 64)))
    policy = DiscreteActorPolicy(actor=actor, action_space=rows.action_space)
    ppo = PPO(policy=policy, critic=critic, optim=AdamOptimizerFactory(lr=1e-3), gamma=1.0)
    params = OnPolicyTrainerParams(
        training_collector=Collector(ppo, cast(BaseVectorEnv, rows), VectorReplayBuffer(steps, len(rows))),
        max_epochs=iterations,
        epoch_num_steps=steps,
        collection_step_num_env_steps=steps,
        batch_size=steps // 4,
        update_step_num_repetitions=5,
        show_progress=False,
    )
    ppo.run_training(params)
    return actor.model


if __name__ == "__main__":
    backbone, images, tune = load_backbone(), Digits("test", 500), Digits("train", 256)
    policies = {"tianshou PPO": ModulePolicy(tyro.cli(train), backbone.embed_dim), "EViT": "evit"}
    print(benchmark(policies, backbone, images, tune=tune, budgets=(0.35,), seeds=2, timing=None).table())
