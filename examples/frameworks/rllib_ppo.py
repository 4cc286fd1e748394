"""PPO of RLlib: one module for all tokens, games played by several processes.

pip install vitprune_env "ray[rllib]"
python examples/frameworks/rllib_ppo.py --iterations 10 --runners 2
"""

from __future__ import annotations

import tyro
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.env.wrappers.pettingzoo_env import ParallelPettingZooEnv
from ray.tune.registry import register_env
from torch import nn

from vitprune_env import benchmark, load_backbone, parallel_env
from vitprune_env.agents import ModulePolicy
from vitprune_env.data import Digits

ROWS = 9600  # agent-steps per iteration: 32 images, 3 steps, 100 tokens


def train(iterations: int = 10, seed: int = 0, runners: int = 2, on_prune: str = "noop") -> nn.Module:
    """Train, and return the network that gives the tokens `[rows, D]` their logits `[rows, 2]`."""
    register_env("vitprune", lambda _: ParallelPettingZooEnv(parallel_env(on_prune=on_prune)))
    # With batch_mode="complete_episodes" a seeded runner would begin its stream of images anew in every episode.
    algorithm = (
        PPOConfig()
        .environment("vitprune")
        .env_runners(num_env_runners=runners, sample_timeout_s=600)
        .multi_agent(policies={"token"}, policy_mapping_fn=lambda *_, **__: "token", count_steps_by="agent_steps")
        .training(train_batch_size_per_learner=ROWS, minibatch_size=ROWS // 4, num_epochs=5, gamma=1.0, lr=1e-3)
        .rl_module(model_config={"fcnet_hiddens": [64, 64]})  # the default costs more than the budget
        .debugging(seed=seed)
        .build_algo()
    )
    agents = len(parallel_env().possible_agents)
    for iteration in range(iterations):
        result = algorithm.train()
        mean = result["env_runners"]["episode_return_mean"] / agents
        print(f"{iteration}: mean return {mean:.3f}, {result['time_this_iter_s']:.0f} s")
    module = algorithm.get_module("token")
    algorithm.stop()
    return nn.Sequential(module.encoder.actor_encoder.net.mlp, module.pi.net.mlp)


if __name__ == "__main__":
    backbone, images, tune = load_backbone(), Digits("test", 500), Digits("train", 256)
    policies = {"RLlib PPO": ModulePolicy(tyro.cli(train), backbone.embed_dim), "EViT": "evit"}
    print(benchmark(policies, backbone, images, tune=tune, budgets=(0.35,), seeds=2, timing=None).table())
