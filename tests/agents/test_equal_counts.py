"""A learnt policy with a schedule: every image keeps equally many tokens, the best ones."""

from __future__ import annotations

from math import log
from pathlib import Path
from typing import Any

import pytest
import torch

from games import NAME, OwnLabels
from helpers import toy
from runs import TINY, but
from vitprune_env import PrunedViT
from vitprune_env.agents import (
    AdaptivePolicy,
    BudgetRange,
    Equilibrium,
    GMACs,
    Preset,
    Share,
    TokenActor,
    TokenPolicy,
    TrainResult,
    calibrate_counts,
    calibrate_threshold,
    load_policy,
    save_policy,
    train,
)
from vitprune_env.deploy.export import export_program
from vitprune_env.envs.exits import DropMergeKeep
from vitprune_env.game.rewards import PaperReward
from vitprune_env.game.rollout import play
from vitprune_env.game.token_game import TokenGame

IMAGES = OwnLabels(12).images
GAME = TokenGame(toy(NAME), (1, 2, 3))
N = GAME.backbone.num_patches
SCHEDULE = (0.75, 0.5, 0.25)


def run(config: Preset, **options: Any) -> TrainResult:
    return train(toy(NAME), OwnLabels(48), progress=False, **{**config.arguments, **options})


@pytest.fixture
def actor() -> TokenActor:
    torch.manual_seed(0)
    return TokenActor(48, (8,), keep_bias=0.0)


def test_every_image_keeps_its_best_tokens(actor: TokenActor) -> None:
    policy = TokenPolicy(actor, schedule=SCHEDULE)
    seen: list[Any] = []
    decide = policy.decide
    policy.decide = lambda obs: seen.append((obs, decide(obs))) or seen[-1][1]  # type: ignore[method-assign]
    outcome = play(GAME, policy, IMAGES).outcome
    assert outcome.n_kept.tolist() == [[round(share * N) for share in SCHEDULE]] * len(IMAGES)
    for obs, decision in seen:
        scores = actor.keep_logit(obs.tokens)
        for image in range(len(IMAGES)):
            own, stays = scores[obs.image == image], obs.gather(decision.keep)[obs.image == image]
            assert own[stays].min() >= own[~stays].max()


def test_the_threshold_scales_the_schedule(actor: TokenActor) -> None:
    """Divided by exp(threshold); never fewer than one token, never more than are left."""
    policy = TokenPolicy(actor, schedule=SCHEDULE)
    for threshold, counts in ((log(2), [0.375, 0.25, 0.125]), (-log(2), [1.0, 1.0, 0.5]), (40.0, [1 / N] * 3)):
        kept = play(GAME, policy.with_threshold(threshold), IMAGES[:2]).outcome.n_kept[0]
        assert kept.tolist() == [round(share * N) for share in counts]


def test_a_budget_is_met_with_the_shares_of_the_threshold(actor: TokenActor) -> None:
    target = 0.6 * GAME.cost.dense()
    above = calibrate_threshold(GAME, TokenPolicy(actor), [IMAGES], target)
    alike = calibrate_counts(GAME, above, [IMAGES], target)
    means = play(GAME, above, IMAGES).outcome.n_kept.double().mean(dim=0) / N
    assert alike.schedule == pytest.approx(means.tolist())
    macs = play(GAME, alike, IMAGES).outcome.macs
    assert macs.unique().numel() == 1  # every image costs the same
    assert 0.93 * target < float(macs[0]) <= target  # one token more, of 16, is a step of several per cent
    half = calibrate_threshold(GAME, alike, [IMAGES], 0.5 * GAME.cost.dense())
    assert half.schedule == alike.schedule
    assert half.threshold > alike.threshold


def test_it_is_saved_and_shown(actor: TokenActor, tmp_path: Path) -> None:
    policy = TokenPolicy(actor, 0.1, sites=(1, 2, 3), schedule=SCHEDULE)
    again = load_policy(save_policy(policy, tmp_path / "policy.safetensors"))
    assert (again.schedule, again.threshold) == (SCHEDULE, 0.1)
    assert torch.equal(play(GAME, again, IMAGES).keep, play(GAME, policy, IMAGES).keep)
    assert "schedule=(0.75, 0.5, 0.25)" in repr(policy)
    assert "schedule" not in TokenPolicy(actor).config()
    assert policy.with_schedule(None).schedule is policy.sampling().schedule is None
    assert torch.equal(policy.starting_actor().last.bias, actor.last.bias)  # its threshold is not in logits


def test_it_is_exported_for_any_batch_size(actor: TokenActor) -> None:
    model = PrunedViT(toy(NAME), TokenPolicy(actor, sites=(1, 2, 3), schedule=SCHEDULE)).eval()
    program = export_program(model).module()
    for images in (IMAGES[:1], IMAGES[:5]):
        torch.testing.assert_close(program(images), model(images))


def test_training_deploys_it_and_learns_the_same() -> None:
    plain = run(but(TINY, budget=Share(0.6), updates=2))
    result = run(but(TINY, budget=Share(0.6, fixed_counts=True), updates=2))
    weights = zip(result.policy.actor.parameters(), plain.policy.actor.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in weights)
    macs = play(TokenGame.for_policy(toy(NAME), result.policy), result.policy, IMAGES).outcome.macs
    assert macs.unique().numel() == 1
    assert 0.9 * result.target_macs < float(macs[0]) <= result.target_macs
    paid = PaperReward(keep_cost=4.0, outcome_bonus=2.0)
    free = run(but(TINY, budget=Equilibrium(fixed_counts=True), reward=paid, updates=1)).policy
    assert free.schedule is not None


@pytest.mark.parametrize(
    ("schedule", "settings", "message"),
    [
        ((), {}, "schedule: expected shares of the tokens"),
        ((0.5, 1.5, 0.2), {}, "schedule: expected shares of the tokens"),
        ((0.5, float("nan"), 0.2), {}, "schedule: expected shares of the tokens"),
        ((0.5,), {"sites": (1, 2)}, "schedule: expected 2 shares, one for each site, got 1"),
        (SCHEDULE, {"seed": 1}, "schedule: expected None unless .* got seed 1"),
    ],
)
def test_what_is_no_schedule_is_refused(
    actor: TokenActor, schedule: tuple[float, ...], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        TokenPolicy(actor, schedule=schedule, **settings)


def test_a_schedule_is_as_long_as_the_game(actor: TokenActor) -> None:
    with pytest.raises(ValueError, match="schedule: expected a share for site number 3"):
        play(GAME, TokenPolicy(actor, schedule=(0.5, 0.4)), IMAGES[:1])


def test_where_counts_cannot_be_equal_is_said_before_training() -> None:
    with pytest.raises(ValueError, match="fixed_counts: expected False where actions are drawn"):
        GMACs(0.01, fixed_counts=True, sampled=True)
    with pytest.raises(ValueError, match="fixed_counts: expected False for an adaptive policy"):
        BudgetRange(0.4, 0.8, fixed_counts=True)
    with pytest.raises(ValueError, match=r"fixed_counts: expected False unless .* drop_merge_keep"):
        run(but(TINY, budget=Share(0.6, fixed_counts=True)), actions=DropMergeKeep())
    adaptive = AdaptivePolicy(TokenActor(49, (4,)), (0.4, 0.8), (0.0, 0.0), 0.5)
    with pytest.raises(ValueError, match="schedule: expected None for an adaptive policy"):
        adaptive.with_schedule(SCHEDULE)
