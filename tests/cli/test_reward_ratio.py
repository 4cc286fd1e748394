"""The curve of RL4EViT's Fig. 3 as one command: what it writes, what it resumes, and what becomes of an error."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from vitprune_env.cli import main, reward_ratio
from vitprune_env.errors import NumericalError
from vitprune_env.game.rewards import PaperReward, correct, probability

TINY = ("--quick", "--actor-hidden", 4, "--critic-hidden", 4, "--forms", "kept")


def curve(output: Path, *flags: object) -> list[dict[str, str]]:
    """Run the command; the lines of its results.csv."""
    main(["reward-ratio", *map(str, TINY), *map(str, flags), "--output", str(output)])
    with (output / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The rewards that were trained with; a keep_cost of 2 ends in an error."""
    trained: list[Any] = []
    really = reward_ratio.train_policy

    def train(*args: Any, reward: PaperReward, **options: Any) -> Any:
        trained.append(reward)
        if reward.keep_cost == 2.0:
            raise NumericalError("loss: expected finite numbers, got NaN | of course")
        return really(*args, reward=reward, **options)

    monkeypatch.setattr(reward_ratio, "train_policy", train)
    return trained


def test_an_error_costs_its_row_and_not_the_table(
    tmp_path: Path, calls: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = curve(tmp_path, "--ratios", 0.8, 0.5)
    assert calls == [PaperReward(keep_cost=1.25, outcome_bonus=1.0), PaperReward(keep_cost=2.0, outcome_bonus=1.0)]
    assert bad["error"].startswith("loss: expected finite numbers")
    assert (bad["predicted"], bad["kept_deployed"]) == ("", "")
    assert good["error"] == ""
    assert float(good["predicted"]) == pytest.approx(0.8 * float(good["accuracy_exploring"]))
    assert float(good["share_deployed"]) == pytest.approx(float(good["share_exploring"]), rel=0.1)
    assert float(good["kept_deployed"]) == pytest.approx(float(good["kept_exploring"]), abs=0.1)
    assert (tmp_path / "reward_ratio.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "table.md").read_text()
    assert text.strip() in capsys.readouterr().out
    assert len({line.count("|") for line in text.splitlines()}) == 1  # the error's own bar is no column
    assert len(calls) == 2
    assert curve(tmp_path, "--ratios", 0.8, 0.5, "--resume")[0] == good
    assert [reward.keep_cost for reward in calls[2:]] == [2.0]  # what failed is tried again, the rest is there


def test_the_two_forms_of_the_reward() -> None:
    assert reward_ratio.reward_of("kept", 0.8, correct).equilibrium(0.9, 64) == pytest.approx(0.72)
    printed = reward_ratio.reward_of("printed", 0.8, probability)
    assert printed == PaperReward(0.8, 1.0, probability, scaled=False, pay="all")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--ratios", "0.5", "-1"], "--ratios: expected a number above 0, got -1.0"),
        (["--target-share", "0.5"], "ratios: expected no budget beside them"),
        (
            ["--price-rate", "0.5"],
            "--price-rate: expected 0.2 (the default) with PaperReward, which has no price to move",
        ),
        (["--entropy", "-1"], "entropy: expected at least 0, got -1.0"),
    ],
)
def test_mistakes_are_told_before_anything_runs(
    flags: list[str], said: str, tmp_path: Path, calls: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        curve(tmp_path, *flags)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err
    assert not calls
