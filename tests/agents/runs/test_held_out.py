"""Held-out greedy play during training: what it measures, that it disturbs nothing, and how it ends a run."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_resume import before_update
from test_start import MERGING, START
from test_trainer import DATA, assert_same, run, weights

from games import NAME, OwnLabels
from helpers import toy
from runs import TINY, but
from vitprune_env.agents import BudgetRange, FinetuneConfig, TrainResult
from vitprune_env.agents.finetuning.step import FineTuner
from vitprune_env.agents.runs import stopping
from vitprune_env.agents.runs.held_out import Validation
from vitprune_env.errors import SettingsError
from vitprune_env.files import load_state
from vitprune_env.game.rewards import Attribution
from vitprune_env.game.rollout import evaluate
from vitprune_env.game.token_game import TokenGame

HELD_OUT = OwnLabels(40, seed=9)
WATCHED = but(TINY, validate_every=2, validation_images=40)


def without_validation(result: TrainResult) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if k != "train_time" and "validation" not in k} for row in result.history]


def validated(result: TrainResult) -> dict[float, float]:
    return {r["update"]: r["validation_accuracy"] for r in result.history if "validation_accuracy" in r}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param({"reward": Attribution(0.01), "cache_images": 0, "updates": 3}, marks=pytest.mark.slow),
        pytest.param({"budget": BudgetRange(0.45, 0.8), "updates": 2}, marks=pytest.mark.slow),
        {"finetune": FinetuneConfig(when="alternate", every=1, steps=4, batch_size=8), "updates": 3},
    ],
    ids=["default", "attribution", "adaptive", "alternate"],
)
def test_validation_changes_nothing_that_is_learnt(changes: dict[str, Any]) -> None:
    plain = run(but(TINY, **changes))
    watched = run(but(WATCHED, **changes), validation=HELD_OUT)
    assert torch.equal(weights(plain), weights(watched))
    assert plain.policy.threshold == watched.policy.threshold
    assert without_validation(plain) == without_validation(watched)
    updates = len(plain.history)
    assert set(validated(watched)) == {*range(2, updates + 1, 2), updates}


def test_the_policy_is_measured_as_it_would_be_deployed(tmp_path: Path) -> None:
    """After the last update it is the deployed policy itself, if the threshold is set on the same images."""
    result = run(but(WATCHED, updates=3), validation=HELD_OUT, output=tmp_path)
    game = TokenGame.for_policy(toy(NAME), result.policy)
    found = evaluate(game, result.policy, [(HELD_OUT.images, HELD_OUT.labels)])
    rows = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert ["validation_accuracy" in row for row in rows] == [False, True, True]
    assert rows[-1]["validation_accuracy"] == found.accuracy
    assert rows[-1]["validation_share"] == pytest.approx(found.macs / game.cost.dense())
    assert rows[-1]["validation_share"] != rows[-1]["share"]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("training/validation_accuracy")
    assert [event.step for event in events] == [16 * 3 * update for update in (2, 3)]


def test_merging_policies_and_ranges_of_budgets_are_measured_at_their_target() -> None:
    merging = but(MERGING, updates=1, validate_every=1, validation_images=40)
    ranged = but(WATCHED, budget=BudgetRange(0.45, 0.8), updates=1)
    for config, start, target in ((merging, START, 0.6), (ranged, None, 0.625)):
        result = run(config, validation=DATA, start=start)
        assert result.history[0]["validation_share"] == pytest.approx(target, rel=0.05)


def test_resumed_equals_uninterrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(WATCHED, validation=HELD_OUT)
    with monkeypatch.context() as patch:
        before_update(patch, 4, lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(WATCHED, validation=HELD_OUT, output=tmp_path)
    assert_same(whole, run(WATCHED, validation=HELD_OUT, output=tmp_path, resume=True))


@pytest.fixture
def stalling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accuracy never changes, and the budget counts as reached from the second update on."""
    monkeypatch.setattr(Validation, "measure", lambda *_: {"validation_accuracy": 0.5, "validation_share": 0.5})
    monkeypatch.setattr(stopping, "WINDOW", 1)
    monkeypatch.setattr(stopping, "STEADY", 10.0)
    monkeypatch.setattr(stopping, "ON_TARGET", 10.0)


PATIENT = but(TINY, validate_every=1, patience=2, checkpoint_every=100, anneal_part=0.0)


@pytest.mark.usefixtures("stalling")
def test_a_run_that_stopped_is_finished_and_goes_on_where_it_is_told_to(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "vitprune_env")
    stopped = run(PATIENT, validation=HELD_OUT, output=tmp_path)
    assert len(stopped.history) == len(load_state(tmp_path / "training.safetensors")["history"]) == 3
    assert stopped.policy.info["updates"] == 3
    said = "after update 3 of 6: price and cost have settled, and the last 2 validations were not above 50.0%"
    assert stopped.stopped is not None
    assert stopped.stopped.startswith(said)
    assert f"training ended {said}" in caplog.text
    again = run(PATIENT, validation=HELD_OUT, output=tmp_path, resume=True)
    assert_same(stopped, again)
    assert again.stopped == stopped.stopped
    on = run(but(PATIENT, patience=0), validation=HELD_OUT, output=tmp_path, resume=True)
    assert on.stopped is None
    assert_same(run(but(PATIENT, patience=0), validation=HELD_OUT), on)


@pytest.mark.usefixtures("stalling")
def test_fine_tuning_follows_a_stop_and_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned = FinetuneConfig(when="after", steps=4, batch_size=8, checkpoint_every=1)
    config = but(PATIENT, finetune=tuned)
    whole = run(config, validation=HELD_OUT)
    step, calls = FineTuner.step, []

    def cut(self: FineTuner, *args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return step(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(FineTuner, "step", cut)
        with pytest.raises(KeyboardInterrupt):
            run(config, validation=HELD_OUT, output=tmp_path)
        again = run(config, validation=HELD_OUT, output=tmp_path, resume=True)
    assert len(calls) == 3 + 2  # two steps were done and kept
    assert_same(whole, again)
    assert all(map(torch.equal, whole.backbone.model.state_dict().values(), again.backbone.model.state_dict().values()))


def test_settings_that_do_not_fit() -> None:
    with pytest.raises(SettingsError, match="validation: expected held-out images with labels with validate_every=2"):
        run(WATCHED)
    with pytest.raises(SettingsError, match="validation: expected None with validate_every=0, got a dataset"):
        run(TINY, validation=HELD_OUT)
    with pytest.raises(ValueError, match="patience: expected 0 with validate_every=0, got 3"):
        but(TINY, patience=3)
    for name in ("validate_every", "patience"):
        with pytest.raises(ValueError, match=f"{name}: expected at least 0, got -1"):
            but(TINY, **{name: -1})


# The rule


def history(accuracy: list[float], **changes: Any) -> list[dict[str, float]]:
    """Forty updates at rest at a target of 20 %, validated every ten."""
    rows = [
        {"update": float(update), "target_share": 0.2, "share": 0.204, "price": 0.03, **changes}
        for update in range(1, 41)
    ]
    for update, value in zip((10, 20, 30, 40), accuracy, strict=True):
        rows[update - 1]["validation_accuracy"] = value
    return rows


STALLED = [0.7, 0.9, 0.9, 0.88]


def test_training_ends_when_validations_no_longer_improve() -> None:
    rows = history(STALLED)
    reason = stopping.reason_to_stop(rows, 2, led=True)
    assert reason is not None
    assert reason.endswith("the last 2 validations were not above 90.0%, that after update 20")
    assert stopping.reason_to_stop(rows, 3, led=True) is None  # 0.9 is above 0.7
    assert stopping.reason_to_stop(rows, 4, led=True) is None  # nothing to compare with
    assert stopping.reason_to_stop(rows, 0, led=True) is None
    assert stopping.reason_to_stop([], 2, led=True) is None
    assert stopping.reason_to_stop(rows[:-1], 1, led=True) is None  # only a validated update can be the last
    for better in ([0.7, 0.9, 0.89, 0.91], [0.7, 0.9, 0.91, 0.89]):
        assert stopping.reason_to_stop(history(better), 2, led=True) is None


def test_training_goes_on_until_the_budget_is_reached() -> None:
    late = history(STALLED)
    late[20]["target_share"] = 0.21  # the target has been in its place for 19 updates only
    assert stopping.reason_to_stop(late, 2, led=True) is None
    late[20]["target_share"], late[19]["target_share"] = 0.2, 0.21
    assert stopping.reason_to_stop(late, 2, led=True) is not None

    above = history(STALLED, share=0.211)  # 5.5 % above the target
    assert stopping.reason_to_stop(above, 2, led=True) is None
    assert stopping.reason_to_stop(above, 2, led=False) is not None  # nothing leads it there

    for name in ("price", "share"):
        for led in (True, False):
            moving = history(STALLED)
            for row in moving[20:30]:
                row[name] *= 0.82  # the ten updates after them have 22 % more
            assert stopping.reason_to_stop(moving, 2, led) is None
    free = history(STALLED, price=0.0)  # a reward without a price
    assert stopping.reason_to_stop(free, 2, led=False) is not None
