"""Budgets, prices, the detector of collapses, and the calibrated threshold."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from games import NAME, OwnLabels
from helpers import toy
from vitprune_env.agents import (
    Budget,
    BudgetRange,
    FinetuneConfig,
    GMACs,
    KeepRate,
    LightNetworks,
    MAPPOConfig,
    RunConfig,
    Share,
)
from vitprune_env.agents.budgets.calibration import calibrate_threshold
from vitprune_env.agents.budgets.prices import CollapseDetector, CollapseWarning, DualPrice, FedForwardKeepCost
from vitprune_env.agents.budgets.targets import PolicyCost, annealed
from vitprune_env.agents.networks import TokenActor
from vitprune_env.agents.policies import TokenPolicy
from vitprune_env.baselines import RandomDrop
from vitprune_env.engine.cost import CostModel
from vitprune_env.errors import BudgetError
from vitprune_env.game.rewards import PaperReward, SharedOutcome
from vitprune_env.game.rollout import play
from vitprune_env.game.token_game import TokenGame
from vitprune_env.types import Site

SITES = [Site.parse(site) for site in (1, 2, 3)]


def cost(macs_per_token: int = 0) -> PolicyCost:
    """4 blocks in which a row costs 10 + 5 and pairs nothing; one prefix token, 8 patches, embedding 7, head 3."""
    model = CostModel(7, 3, (10,) * 4, (0,) * 4, (5,) * 4, num_prefix=1, num_patches=8)
    return PolicyCost(model, SITES, macs_per_token)


def test_cost_of_a_pass_with_its_policy_by_hand() -> None:
    # rows 9, 5, 3, 2 in the four blocks; the policy looks at 8, 4 and 2 tokens
    assert cost().of(torch.tensor([[4, 2, 1]])).tolist() == [10 + 15 * (9 + 5 + 3 + 2)]
    assert cost(100).of(torch.tensor([[4, 2, 1]])).tolist() == [10 + 15 * 19 + 100 * 14]
    assert cost(100).at_keep_rate(0.5) == 10 + 15 * 19 + 100 * 14
    assert cost(100).at_fraction(0.25) == 10 + 15 * (9 + 3 * 3) + 100 * (8 + 2 + 2)
    assert cost(100).fraction_for(cost(100).at_fraction(0.25)) == pytest.approx(0.25)
    assert cost(100).floor == 10 + 15 * (9 + 3) + 800


def target(budget: Budget, cost: PolicyCost) -> float:
    return budget.target(cost, SharedOutcome())


def test_three_ways_to_say_a_budget() -> None:
    dense = 10 + 15 * 4 * 9
    assert target(Share(0.5), cost()) == dense / 2
    assert target(GMACs(300e-9), cost()) == pytest.approx(300)
    assert target(KeepRate(0.5), cost()) == 295
    assert target(KeepRate(1.0), cost(1)) == dense


def test_a_keep_rate_is_what_random_pruning_at_that_rate_costs() -> None:
    game = TokenGame(toy("golden"), (3, 6, 9))
    outcome = play(game, RandomDrop(0.5), OwnLabels(1, "golden").images).outcome
    assert outcome.n_kept.tolist() == [[32, 16, 8]]
    assert target(KeepRate(0.5), PolicyCost(game.cost, game.sites, 0)) == outcome.macs.item()


def test_budgets_that_cannot_be_met_are_refused() -> None:
    for bad in (Share(1.1), GMACs(100e-9), Share(0.0), GMACs(-1.0)):
        with pytest.raises(BudgetError, match="budget: expected above"):
            target(bad, cost())
    with pytest.raises(BudgetError, match=r"expected above 9\.9e-07 GMACs"):  # the policy alone is too dear
        target(Share(0.5), cost(100))


@pytest.mark.parametrize(
    ("make", "wrong"),
    [
        (KeepRate, {"keep": 1.5}),
        (Share, {"share": 0.5, "price_rate": -1.0}),
        (Share, {"share": "half"}),
        (GMACs, {"gmacs": None}),
        (BudgetRange, {"low": "0.2"}),
        (MAPPOConfig, {"lr": "fast"}),
        (MAPPOConfig, {"epochs": 1.5}),
        (MAPPOConfig, {"minibatch": 0.5}),
        (MAPPOConfig, {"value_norm": 1}),
        (MAPPOConfig, {"entropy": -0.01}),
        (MAPPOConfig, {"value_coef": -1.0}),
        (RunConfig, {"seed": True}),
        (FinetuneConfig, {"max_grad_norm": -1.0}),
        (LightNetworks, {"critic_hidden": (64, 0)}),
    ],
)
def test_settings_are_refused_by_name(make: Any, wrong: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{list(wrong)[-1]}: expected "):
        make(**wrong)


def test_target_falls_linearly_and_then_stays() -> None:
    path = [annealed(update, 8, target=0.3, start=0.7, part=0.5) for update in range(8)]
    assert path == pytest.approx([0.7, 0.6, 0.5, 0.4, 0.3, 0.3, 0.3, 0.3])
    assert annealed(0, 8, target=0.8, start=0.7, part=0.5) == 0.8
    assert annealed(0, 8, target=0.3, start=0.7, part=0.0) == 0.7
    assert annealed(1, 8, target=0.3, start=0.7, part=0.0) == 0.3


def test_price_rises_while_play_is_too_dear() -> None:
    schedule = DualPrice(SharedOutcome(price=0.04), rate=0.5, gain=2.0)
    schedule.observe(share=0.45, accuracy=1.0, target=0.3)
    assert schedule.price == pytest.approx(0.04 * 3.49034, rel=1e-4)  # exp((.5 + 2) * (.45 / .3 - 1))
    reward = schedule.reward(0.3)
    assert isinstance(reward, SharedOutcome)
    assert reward.price == schedule.price
    schedule.observe(share=0.3, accuracy=1.0, target=0.3)
    assert schedule.price == pytest.approx(0.04 * 1.28403, rel=1e-4)  # what the excess has left behind
    schedule.observe(share=0.15, accuracy=1.0, target=0.3)
    schedule.observe(share=0.3, accuracy=1.0, target=0.3)
    assert schedule.price == pytest.approx(0.04)


def test_price_stays_between_nothing_and_the_whole_outcome() -> None:
    schedule = DualPrice(SharedOutcome(), rate=0.5, gain=0.0)
    for _ in range(100):
        schedule.observe(share=0.9, accuracy=0.0, target=0.3)
    assert schedule.price == 1.0
    for _ in range(100):
        schedule.observe(share=0.0, accuracy=0.0, target=0.3)
    assert 0 < schedule.price < 1e-6


def test_keep_cost_is_fed_forward_from_the_equilibrium() -> None:
    schedule = FedForwardKeepCost(PaperReward(outcome_bonus=2.0), cost(), accuracy=0.9, smoothing=0.5)
    target = cost().at_fraction(0.25) / cost().model.dense()
    reward = schedule.reward(target)
    assert isinstance(reward, PaperReward)
    assert reward.keep_cost == pytest.approx(2.0 * 0.9 / 0.25)
    schedule.observe(share=0.5, accuracy=0.5, target=target)
    schedule.reward(target)
    assert schedule.price == pytest.approx(2.0 * 0.7 / 0.25)


def test_a_target_that_leaves_nothing_still_pays_for_one_token() -> None:
    schedule = FedForwardKeepCost(PaperReward(outcome_bonus=2.0), cost(), accuracy=0.9)
    schedule.reward(cost().floor / cost().model.dense())
    assert schedule.price == pytest.approx(2.0 * 0.9 * 8)


def test_at_that_keep_cost_a_token_earns_nothing_on_average() -> None:
    """Keep and prune pay the same where the fraction kept is the target's: the equilibrium."""
    schedule = FedForwardKeepCost(PaperReward(), cost(), accuracy=0.8)
    reward = schedule.reward(cost().at_fraction(0.5) / cost().model.dense())
    assert isinstance(reward, PaperReward)
    kept, accuracy = 4, 0.8
    gain = reward.outcome_bonus * accuracy * 8 / kept - reward.keep_cost
    assert gain == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("schedule", ["dual", "fed"])
def test_schedules_go_on_from_their_state(schedule: str) -> None:
    def make() -> DualPrice | FedForwardKeepCost:
        return DualPrice(SharedOutcome(), 0.1, 2.0) if schedule == "dual" else FedForwardKeepCost(PaperReward(), cost())

    one, two = make(), make()
    one.observe(0.9, 0.2, 0.4)
    assert one.reward(0.6) != two.reward(0.6)
    two.restore(one.state())
    assert one.reward(0.6) == two.reward(0.6)


def test_a_collapse_is_reported_once() -> None:
    detector = CollapseDetector(patience=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kept in (0.0, 0.0, 0.3, 0.01, 0.0):
            assert not detector.observe(kept, 0.0, 0.3, 0.1)
    with pytest.warns(CollapseWarning, match="pruned nearly every token for 3 updates .accuracy 10.0%"):
        assert detector.observe(0.0, 0.0, 0.3, 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert detector.observe(0.0, 0.0, 0.3, 0.1)
    assert not detector.observe(0.3, 0.0, 0.3, 0.1)
    for _ in range(2):
        assert not detector.observe(1.0, 1.0, 0.3, 0.9)
    with pytest.warns(CollapseWarning, match="kept every token"):
        assert detector.observe(1.0, 1.0, 0.3, 0.9)


def untrained(sharpness: float) -> TokenPolicy:
    actor = TokenActor(48, (16,), keep_bias=0.0)
    with torch.no_grad():
        actor.layers[-1].weight.mul_(sharpness)  # pyright: ignore
    return TokenPolicy(actor, sites=(1, 2, 3))


@pytest.mark.parametrize("sharpness", [1.0, 100.0])
@pytest.mark.parametrize("share", [0.5, 0.75])
def test_calibrated_policy_meets_its_budget(sharpness: float, share: float) -> None:
    policy = untrained(sharpness)
    game = TokenGame.for_policy(toy(NAME), policy)
    images = OwnLabels(64).images
    target = share * game.cost.dense()
    calibrated = calibrate_threshold(game, policy, [images[:40], images[40:]], target)
    macs = play(game, calibrated, images).outcome.macs.mean().item()
    assert 0.999 * target <= macs <= target
    assert calibrated.actor is policy.actor
    assert calibrated.sites == policy.sites


def test_what_calibration_refuses() -> None:
    policy = untrained(1.0)
    game = TokenGame.for_policy(toy(NAME), policy)
    images = OwnLabels(4).images
    with pytest.raises(BudgetError, match="target_macs: expected at least"):
        calibrate_threshold(game, policy, [images], 0.2 * game.cost.dense())
    with pytest.raises(ValueError, match="at least one batch"):
        calibrate_threshold(game, policy, [], game.cost.dense())
    with pytest.raises(ValueError, match="at least 20"):
        calibrate_threshold(game, policy, [images], game.cost.dense(), steps=5)


def scaled_policy(scale: float, shift: float = 0.0) -> TokenPolicy:
    """A policy whose log-odds of keeping are this many times those of a fresh actor, and shifted."""
    policy = untrained(scale)
    with torch.no_grad():
        policy.actor.last.bias[-1] += shift
    return policy


def test_thresholds_far_out_are_found(caplog: pytest.LogCaptureFixture) -> None:
    """Logits of training that ran away, which no threshold from -40 to 40 divides."""
    backbone = toy(NAME)
    game, images = TokenGame(backbone, (1, 2, 3)), OwnLabels(32).images
    target = 0.7 * game.cost.dense()
    usual = calibrate_threshold(game, scaled_policy(1.0), [images], target)
    macs = play(game, usual, images).outcome.macs.mean()
    for policy in (scaled_policy(1.0, shift=500.0), scaled_policy(1.0, shift=-500.0)):
        found = calibrate_threshold(game, policy, [images], target)
        assert abs(found.threshold) > 400
        torch.testing.assert_close(play(game, found, images).outcome.macs.mean(), macs, rtol=5e-3, atol=0)
    assert not caplog.records


def test_what_cannot_be_calibrated_is_said(caplog: pytest.LogCaptureFixture) -> None:
    backbone = toy(NAME)
    game, images = TokenGame(backbone, (1, 2, 3)), OwnLabels(32).images
    target = 0.7 * game.cost.dense()
    for scale in (0.0, float("nan")):  # all tokens alike, and none a number
        caplog.clear()
        calibrate_threshold(game, scaled_policy(scale), [images], target)
        assert "no threshold comes closer" in caplog.text
    for wrong in ({"target_macs": float("nan")}, {"tolerance": 1.0}, {"tolerance": float("nan")}):
        given: dict[str, Any] = {"target_macs": target, **wrong}
        with pytest.raises(ValueError, match=next(iter(wrong))):
            calibrate_threshold(game, scaled_policy(1.0), [images], **given)
    with pytest.raises(ValueError, match="threshold: expected a number"):
        scaled_policy(1.0).with_threshold(float("nan"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_settings_are_finite_numbers(value: float) -> None:
    for kind, name in (
        (MAPPOConfig, "lr"),
        (MAPPOConfig, "entropy"),
        (FinetuneConfig, "weight_decay"),
        (Share, "price_rate"),
    ):
        with pytest.raises(ValueError, match=name):
            kind(**{name: value})
    with pytest.raises(ValueError, match="min_lr"):
        FinetuneConfig(lr=1e-5, min_lr=1e-4)
