"""Token pruning is a task that BenchMARL's algorithms play, centralised and independent, with and without a state."""

# pyright: reportMissingImports=false

from __future__ import annotations

import csv
import pickle
from pathlib import Path
from typing import Any, cast

import pytest
import torch

pytest.importorskip("benchmarl")

from benchmarl.algorithms import IqlConfig, MappoConfig, QmixConfig
from benchmarl.environments.common import TaskClass
from benchmarl.experiment import Experiment, ExperimentConfig
from benchmarl.models.mlp import MlpConfig

from envs import images_for
from helpers import toy
from vitprune_env.agents import ModulePolicy
from vitprune_env.game.rewards import SharedOutcome
from vitprune_env.game.rollout import evaluate
from vitprune_env.game.token_game import TokenGame
from vitprune_env.integrations.benchmarl import TokenTask

NAME, IMAGES, STEPS = "vit_tiny_patch16_224", 4, 3
ALGORITHMS = {"mappo": MappoConfig, "iql": IqlConfig, "qmix": QmixConfig}


def task(**options: Any) -> TokenTask:
    return TokenTask(toy(NAME), cast(Any, images_for(NAME)), (1, 2, 3), SharedOutcome(0.02), **options)


def experiment(folder: Path, algorithm: str, **options: Any) -> Experiment:
    config: Any = ExperimentConfig.get_from_yaml()
    config.max_n_iters, config.max_n_frames, config.save_folder = 2, None, folder
    for policy in ("on_policy", "off_policy"):
        setattr(config, f"{policy}_n_envs_per_worker", IMAGES)
        setattr(config, f"{policy}_collected_frames_per_batch", STEPS * IMAGES)
    config.on_policy_n_minibatch_iters, config.on_policy_minibatch_size = 1, STEPS * IMAGES
    config.off_policy_n_optimizer_steps, config.off_policy_train_batch_size, config.off_policy_memory_size = 1, 8, 64
    config.evaluation_interval, config.evaluation_episodes, config.loggers = STEPS * IMAGES, 2, ["csv"]
    network: Any = MlpConfig.get_from_yaml()
    network.num_cells = [8]
    return Experiment(task(**options), ALGORITHMS[algorithm].get_from_yaml(), network, 0, config)


@pytest.mark.parametrize(
    ("algorithm", "options"),
    [
        ("mappo", {}),
        ("mappo", {"state": True}),
        ("mappo", {"action_space": "drop_merge_keep"}),
        ("iql", {}),
        ("iql", {"action_space": "merge"}),
        ("qmix", {"state": True}),
    ],
)
def test_algorithms_train_and_log_what_games_end_with(tmp_path: Path, algorithm: str, options: dict[str, Any]) -> None:
    run = experiment(tmp_path, algorithm, **options)
    before = [weight.clone() for weight in run.policy.parameters()]
    run.run()
    assert any(not torch.equal(old, new) for old, new in zip(before, run.policy.parameters(), strict=True))
    for name in ("accuracy", "gmacs"):
        (file,) = tmp_path.rglob(f"collection_{name}.csv")
        values = [float(row[1]) for row in csv.reader(file.open())]
        assert len(values) == 2
        assert all(0 <= value <= 1 for value in values)


def test_the_trained_network_comes_back_as_a_policy(tmp_path: Path) -> None:
    run = experiment(tmp_path, "mappo")
    network = run.group_policies["tokens"][0].mlp.get_stateful_net()
    policy = ModulePolicy(network, toy(NAME).embed_dim)
    measured = evaluate(TokenGame(toy(NAME), (1, 2, 3)), policy, [images_for(NAME)[:4]])
    assert measured.macs > 0
    rows = torch.randn(1, 25, toy(NAME).embed_dim)
    with torch.no_grad():
        torch.testing.assert_close(run.group_policies["tokens"][0].mlp(rows)[0], network(rows[0]))


def test_the_task_is_stored_and_compared() -> None:
    first = task()
    assert isinstance(first, TaskClass)
    again = pickle.loads(pickle.dumps(first))
    assert again == first
    assert again != task(action_space="merge")
    env = again.get_env_fun(2, continuous_actions=False, seed=0, device="cpu")()
    assert env.batch_size == (2,)
    assert len(again.group_map(env)["tokens"]) == 25


def test_bad_arguments_are_refused_before_an_experiment_begins() -> None:
    with pytest.raises(ValueError, match="action_space: expected one of"):
        task(action_space="fly")
    with pytest.raises(ValueError, match="sites: expected blocks 1 to 4"):
        TokenTask(toy(NAME), cast(Any, images_for(NAME)), (9,))
