"""The budget controller in a training loop of one's own, and a user's reward that follows a budget in `train`."""

from __future__ import annotations

import doctest

import pytest
import torch

from games import NAME, OwnLabels
from helpers import toy
from runs import TINY, but
from vitprune_env.agents import (
    BudgetRange,
    Equilibrium,
    GMACs,
    KeepRate,
    Share,
    TokenActor,
    TokenPolicy,
    budgets,
    train,
)
from vitprune_env.agents.learners.exploration import ExploringPolicy
from vitprune_env.examples.custom_reward import Confidence
from vitprune_env.game.rewards import PaperReward, SharedOutcome
from vitprune_env.game.rollout import play
from vitprune_env.game.token_game import TokenGame

DATA = OwnLabels(32)


def test_the_documented_loop_runs() -> None:
    assert doctest.testmod(budgets, raise_on_error=True).attempted > 10


def game_and_actor() -> tuple[TokenGame, TokenActor]:
    return TokenGame(toy(NAME), (1, 2, 3)), TokenActor(48, (8,))


@pytest.mark.parametrize("budget", [Share(0.5), GMACs(0.0012), KeepRate(0.7), Equilibrium(), BudgetRange(0.45, 0.8)])
def test_every_budget_leads_a_loop_of_ones_own(budget: Share) -> None:
    game, actor = game_and_actor()
    reward = PaperReward(keep_cost=2.0) if isinstance(budget, Equilibrium) else SharedOutcome(0.02)
    actor = TokenActor(48 + budget.extra_features, (8,))
    make = {"updates": 4, "reward": reward, "macs_per_token": actor.macs_per_token, "images": 32}
    controller, twin = budget.controller(game, **make), budget.controller(game, **make)
    explorer = ExploringPolicy(actor, torch.Generator().manual_seed(0), view=controller.schedule.view)
    prices = []
    for _ in range(4):
        game.reward = controller.reward()
        row = controller.observe(play(game, explorer, DATA.images, DATA.labels).outcome)
        prices.append(row["price"])
        assert set(row) == {"accuracy", "gmacs", "share", "target_share", "price", "collapsed"}
    assert len(set(prices)) > 1
    controller.collapse.streak = 3  # as after three collapsed updates in a row
    twin.restore(controller.state())
    assert twin.collapse.streak == 3
    assert (twin.target_share, twin.state()) == (controller.target_share, controller.state())
    policy = controller.calibrate(budget.greedy(actor, game.sites, explorer.kind), [DATA.images])
    macs = float(play(game, policy, DATA.images).outcome.macs.mean())
    if not isinstance(budget, Equilibrium):
        assert 0.9 * controller.target < macs <= 1.001 * controller.target


def test_a_reward_without_equilibrium_needs_a_budget() -> None:
    with pytest.raises(ValueError, match="budget: expected one, such as"):
        Equilibrium().controller(game_and_actor()[0], updates=2, reward=SharedOutcome())


def test_calibration_takes_any_policy_with_a_threshold() -> None:
    game, actor = game_and_actor()
    controller = Share(0.6).controller(game, updates=1, macs_per_token=actor.macs_per_token)
    policy = controller.calibrate(TokenPolicy(actor), [game.prepare(DATA.images)])
    assert float(play(game, policy, DATA.images).outcome.macs.mean()) <= controller.target


def test_a_users_reward_follows_the_budget_and_the_target_is_met() -> None:
    config = but(TINY, updates=8, reward=Confidence(), price_rate=0.5, anneal_part=0.0)
    result = train(toy(NAME), DATA, **config.arguments, progress=False)
    prices = [row["price"] for row in result.history]
    assert prices[0] == 0.01
    assert len(set(prices)) == len(prices)
    excess = [row["share"] > row["target_share"] for row in result.history[:1]]
    assert [later > now for now, later in zip(prices, prices[1:2], strict=False)] == excess
    assert 0.95 * result.target_macs < result.train_macs <= result.target_macs
