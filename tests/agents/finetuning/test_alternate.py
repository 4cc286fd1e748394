"""Algorithm 1 whole: the network learns in turn with its policy, or after it; resumable to the bit."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import runs
from games import NAME, OwnLabels
from helpers import toy
from vitprune_env.agents import FinetuneConfig, Preset, RunConfig, Share, TrainResult, load_policy, train
from vitprune_env.agents.finetuning.alternate import Alternation
from vitprune_env.agents.runs import run as trainer
from vitprune_env.agents.shared.signals import TrainingStopped
from vitprune_env.engine.backbone import Backbone
from vitprune_env.files import load_state
from vitprune_env.game.rewards import PaperReward
from vitprune_env.types import Step

TINY = Preset(
    budget=Share(0.6),
    learner=runs.TINY.learner,
    run=RunConfig(updates=6, images=12, cache_images=32, calibration_images=32, checkpoint_every=1),
    finetune=FinetuneConfig(when="alternate", every=2, steps=6, batch_size=8, lr=1e-3, cache_images=32),
    sites=("1", "2"),
)
DATA = OwnLabels(40)


def run(config: Preset = TINY, **options: Any) -> TrainResult:
    return train(toy(NAME), DATA, **{**config.arguments, **options}, progress=False)


def tuned(**changes: Any) -> Preset:
    """With other settings of fine-tuning."""
    return replace(TINY, finetune=replace(TINY.finetune, **changes))


def weights(backbone: Backbone) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in backbone.model.state_dict().items()}


def changed(one: Backbone, two: Backbone) -> set[str]:
    mine, other = weights(one), weights(two)
    return {name for name in mine if not torch.equal(mine[name], other[name])}


@pytest.mark.parametrize("mode", ["alternate", "after"])
def test_a_copy_learns_behind_the_first_site(mode: Any, tmp_path: Path) -> None:
    before = weights(toy(NAME))
    result = run(tuned(when=mode), output=tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in weights(toy(NAME)).items())
    moved = changed(result.backbone, toy(NAME))
    assert "blocks.1.mlp.fc1.weight" in moved
    assert not any(name.startswith(("blocks.0.", "patch_embed", "pos_embed", "cls_token")) for name in moved)
    assert result.train_macs <= result.target_macs
    assert (tmp_path / "backbone.safetensors").exists()
    phases = [row for row in result.history if "finetune/loss" in row]
    assert len(phases) == (3 if mode == "alternate" else 0)
    if mode == "alternate":
        assert load_state(tmp_path / "training.safetensors")["finetune"]["steps"] == 6, "in all phases together"


def test_the_policy_is_calibrated_for_the_network_that_comes_out(tmp_path: Path) -> None:
    config = tuned(when="after", lr=3e-2, steps=20)
    result = run(config, output=tmp_path)
    assert 0.97 * result.target_macs < result.train_macs <= result.target_macs
    assert load_policy(tmp_path / "policy.safetensors").threshold == result.policy.threshold
    assert result.policy.threshold != run(replace(config, finetune=None)).policy.threshold


def test_off_leaves_the_network_alone() -> None:
    assert run(replace(TINY, finetune=None)).backbone is toy(NAME)


def test_too_few_updates_for_a_phase() -> None:
    with pytest.raises(ValueError, match="every: expected at most updates = 6"):
        run(tuned(every=7))


def test_another_runs_fine_tuning_is_not_taken_for_this_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the same folder: a whole run, one of other settings that is killed in its updates and then resumed."""
    run(tuned(when="after"), output=tmp_path)
    config = replace(tuned(when="after"), budget=Share(0.8))
    check, calls = trainer.check_health, []

    def dying(*args: Any) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("killed")
        check(*args)

    monkeypatch.setattr(trainer, "check_health", dying)
    with pytest.raises(RuntimeError, match="killed"):
        run(config, output=tmp_path, overwrite=True)
    resumed = run(config, output=tmp_path, resume=True)
    assert not changed(run(config).backbone, resumed.backbone)


def test_a_signal_in_the_last_update_stops_before_fine_tuning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tuned(when="after")
    check = trainer.check_health

    def signalled(row: Any, *args: Any) -> None:
        if row["update"] == TINY.run.updates:
            signal.raise_signal(signal.SIGTERM)
        check(row, *args)

    monkeypatch.setattr(trainer, "check_health", signalled)
    with pytest.raises(TrainingStopped, match="stopped after update 6 of 6"):
        run(config, output=tmp_path)
    monkeypatch.setattr(trainer, "check_health", check)
    assert not changed(run(config).backbone, run(config, output=tmp_path, resume=True).backbone)


@pytest.mark.parametrize("mode", ["alternate", pytest.param("after", marks=pytest.mark.slow)])
def test_interrupted_and_resumed_gives_the_same_bits(
    mode: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tuned(when=mode)
    straight = run(config)
    if mode == "alternate":
        step, calls = Alternation.after, []

        def dying(self: Alternation, update: int) -> dict[str, float]:
            calls.append(update)
            if len(calls) == 4:
                raise RuntimeError("killed")
            return step(self, update)

        monkeypatch.setattr(Alternation, "after", dying)
        with pytest.raises(RuntimeError, match="killed"):
            run(config, output=tmp_path)
        monkeypatch.setattr(Alternation, "after", step)
    else:
        run(config, output=tmp_path)
        (tmp_path / "finetune" / "finetuning.safetensors").unlink()
    resumed = run(config, output=tmp_path, resume=True)
    assert not changed(straight.backbone, resumed.backbone)
    assert straight.policy.threshold == resumed.policy.threshold
    actors = [list(result.policy.actor.parameters()) for result in (straight, resumed)]
    assert all(torch.equal(one, two) for one, two in zip(*actors, strict=True))


@dataclass(frozen=True)
class Unpriced:
    """A reward without a price, and without a known equilibrium."""

    paid: PaperReward

    def score(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.paid.score(logits, labels)

    def immediate(self, step: Step) -> torch.Tensor:
        return self.paid.immediate(step)

    def deferred(self, steps: Sequence[Step], score: torch.Tensor) -> torch.Tensor:
        return self.paid.deferred(steps, score)


def test_a_reward_without_a_price_stays_as_it_is() -> None:
    paid = PaperReward(keep_cost=2.0, outcome_bonus=3.0, scaled=False)
    result = run(replace(TINY, finetune=None), reward=Unpriced(paid))
    assert [row["price"] for row in result.history] == [0.0] * TINY.run.updates
    other = run(replace(TINY, finetune=None), reward=Unpriced(PaperReward(keep_cost=2.0, outcome_bonus=3.0)))
    assert result.history[0]["return"] < other.history[0]["return"], "gamma / n is less than gamma N / n"
    assert 0.97 * result.target_macs < result.train_macs <= result.target_macs


def test_the_weights_of_eq_2_follow_the_budget_scaled_or_not() -> None:
    """As printed, the equilibrium is in tokens: the same fraction is kept at a cost N times as small."""
    costs = []
    for scaled in (True, False):
        reward = PaperReward(keep_cost=9.0, outcome_bonus=3.0, scaled=scaled)
        costs.append(run(replace(TINY, finetune=None), reward=reward).history[0]["price"])
    assert costs[0] == pytest.approx(toy(NAME).num_patches * costs[1])
