"""A freshly trained policy beside what it has to beat."""

from __future__ import annotations

import pytest
import torch

from games import NAME, OwnLabels
from helpers import toy
from vitprune_env.agents import TokenActor, TokenPolicy, TrainResult
from vitprune_env.benchmarking.contestants import Fits
from vitprune_env.benchmarking.trained import TrainingReport, compare_trained


def compared(threshold: float, hidden: tuple[int, ...] = (), images: int = 8, **options: object) -> TrainingReport:
    """The comparison of an actor that never learned, on a toy network."""
    backbone, data = toy(NAME), OwnLabels(images)
    policy = TokenPolicy(TokenActor(48, hidden), threshold=threshold, sites=(1, 2, 3))
    result = TrainResult(policy, torch.nn.Identity(), (), 0.0, 0.0, 0.0, backbone)
    batches = [(data.images, data.labels)]
    return compare_trained(result, backbone, batches, batches, **{"untrained_actors": 1, **options})  # type: ignore[arg-type]


def test_a_policy_dearer_than_the_dense_network_gets_its_table() -> None:
    """It keeps every token and is large; the others are compared at the dense network's GMACs, which they can meet."""
    dense, random, untrained, brightness, evit, learned = compared(-40.0, (192, 64)).rows
    assert learned.gmacs > dense.gmacs
    assert max(row.gmacs for row in (random, untrained, brightness, evit)) <= 1.01 * dense.gmacs  # evidence counts
    assert min(random.keep_per_site) == min(brightness.keep_per_site) == min(evit.keep_per_site) == 1.0


def test_rivals_are_fitted_and_stand_at_the_same_sites_and_cost(capsys: pytest.CaptureFixture[str]) -> None:
    """Twelve images are fewer than the fit holds out by itself: a quarter of them is held out instead."""
    report = compared(0.995, fit=OwnLabels(12, seed=1), fits=Fits(steps=2), progress=True)
    rows = {row.name: row for row in report.rows}
    rivals = ["random", "untrained actor (mean of 1)", "brightness", "EViT", "distilled attention"]
    assert list(rows) == ["dense", *rivals, "MAPPO"]
    for name in rivals:
        assert rows[name].sites == ("1", "2", "3"), name
        assert rows[name].gmacs == pytest.approx(rows["MAPPO"].gmacs, rel=0.1), name  # four tokens more cost a tenth
    assert rows["distilled attention"].policy_gmacs > 0
    summary = report.summary()
    assert summary["brightness_accuracy"] == rows["brightness"].accuracy
    assert summary["distilled_attention_accuracy"] == rows["distilled attention"].accuracy
    assert "compare: 100%" in capsys.readouterr().err


def test_a_rival_that_cannot_meet_the_budget_says_so() -> None:
    """With a hidden layer of one unit, looking at all tokens is cheaper than with the rival's 24."""
    report = compared(40.0, (1,), fit=OwnLabels(12, seed=1), fits=Fits(steps=2))
    row = next(row for row in report.rows if row.name == "distilled attention")
    assert "expected" in row.out_of_reach or "reaches" in row.out_of_reach
    assert "| distilled attention | out of reach |  |" in report.table()
    assert "distilled_attention_accuracy" not in report.summary()
