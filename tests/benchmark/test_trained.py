"""A freshly trained policy beside what it has to beat."""

from __future__ import annotations

import pytest
import torch

from games import NAME, OwnLabels
from helpers import toy
from vitprune_env.agents import TokenActor, TokenPolicy, TrainResult
from vitprune_env.benchmarking.contestants import Fits
from vitprune_env.benchmarking.trained import TrainingReport, compare_trained
from vitprune_env.envs.actions import ActionKind, action_kind


def compared(
    threshold: float, hidden: tuple[int, ...] = (), actions: ActionKind | None = None, **options: object
) -> TrainingReport:
    """The comparison of an actor that never learned, on a toy network."""
    backbone, data = toy(NAME), OwnLabels(8)
    actor = TokenActor(48, hidden, num_actions=2 if actions is None else actions.count(backbone.num_patches))
    policy = TokenPolicy(actor, threshold=threshold, sites=(1, 2, 3), actions=actions)
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


@pytest.mark.parametrize(
    ("actions", "end"),
    [
        ("keep_or_merge", "merging"),
        pytest.param("drop_merge_keep", "merging", marks=pytest.mark.slow),
        pytest.param("keep_or_fuse", "fusing", marks=pytest.mark.slow),
    ],
)
def test_rivals_have_the_same_way_out(actions: str, end: str) -> None:
    report = compared(0.995, actions=action_kind(actions), fit=OwnLabels(12, seed=1), fits=Fits(steps=2))
    rows = {row.name: row for row in report.rows}
    chosen = [f"{name}, {end}" for name in ("random", "brightness", "class attention", "distilled attention")]
    assert set(rows) == {"dense", "untrained actor (mean of 1)", "EViT", "MAPPO", *chosen}
    for name in chosen[:3]:  # the last one may keep no token of an image, and then has nothing to merge into
        # every patch ends up in some token, and nothing is dropped
        assert all(token >= 0 for image in rows[name].source for token in image), name
    if end == "merging":
        assert rows["random, merging"].policy_gmacs > 0
        assert rows["class attention, merging"].policy_gmacs > rows["random, merging"].policy_gmacs / 2
    assert "class_attention_accuracy" in report.summary()
