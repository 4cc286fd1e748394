"""MAPPO in BenchMARL, on the batched environment.

    pip install vitprune_env[benchmarl]
    python examples/frameworks/benchmarl_mappo.py --iterations 60
"""

from __future__ import annotations

import tempfile

import tyro
from benchmarl.algorithms import IqlConfig, MappoConfig
from benchmarl.experiment import Experiment, ExperimentConfig
from benchmarl.models.mlp import MlpConfig
from torch import nn

from vitprune_env import SharedOutcome, benchmark, load_backbone
from vitprune_env.agents import TokenPolicy
from vitprune_env.data import Digits
from vitprune_env.integrations.benchmarl import TokenTask


def train(iterations: int = 60, seed: int = 0, images: int = 128, price: float = 0.03, algorithm: str = "mappo") -> nn.Module:
    """Train, and return the network that gives tokens `[rows, D]` their logits `[rows, 2]`."""
    task = TokenTask(load_backbone(), Digits("train", 2048), reward=SharedOutcome(price))
    config = ExperimentConfig.get_from_yaml()
    config.max_n_iters, config.max_n_frames, config.gamma, config.lr = iterations, None, 1.0, 1e-3
    config.on_policy_n_envs_per_worker = config.off_policy_n_envs_per_worker = images
    config.on_policy_collected_frames_per_batch = config.off_policy_collected_frames_per_batch = 3 * images
    config.on_policy_n_minibatch_iters, config.on_policy_minibatch_size = 4, images
    config.off_policy_n_optimizer_steps, config.off_policy_train_batch_size = 10, images
    config.off_policy_memory_size = 4096
    config.evaluation, config.loggers, config.create_json = False, [], False
    with tempfile.TemporaryDirectory() as config.save_folder:
        algorithm_config = {"mappo": MappoConfig, "iql": IqlConfig}[algorithm].get_from_yaml()
        experiment = Experiment(task, algorithm_config, MlpConfig.get_from_yaml(), seed, config)
        experiment.run()
    return experiment.group_policies["tokens"][0].mlp.get_stateful_net()


if __name__ == "__main__":
    policies = {"BenchMARL MAPPO": TokenPolicy(tyro.cli(train)), "EViT": "evit"}
    images, tune = Digits("test", 500), Digits("train", 256)
    print(benchmark(policies, load_backbone(), images, tune=tune, budgets=(0.35,), seeds=2, timing=None).table())
