"""Learnt merging from the command line: trained, resumed, evaluated, compared, and gone on from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_cli import mistake, vitprune

from vitprune_env.agents import TokenActor, TokenPolicy, load_policy, save_policy
from vitprune_env.agents.merging import distillation

SMALL = (
    *("--preset", "merge", "--quick", "--target-share", 0.75, "--sites", 3, 5),
    *("--updates", 1, "--images", 4, "--cache-images", 8, "--calibration-images", 8, "--test-images", 10),
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("merge")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distillation, "SHAPES", (1.0,))
        vitprune("train", *SMALL, "--output", folder)
    return folder


def test_the_table_has_what_it_has_to_beat(trained: Path) -> None:
    summary = json.loads((trained / "summary.json").read_text())
    names = [row["name"] for row in summary["rows"]]
    rivals = ["ToMe", "ToMe, the same share everywhere", "before playing"]
    assert names == ["dense", "random", *rivals, "learnt merging (PGPE)"]
    assert {"tome_accuracy", "start_accuracy", "accuracy", "mac_ratio"} <= set(summary)
    assert not {"evit_accuracy", "untrained_accuracy"} & set(summary)
    assert "| before playing |" in (trained / "table.md").read_text()
    assert (trained / "tokens.png").exists()


def test_a_resumed_run_starts_from_the_same_policy(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitprune_env.cli.train.distilled_policy", lambda *_, **__: pytest.fail("distilled again"))
    for name in ("compare", "report"):  # takes longest, and is the same
        monkeypatch.setattr(f"vitprune_env.cli.train.{name}", lambda *_: None)
    vitprune("train", *SMALL, "--output", trained, "--resume")


def test_it_is_evaluated_at_another_budget(trained: Path, tmp_path: Path) -> None:
    vitprune(
        "evaluate", "--quick", "--images", 10, "--checkpoint", trained, "--target-share", 0.9, "--output", tmp_path
    )
    rows = json.loads((tmp_path / "evaluation.json").read_text())["rows"]
    assert rows[1]["gmacs"] / rows[0]["gmacs"] == pytest.approx(0.9, abs=0.05)


def test_it_is_compared(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--quick", "--methods", "topk", "--budgets", 0.8, "--images", 10, "--seeds", 1, "--output", tmp_path)
    vitprune("benchmark", *flags, "--checkpoints", f"mine={trained}")
    assert "| mine | 3, 5 |" in capsys.readouterr().out


def test_a_file_to_start_from_fits_the_algorithm(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    drops = save_policy(TokenPolicy(TokenActor(48), info={"backbone": "vit_digits"}), tmp_path / "drops.safetensors")
    for flags, message in (
        ((*SMALL, "--init-from", drops), "expected a MergePolicy with pgpe, got a TokenPolicy"),
        ((*SMALL, "--init-from", "new"), "expected a MergePolicy with pgpe, got new"),
        ((*SMALL, "--init-from", "evit"), "expected a MergePolicy with pgpe, got evit"),
        (("--quick", "--init-from", trained / "policy.safetensors"), "expected a TokenPolicy with mappo, got a Merge"),
    ):
        line = mistake(capsys, "train", *flags, "--output", tmp_path)
        assert line.startswith(f"error: --init-from: {message}")
    line = mistake(capsys, "train", *SMALL, "--target-share", 0.3, "--output", tmp_path)
    assert "expected above 0.0123" in line
    flags = (*SMALL, "--target-share", 0.5, "--init-from", trained / "policy.safetensors", "--output", tmp_path)
    line = mistake(capsys, "train", *flags)
    assert "GMACs, what is left when the policy prunes all it can, got 0.01" in line
    assert not (tmp_path / "history.jsonl").exists(), "refused before training"
    monkeypatch.setattr("vitprune_env.cli.train.distilled_policy", lambda *_, **__: pytest.fail("distilled"))
    for flags, message in (
        (("--images", 5), "--images: expected a multiple of 2"),
        (("--actions", "keep_or_merge"), "--actions: expected keep for a policy that merges"),
    ):
        assert message in mistake(capsys, "train", *SMALL, *flags, "--output", tmp_path)
    assert load_policy(trained / "start.safetensors").default_sites(8) is not None


@pytest.mark.parametrize("teacher", ["evit", pytest.param("distilled", marks=pytest.mark.slow)])
def test_mappo_starts_from_a_baseline(teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = ("--quick", "--updates", 1, "--target-share", 0.6, "--sites", 3, 5, "--actions", "keep_or_merge")
    flags = (*small, "--init-from", teacher, "--test-images", 10, "--output", tmp_path)
    for name in ("compare", "report"):  # takes longest
        monkeypatch.setattr(f"vitprune_env.cli.train.{name}", lambda *_: None)
    vitprune("train", *flags)
    start = load_policy(tmp_path / "start.safetensors")
    assert isinstance(start, TokenPolicy)
    assert (start.actions.name, start.info["algorithm"]) == ("keep_or_merge", "cloning")
    assert [site.label for site in start.sites or ()] == ["3", "5"]
    monkeypatch.setattr("vitprune_env.cli.train.cloned_policy", lambda *_, **__: pytest.fail("cloned again"))
    vitprune("train", *flags, "--resume")


def test_mappo_is_refused_before_a_baseline_is_imitated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitprune_env.cli.train.of_method", lambda *_, **__: pytest.fail("fitted"))
    line = mistake(capsys, "train", "--quick", "--init-from", "evit", "--target-share", 0.01, "--output", tmp_path)
    assert line.startswith("error: budget: expected above 0.00")
    for flags, message in (
        (("--finetune", "alternate", "--trainable", "all"), "--cache-images: expected 0"),
        (("--adaptive", 0.3, 0.6), "start: expected None with BudgetRange"),
    ):
        line = mistake(capsys, "train", "--quick", "--init-from", "distilled", *flags, "--output", tmp_path)
        assert line.startswith(f"error: {message}")
