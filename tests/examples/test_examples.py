"""The examples, end to end at small size, in one process; and the first of them as a user runs it."""

from __future__ import annotations

import importlib
import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from places import EXAMPLES
from vitprune_env.cli import explained

SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py") if "__main__" in path.read_text(encoding="utf-8"))
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
AT_ONCE = ("custom_algorithm", "custom_backbone", "evaluate")  # keep nothing that a second start could go on from


def example(script: str, *flags: object) -> None:
    """Run an example as its command line would."""
    module: Any = importlib.import_module(f"vitprune_env.examples.{script}")
    with explained(getattr(module, "Args", None)):
        module.main(list(map(str, flags)))


def first_column(table: str) -> list[str]:
    """The names in a markdown table."""
    return [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")][1:]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("trained") / "run"
    example("train_mappo", "--quick", "--seed", 3, "--output", output)
    return output


def test_training_leaves_what_it_promises(trained: Path) -> None:
    summary = json.loads((trained / "summary.json").read_text())
    assert set(summary) >= KEYS
    assert summary["seed"] == 3
    assert summary["mac_ratio"] == pytest.approx(summary["gmacs"] / summary["dense_gmacs"])
    assert 0 < summary["policy_gmacs"] < 0.02 * summary["dense_gmacs"]
    assert abs(summary["gmacs"] / summary["target_gmacs"] - 1) < 0.1
    assert len(summary["keep_per_site"]) == 3
    names = ["dense", "random", "untrained", "brightness", "EViT", "distilled", "MAPPO"]
    assert [row["name"].split(" ")[0] for row in summary["rows"]] == names
    assert {tuple(row["sites"]) for row in summary["rows"]} == {("1", "3", "5")}  # a fair comparison
    for name in ("tokens.png", "learning_curve.png"):
        assert (trained / name).read_bytes().startswith(b"\x89PNG")
    assert summary["stopped"] is None
    history = [json.loads(line) for line in (trained / "history.jsonl").read_text().splitlines()]
    assert ["validation_accuracy" in row for row in history] == [False, True, False, True]
    assert list((trained / "tensorboard").glob("events*"))
    assert (trained / "table.md").read_text().count("|\n") >= 6


def test_resuming_a_finished_run_changes_nothing(trained: Path) -> None:
    before = (trained / "policy.safetensors").read_bytes()
    first = json.loads((trained / "summary.json").read_text())
    example("train_mappo", "--output", trained, "--resume")  # --quick and --seed 3 are known from the first time
    again = json.loads((trained / "summary.json").read_text())
    assert (trained / "policy.safetensors").read_bytes() == before
    assert [again[key] for key in ("accuracy", "gmacs", "evit_accuracy")] == [
        first[key] for key in ("accuracy", "gmacs", "evit_accuracy")
    ]


def test_evaluate_reloads_the_policy(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example("evaluate", "--quick", "--checkpoint", trained)
    summary = json.loads((trained / "summary.json").read_text())
    pruned = capsys.readouterr().out.splitlines()[1]
    assert pruned.startswith(f"pruned: {100 * summary['accuracy']:.1f} % correct, {summary['gmacs']:.5f} GMACs")
    example("evaluate", "--quick", "--checkpoint", trained, "--target-share", 0.6)
    share = float(re.findall(r"pruned: .* correct, ([\d.]+) GMACs", capsys.readouterr().out)[0])
    assert share == pytest.approx(0.6 * summary["dense_gmacs"], rel=0.03)


def test_custom_algorithm_is_compared_with_mappo(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example("custom_algorithm", "--quick", "--checkpoint", trained, "--output", trained.parent / "custom")
    names = first_column(capsys.readouterr().out)
    assert {"*dense*", "REINFORCE", "EViT", "MAPPO"} <= set(names)
    assert len((EXAMPLES / "custom_algorithm.py").read_text().splitlines()) <= 120


def test_a_policy_with_evidence_of_its_own_goes_to_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example("custom_policy", "--quick", "--output", tmp_path)
    names = first_column(capsys.readouterr().out)
    assert {"key norms", "EViT", "TopK"} <= set(names)
    assert (tmp_path / "pareto.png").is_file()


def test_a_learner_and_a_reward_of_ones_own_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example("custom_learner", "--quick", "--output", tmp_path / "coma")
    assert re.search(r"COMA: accuracy [\d.]+% at (3[3-6])\.\d% of the dense MACs", capsys.readouterr().out)
    example("custom_reward", "--quick", "--output", tmp_path / "reward")
    first, *_, last = re.findall(r"0\.\d+", capsys.readouterr().out.splitlines()[0])
    assert first != last  # the price follows the budget


def test_a_network_of_ones_own_is_saved_and_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example("custom_backbone", "--quick", "--output", tmp_path)
    assert "the same logits: True" in capsys.readouterr().out


def test_policies_are_deployed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example("deploy", "--quick", "--output", tmp_path)
    shown = capsys.readouterr().out
    for name in ("learnt", "loudest"):  # a network and a policy of one's own, and a trained one
        assert re.search(rf"{name}: the exported program answers class \d", shown)
        assert (tmp_path / f"{name}.pt2").is_file()


def test_policies_are_compared_in_one_call(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example("benchmark", "--quick", "--checkpoint", trained, "--output", tmp_path)
    shown = capsys.readouterr().out
    assert {"EViT", "EViT, not fused", "ToMe", "TopK", "MAPPO"} <= set(first_column(shown))
    assert "best at 35 %: " in shown


@pytest.mark.parametrize("policy", ["topk", "life_regression"])
def test_a_baseline_is_fine_tuned_for(policy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example("finetune", "--quick", "--policy", policy, "--target-share", 0.5, "--output", tmp_path)
    assert f"{policy}, after fine-tuning: " in capsys.readouterr().out
    assert (tmp_path / "backbone.safetensors").exists()


def test_variants_are_compared_and_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--quick", "--output", tmp_path, "--variants", "mappo", "random", "distilled_attention")
    example("ablation", *flags)
    first = capsys.readouterr().out
    rows = [line.split("|") for line in first.splitlines() if line.startswith("| 25")]
    assert [row[2].strip() for row in rows] == ["mappo", "random", "distilled_attention"]  # learnt, as it is, fitted
    assert all(float(row[5]) == pytest.approx(25, rel=0.15) for row in rows)  # of the dense MACs
    results = (tmp_path / "results.json").read_bytes()
    assert b" at 0x" not in results  # an address would forbid another process to resume
    example("ablation", *flags, "--resume")
    assert (tmp_path / "results.json").read_bytes() == results
    assert capsys.readouterr().out == first
    with pytest.raises(SystemExit):
        example("ablation", *flags, "--variants", "mapo")
    assert "error: --variants: expected some of mappo, " in capsys.readouterr().err


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_explains_every_flag(script: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        example(script, "--help")
    shown = capsys.readouterr().out
    assert stopped.value.code == 0
    assert all(flag in shown for flag in ("usage", "--seed", "--device", "--output", "--quick"))
    assert ("--resume" in shown) == (script not in AT_ONCE)


def test_examples_are_few_and_know_only_the_package() -> None:
    assert len(SCRIPTS) <= 12
    for script in SCRIPTS:
        text = (EXAMPLES / f"{script}.py").read_text(encoding="utf-8")
        assert "vitprune_env.examples" not in text
        for other in SCRIPTS:
            assert not re.search(rf"^(from|import) {other}\b", text, flags=re.MULTILINE)


def test_mistakes_are_said_in_one_line_before_time_is_spent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["train_mappo.py", "--target-share", "0.1", "--output", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(EXAMPLES / "train_mappo.py"), run_name="__main__")  # as a user runs it
    assert stopped.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: budget: expected above 0.00495")
