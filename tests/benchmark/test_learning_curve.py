"""The learning curve of a run: exploring play, held-out play as deployed, and the target."""

from __future__ import annotations

from typing import Any, cast

import numpy as np

from games import NAME
from helpers import toy
from vitprune_env.agents import TokenActor, TokenPolicy, TrainResult
from vitprune_env.benchmarking.measurement import Row
from vitprune_env.benchmarking.trained import TrainingReport

HISTORY: tuple[dict[str, float], ...] = (
    {"update": 1.0, "accuracy": 0.9, "share": 0.5, "target_share": 0.55},
    {"update": 2.0, "accuracy": 0.8, "share": 0.4, "target_share": 0.3, "validation_accuracy": 0.6,
     "validation_share": 0.21},
    {"update": 3.0, "accuracy": 0.7, "share": 0.3, "target_share": 0.2},
    {"update": 4.0, "accuracy": 0.75, "share": 0.25, "target_share": 0.2, "validation_accuracy": 0.7,
     "validation_share": 0.19},
)  # fmt: skip


def drawn(history: tuple[dict[str, float], ...]) -> list[dict[str, list[list[float]]]]:
    """The lines of both panels by their labels."""
    policy = TokenPolicy(TokenActor(48))
    result = TrainResult(policy, cast(Any, None), history, 0.0, 0.0, 0.0, toy(NAME))
    dense = Row("dense", correct=("1" * 19 + "0",))
    figure = TrainingReport((dense,), result, cast(Any, None)).learning_curve()
    figure.canvas.draw()
    panels = [{str(line.get_label()): np.asarray(line.get_xydata()).tolist() for line in a.lines} for a in figure.axes]
    assert [line.get_marker() for line in figure.axes[0].lines][:1] == ["o" if len(panels[0]) == 3 else "None"]
    assert figure.axes[1].lines[-1].get_linestyle() == "--"
    return panels


def test_held_out_play_stands_beside_exploring_play() -> None:
    upper, lower = drawn(HISTORY)
    assert upper["as deployed, held-out images"] == [[2, 0.6], [4, 0.7]]
    assert lower["as deployed, held-out images"] == [[2, 0.21], [4, 0.19]]
    assert upper["exploring, training images"] == [[1, 0.9], [2, 0.8], [3, 0.7], [4, 0.75]]
    assert lower["target, 20% in the end"] == [[1, 0.55], [2, 0.3], [3, 0.2], [4, 0.2]]
    assert "dense 95.0%" in upper


def test_a_run_without_validation_has_one_curve() -> None:
    plain = tuple({name: value for name, value in row.items() if "validation" not in name} for row in HISTORY)
    upper, lower = drawn(plain)
    assert list(upper) == ["exploring, training images", "dense 95.0%"]
    assert list(lower) == ["exploring, training images", "target, 20% in the end"]
