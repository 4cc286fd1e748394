"""PPO of Stable-Baselines3 through SuperSuit: every token of every copy is a row of one vector environment.

pip install vitprune_env stable-baselines3 supersuit
python examples/frameworks/sb3_ppo.py --iterations 20
"""

from __future__ import annotations

import supersuit
import tyro
from stable_baselines3 import PPO
from stable_baselines3.common.utils import set_random_seed
from torch import nn

from vitprune_env import benchmark, load_backbone, parallel_env
from vitprune_env.agents import ModulePolicy
from vitprune_env.data import Digits

COPIES, EPISODES = 8, 4  # episodes of every copy per iteration


def train(iterations: int = 20, seed: int = 0, on_prune: str = "noop") -> nn.Module:
    """Train, and return the network that gives the tokens `[rows, D]` their logits `[rows, 2]`."""
    env = parallel_env(on_prune=on_prune)
    rows = supersuit.pettingzoo_env_to_vec_env_v1(env)
    rows = supersuit.concat_vec_envs_v1(rows, COPIES, base_class="stable_baselines3")
    rows.venv.reset(seed=seed)  # PPO(seed=...) would call rows.seed, which SuperSuit lacks; copy i gets seed + i
    set_random_seed(seed)
    steps = env.game.num_steps * EPISODES
    model = PPO("MlpPolicy", rows, 1e-3, steps, steps * rows.num_envs // 4, n_epochs=5, gamma=1.0)
    model.learn(iterations * steps * rows.num_envs)
    return nn.Sequential(model.policy.mlp_extractor.policy_net, model.policy.action_net)


if __name__ == "__main__":
    backbone, images, tune = load_backbone(), Digits("test", 500), Digits("train", 256)
    policies = {"Stable-Baselines3 PPO": ModulePolicy(tyro.cli(train), backbone.embed_dim), "EViT": "evit"}
    print(benchmark(policies, backbone, images, tune=tune, budgets=(0.35,), seeds=2, timing=None).table())
