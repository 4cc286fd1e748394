"""MAPPO in BenchMARL, on the batched environment.

    pip install vitprune_env[benchmarl]
    python examples/frameworks/benchmarl_mappo.py --iterations 40

The critic gives an image one value for all agents, but only kept tokens are charged for what is left of the network.
With a trace parameter (lambda) of 1 each agent's return is its own.
"""

from __future__ import annotations

from tempfile import TemporaryDirectory

import tyro
from benchmarl.algorithms import MappoConfig
from benchmarl.experiment import Experiment, ExperimentConfig
from benchmarl.models.mlp import MlpConfig
from torch import nn

from vitprune_env import SharedOutcome, benchmark, load_backbone
from vitprune_env.agents import ModulePolicy
from vitprune_env.data import Digits
from vitprune_env.integrations.benchmarl import TokenTask


def train(iterations: int = 40, seed: int = 0, images: int = 128) -> nn.Module:
    """Train, and return the network that gives tokens `[rows, D]` their logits `[rows, 2]`."""
    task = TokenTask(load_backbone(), Digits("train", 2048), reward=SharedOutcome(price=0.03))
    config = ExperimentConfig.get_from_yaml()
    config.max_n_iters, config.max_n_frames, config.gamma, config.lr = iterations, None, 1.0, 3e-3
    config.on_policy_n_envs_per_worker, config.on_policy_collected_frames_per_batch = images, 3 * images
    config.on_policy_n_minibatch_iters, config.on_policy_minibatch_size = 4, images
    config.evaluation, config.loggers, config.create_json = False, [], False
    mappo, actor, critic = MappoConfig.get_from_yaml(), MlpConfig.get_from_yaml(), MlpConfig.get_from_yaml()
    mappo.lmbda, mappo.entropy_coef, actor.num_cells = 1.0, 0.01, [32]
    with TemporaryDirectory() as config.save_folder:
        experiment = Experiment(task, mappo, actor, seed, config, critic)
        experiment.run()
    return experiment.group_policies["tokens"][0].mlp.get_stateful_net()


if __name__ == "__main__":
    backbone, test, tune = load_backbone(), Digits("test", 500), Digits("train", 256)
    policies = {"BenchMARL MAPPO": ModulePolicy(tyro.cli(train), backbone.embed_dim), "EViT": "evit"}
    print(benchmark(policies, backbone, test, tune=tune, budgets=(0.35,), seeds=2, timing=None).table())
