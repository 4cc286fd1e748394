"""The commands of the README, end to end at small size, as a user runs them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import common
import evaluate
import train_mappo
from places import EXAMPLES
from vitprune_env.agents import PRESETS, GMACs

SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py") if "__main__" in path.read_text(encoding="utf-8"))
KEYS = {
    "dense_accuracy",
    "accuracy",
    "random_accuracy",
    "untrained_accuracy",
    "evit_accuracy",
    "dense_gmacs",
    "gmacs",
    "policy_gmacs",
    "mac_ratio",
    "keep_per_site",
    "speedup",
    "wall_seconds",
    "seed",
    "versions",
}


def command(script: str, *flags: object) -> str:
    """Run an example; its output, or what went wrong."""
    line = [sys.executable, str(EXAMPLES / script), *map(str, flags)]
    paths = os.pathsep.join([str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(line, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": paths})
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("trained") / "run"
    command("train_mappo.py", "--quick", "--seed", 3, "--output", output)
    return output


def test_training_leaves_what_it_promises(trained: Path) -> None:
    summary = json.loads((trained / "summary.json").read_text())
    assert set(summary) >= KEYS
    assert summary["seed"] == 3
    assert summary["mac_ratio"] == pytest.approx(summary["gmacs"] / summary["dense_gmacs"])
    assert 0 < summary["policy_gmacs"] < 0.02 * summary["dense_gmacs"]
    assert abs(summary["gmacs"] / summary["target_gmacs"] - 1) < 0.1
    assert len(summary["keep_per_site"]) == 3
    assert [row["name"].split(" ")[0] for row in summary["rows"]] == ["dense", "random", "untrained", "EViT", "MAPPO"]
    for name in ("tokens.png", "learning_curve.png"):
        assert (trained / name).read_bytes().startswith(b"\x89PNG")
    assert list((trained / "tensorboard").glob("events*"))
    assert (trained / "table.md").read_text().count("|\n") >= 6


def test_resuming_a_finished_run_changes_nothing(trained: Path) -> None:
    before = (trained / "policy.safetensors").read_bytes()
    first = json.loads((trained / "summary.json").read_text())
    command("train_mappo.py", "--quick", "--seed", 3, "--output", trained, "--resume")
    again = json.loads((trained / "summary.json").read_text())
    assert (trained / "policy.safetensors").read_bytes() == before
    assert [again[key] for key in ("accuracy", "gmacs", "evit_accuracy")] == [
        first[key] for key in ("accuracy", "gmacs", "evit_accuracy")
    ]


def test_evaluate_reloads_the_policy(trained: Path, tmp_path: Path) -> None:
    shown = command("evaluate.py", "--quick", "--checkpoint", trained, "--output", tmp_path)
    results = json.loads((tmp_path / "evaluation.json").read_text())
    summary = json.loads((trained / "summary.json").read_text())
    assert results["rows"][1]["gmacs"] == pytest.approx(summary["gmacs"], rel=1e-9)
    assert results["rows"][1]["accuracy"] == summary["accuracy"]  # the same held-out scenes
    assert "| policy |" in shown
    assert (tmp_path / "tokens.png").is_file()


def test_custom_algorithm_is_compared_with_mappo(trained: Path, tmp_path: Path) -> None:
    shown = command("custom_algorithm.py", "--quick", "--checkpoint", trained, "--output", tmp_path)
    assert [line.split("|")[1].strip() for line in shown.splitlines()[2:]] == ["dense", "REINFORCE", "EViT", "MAPPO"]
    assert len((EXAMPLES / "custom_algorithm.py").read_text().splitlines()) <= 120


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_explains_every_flag(script: str) -> None:
    shown = command(script, "--help")
    assert "--seed" in shown
    assert "usage" in shown


def test_preset_decides_defaults_and_flags_win() -> None:
    args = train_mappo.parse(["--preset", "rl4evit", "--updates", "7", "--keep-cost", "2.5", "--outcome-bonus", "1.5"])
    paper = PRESETS["rl4evit"]
    assert (args.reward, args.epochs, args.paper_sizes) == ("paper", paper.learner.epochs, True)
    assert (args.updates, args.keep_cost, args.outcome_bonus) == (7, 2.5, 1.5)
    assert train_mappo.parse(["--preset=rl4evit"]).config == paper
    config, default = train_mappo.parse([]).config, PRESETS["default"]
    assert (config.budget, config.learner, config.run) == (default.budget, default.learner, default.run)
    assert config.reward == default.learner.default_reward()
    assert train_mappo.parse(["--target-gmacs", "0.01"]).config.budget == GMACs(0.01)


@pytest.mark.parametrize("mode", ["alternate", "after"])
def test_quick_runs_have_time_for_fine_tuning(mode: str) -> None:
    config = train_mappo.parse(["--quick", "--finetune", mode]).config
    assert config.finetune.every <= config.run.updates
    assert config.finetune.steps <= 4


def test_weights_of_another_run_are_not_taken_for_fine_tuned_ones(trained: Path, tmp_path: Path) -> None:
    shutil.copy(trained / "policy.safetensors", tmp_path)
    (tmp_path / "backbone.safetensors").write_bytes(b"left by a run that fine-tuned its network")
    _, backbone = evaluate.load(evaluate.Args(checkpoint=tmp_path))
    assert backbone.name == "vit_digits"


def test_rows_are_averaged_with_the_spread_as_error() -> None:
    rows = [
        common.Row("a", accuracy, 0.1, gmacs, 0.0, (rate,)) for accuracy, gmacs, rate in ((0.5, 1, 0.2), (0.7, 3, 0.4))
    ]
    mean = common.Row.mean("mean", rows)
    assert (mean.accuracy, mean.gmacs, *mean.keep_per_site) == pytest.approx((0.6, 2.0, 0.3))
    assert mean.stderr == pytest.approx(0.1)


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    content: dict[str, Any] = {"good": 1}
    common.write_json(tmp_path / "a.json", content)
    with pytest.raises(TypeError):
        common.write_json(tmp_path / "a.json", {"bad": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == content
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("train_mappo.py", "--target-share", "0.1"), r"error: budget: expected above 0.00495"),
        (("train_mappo.py", "--sites", "3", "99"), r"error: sites: expected blocks 1 to 8, got '99'"),
        (("evaluate.py", "--checkpoint", "nowhere"), r"error: .*nowhere.*expected a policy file, found none"),
    ],
)
def test_mistakes_are_said_in_one_line(flags: tuple[str, ...], message: str, tmp_path: Path) -> None:
    line = [sys.executable, str(EXAMPLES / flags[0]), *flags[1:], "--output", str(tmp_path)]
    paths = os.pathsep.join([str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(line, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": paths})
    assert done.returncode != 0
    assert re.search(message, done.stderr)
    assert "Traceback" not in done.stderr


def test_a_baseline_is_fine_tuned_for(tmp_path: Path) -> None:
    shown = command("finetune.py", "--quick", "--policy", "topk", "--target-share", 0.5, "--output", tmp_path)
    assert "| topk, fine-tuned |" in shown
    assert (tmp_path / "backbone.safetensors").exists()
    rates = [json.loads(line)["keep_rate"] for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert rates[0] == 1.0
    assert rates[-1] < 1.0
