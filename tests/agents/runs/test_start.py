"""Training that goes on from a policy: one that drops (MAPPO), or one that merges (PGPE)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer import DATA, assert_same, run

from games import NAME
from helpers import toy
from merging import random_merging
from runs import TINY, but
from vitprune_env import load_policy
from vitprune_env.agents import (
    PGPE,
    BudgetRange,
    FinetuneConfig,
    MergePolicy,
    PairActor,
    PGPEConfig,
    Preset,
    RunConfig,
    Share,
    TokenActor,
    TokenPolicy,
)
from vitprune_env.agents.shared.processes import Processes
from vitprune_env.agents.shared.training_images import TrainingImages
from vitprune_env.envs.actions import MergeActions
from vitprune_env.errors import CheckpointError
from vitprune_env.game.token_game import TokenGame

MERGING = Preset(
    budget=Share(0.6),
    learner=PGPEConfig(),
    run=RunConfig(updates=4, images=8, cache_images=24, calibration_images=24, checkpoint_every=2),
)
START = random_merging(toy(NAME))
DROPPING = TokenPolicy(TokenActor(48, (8,)), threshold=0.5, sites=("1", "2", "3"))


def test_playing_raises_the_return_and_meets_the_budget(tmp_path: Path) -> None:
    config = but(MERGING, updates=8, images=24, lr=0.1, price_rate=0.0, price_gain=0.0)
    result = run(config, start=START, output=tmp_path)
    returns = [row["return"] for row in result.history]
    assert sum(returns[-3:]) > sum(returns[:3])
    assert [row["target_share"] for row in result.history] == [0.6] * 8
    assert 0.95 * result.target_macs < result.train_macs <= result.target_macs
    loaded = load_policy(tmp_path / "policy.safetensors")
    assert isinstance(loaded, MergePolicy)
    assert loaded.config() == result.policy.config()
    assert loaded.info["algorithm"] == "PGPE"


def test_resumed_equals_uninterrupted_and_belongs_to_its_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, calls = run(MERGING, start=START), []
    update = PGPE.update

    def cut(self: PGPE, *args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:  # after the checkpoint of update 2, in the middle of what follows it
            raise KeyboardInterrupt
        return update(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(PGPE, "update", cut)
        with pytest.raises(KeyboardInterrupt):
            run(MERGING, start=START, output=tmp_path)
    for other in (random_merging(toy(NAME), seed=1), START.with_threshold(0.1)):
        with pytest.raises(CheckpointError, match="got one with other start"):
            run(MERGING, start=other, output=tmp_path, resume=True)
    assert_same(whole, run(MERGING, start=START, output=tmp_path, resume=True))


def test_mappo_goes_on_from_a_policy_that_drops() -> None:
    """The threshold joins the bias: where it was exceeded, keeping is the more probable action."""
    tokens = torch.randn(20, 48, generator=torch.Generator().manual_seed(0))
    actor = TINY.learner.build(48, 25, 6, MergeActions(), torch.Generator(), DROPPING).actor
    torch.testing.assert_close(actor.keep_logit(tokens), DROPPING.actor.keep_logit(tokens) - 0.5)
    first = run(TINY)
    again = run(but(TINY, updates=1, sites=None, lr=1e-6), start=first.policy)
    assert again.history[0]["share"] == pytest.approx(0.5, abs=0.1)
    assert again.history[0]["target_share"] == 0.5
    assert again.policy.sites == first.policy.sites
    assert again.policy.threshold == pytest.approx(0, abs=0.1)


def test_the_policy_acts_where_it_was_trained() -> None:
    start = random_merging(toy(NAME), (1, 2, 3))
    result = run(but(MERGING, updates=1, budget=Share(0.8), sites=("1.attn", 2, 4)), start=start)
    assert [site.label for site in result.policy.sites] == ["1.attn", "2", "4"]


def test_the_network_learns_from_what_merging_leaves() -> None:
    config = but(MERGING, updates=1, finetune=FinetuneConfig(when="after", steps=2, batch_size=4, cache_images=24))
    result = run(config, start=START)
    assert result.policy.info["finetune"] == "after"
    assert result.backbone is not toy(NAME)
    moved = zip(result.backbone.parameters(), toy(NAME).parameters(), strict=True)
    assert any(not torch.equal(one, other) for one, other in moved)


@pytest.mark.parametrize(
    ("changes", "start", "message"),
    [
        ({}, None, "start: expected a MergePolicy, .* for PGPE, got None"),
        ({}, DROPPING, "start: expected a MergePolicy, .* for PGPE, got TokenPolicy"),
        ({"learner": TINY.learner}, START, "start: expected a TokenPolicy or None, got MergePolicy"),
        ({"learner": TINY.learner}, "distilled", "start: expected a TokenPolicy or None, got 'distilled'"),
        ({}, MergePolicy(PairActor(4, 64)), "start: expected a policy of width 48, got 64"),
        ({"images": 7}, START, "images: expected a multiple of 2, .*, got 7"),
        ({"sampled": True}, START, "sampled: expected False"),
        ({"finetune": FinetuneConfig(when="alternate")}, START, "finetune: expected after or none .* got alternate"),
        ({"learner": TINY.learner, "budget": BudgetRange(0.4, 0.8)}, DROPPING, "start: expected None with BudgetRange"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(changes: dict[str, Any], start: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(but(MERGING, **changes), start=start)


def test_other_actions_than_those_of_the_start_are_refused() -> None:
    for config, start in ((TINY, DROPPING), (MERGING, START)):
        with pytest.raises(ValueError, match=r"actions: expected keep.*, got merge"):
            run(replace(config, sites=None), start=start, actions=MergeActions())


def test_images_are_drawn_several_times_in_a_row() -> None:
    """Over processes as in one; every image comes once before any comes again."""
    game = TokenGame(toy(NAME), (1,))

    def drawn(rank: int, size: int) -> list[torch.Tensor]:
        images = TrainingImages(DATA, game, 0, torch.Generator().manual_seed(0), processes=Processes(rank, size))
        return [images.draw(6, times=2)[0] for _ in range(2)]  # pyright: ignore[reportReturnType]

    one = drawn(0, 1)
    for update in range(2):
        assert torch.equal(one[update][0::2], one[update][1::2])
        assert torch.equal(torch.cat([drawn(rank, 4)[update] for rank in range(4)]), one[update])
    assert len(torch.cat(one).unique(dim=0)) == 6
