"""IPPO of AgileRL: agents with names token_0, token_1, ... are one group and share a network.

pip install vitprune_env agilerl
python examples/frameworks/agilerl_ippo.py --iterations 20
"""

from __future__ import annotations

import numpy as np
import torch
import tyro
from agilerl.algorithms import IPPO
from agilerl.training.train_multi_agent_on_policy import train_multi_agent_on_policy
from agilerl.typing import ExperiencesType
from agilerl.vector.pz_async_vec_env import AsyncPettingZooVecEnv
from torch import nn

from vitprune_env import benchmark, load_backbone, parallel_env
from vitprune_env.agents import ModulePolicy
from vitprune_env.data import Digits

GAMES = 32  # processes, each with an environment of its own


class TimeFirstIPPO(IPPO):
    """Merges the agents of a group first: IPPO sorts their states by agent, but their advantages by time."""

    def assemble_shared_inputs(self, experience: ExperiencesType) -> ExperiencesType:
        """A group's rollouts `[T, games, ...]`, or next values `[games, ...]`, as those of one agent in more games."""
        axis = int(isinstance(next(iter(experience.values())), list))
        groups = super().assemble_shared_inputs(experience)
        return {name: {name: np.concatenate(list(each.values()), axis)} for name, each in groups.items()}


def train(iterations: int = 20, seed: int = 0, on_prune: str = "noop") -> nn.Module:
    """Train, and return the network that gives the tokens `[rows, D]` their logits `[rows, 2]`."""
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002, AgileRL draws minibatches from it
    env = parallel_env(on_prune=on_prune)
    games = AsyncPettingZooVecEnv([lambda: parallel_env(on_prune=on_prune)] * GAMES)
    games.reset(seed=seed)
    # The training loop forgets the end of an episode inside a rollout: a rollout is one episode of every game.
    steps = env.game.num_steps * GAMES
    ippo = TimeFirstIPPO(
        [env.observation_space(agent) for agent in env.possible_agents],
        [env.action_space(agent) for agent in env.possible_agents],
        env.possible_agents,
        batch_size=steps * len(env.possible_agents) // 4,
        lr=5e-4,
        learn_step=steps,
        gamma=1.0,
    )
    limits = {"max_steps": iterations * steps, "evo_steps": steps, "eval_steps": 1}
    train_multi_agent_on_policy(games, env.metadata["name"], "IPPO", [ippo], verbose=False, **limits)
    games.close()
    actor = ippo.actors["token"]
    return nn.Sequential(actor.encoder, actor.head_net.wrapped)


if __name__ == "__main__":
    backbone, images, tune = load_backbone(), Digits("test", 500), Digits("train", 256)
    policies = {"AgileRL IPPO": ModulePolicy(tyro.cli(train), backbone.embed_dim), "EViT": "evit"}
    print(benchmark(policies, backbone, images, tune=tune, budgets=(0.35,), seeds=2, timing=None).table())
