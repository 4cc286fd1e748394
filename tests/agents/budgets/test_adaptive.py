"""One policy for any budget: what it sees, prices per budget, training, calibration, files."""

from __future__ import annotations

from dataclasses import replace
from math import exp
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import runs
from games import NAME, OwnLabels
from helpers import random_images, toy
from runs import but
from vitprune_env import PaperReward, PrunedViT, TeamOutcome
from vitprune_env.agents import BudgetRange, FinetuneConfig, PPOSingleConfig, Preset, TrainResult, load_policy, train
from vitprune_env.agents.budgets.adaptive import (
    KNOTS,
    AdaptivePolicy,
    AdaptivePrice,
    interpolate,
    see_budget,
    spaced,
)
from vitprune_env.agents.networks import TokenActor
from vitprune_env.agents.shared.processes import Processes
from vitprune_env.errors import BudgetError
from vitprune_env.game.rewards import SharedOutcome
from vitprune_env.game.rollout import play
from vitprune_env.game.token_game import TokenGame

TINY = but(runs.TINY, budget=BudgetRange(0.45, 0.8, anneal_from=0.7), updates=4)
DATA = OwnLabels(48)


def run(config: Preset = TINY, **options: Any) -> TrainResult:
    return train(toy(NAME), DATA, **config.arguments, progress=False, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adaptive")


@pytest.fixture(scope="module")
def whole(folder: Path) -> TrainResult:
    """An uninterrupted run, written to the folder."""
    return run(output=folder)


@given(scale=st.floats(0.1, 50), shift=st.floats(-5, 5), share=st.floats(0.2, 0.8))
def test_the_budget_comes_out_of_the_normalisation_whatever_the_tokens_scale(
    scale: float, shift: float, share: float
) -> None:
    game = TokenGame(toy(NAME))
    obs = game.reset(random_images(toy(NAME), 2))
    moved = replace(obs, tokens=obs.tokens * scale + shift)
    seen = see_budget(moved, torch.tensor([share, 0.8]), 0.2, 0.8)
    normal = torch.nn.functional.layer_norm(seen.tokens, seen.tokens.shape[-1:])
    width = obs.tokens.shape[1]
    for image, budget in ((0, share), (1, 0.8)):
        rows = seen.image == image
        coded = 2 * (2 * (budget - 0.2) / 0.6 - 1)
        # mean and variance of D features of mean 0 and variance 1, and of the coded one
        mean = coded / (width + 1)
        variance = (width + coded**2) / (width + 1) - mean**2
        expected = torch.full((int(rows.sum()),), (coded - mean) / variance**0.5)
        torch.testing.assert_close(normal[rows, -1], expected, atol=2e-3, rtol=2e-3)
    assert seen.cls.shape == (2, width + 1)


@pytest.mark.parametrize("high", [0.21, 0.23, 0.88, 0.92])
def test_the_ends_of_the_range_are_budgets_of_it(high: float) -> None:
    shares = spaced(0.05, high)
    assert (shares[0], shares[-1]) == (0.05, high)
    assert AdaptivePolicy(TokenActor(5), shares, [0.0] * KNOTS).at(high).share == high


def test_a_range_that_begins_too_low_is_refused_before_training() -> None:
    with pytest.raises(BudgetError, match=r"adaptive: .* budget: expected above"):
        run(but(TINY, budget=BudgetRange(0.01, 0.8)))


def test_interpolation_by_hand() -> None:
    at = torch.tensor([0.0, 0.2, 0.3, 0.45, 0.6, 0.9])
    found = interpolate(at, (0.2, 0.4, 0.6), (1.0, 3.0, 0.0))
    torch.testing.assert_close(found, torch.tensor([1, 1, 2, 2.25, 0, 0], dtype=torch.float64))


def test_prices_answer_where_images_cost_too_much() -> None:
    price = AdaptivePrice(SharedOutcome(0.1), 0.2, 0.7, 64, torch.Generator().manual_seed(1), 0.2, 2.0, Processes())
    reward = price.reward(0.45)
    assert isinstance(reward, SharedOutcome)
    torch.testing.assert_close(reward.price, torch.full((64,), 0.1))
    assert price.shares.min() > 0.2
    assert price.shares.max() < 0.7
    knots = torch.tensor(spaced(0.2, 0.7))
    nearest = (price.shares[:, None] - knots).abs().argmin(dim=1)
    price.observe(0.4, 0.9, 0.45, torch.where(nearest == 0, price.shares * 1.5, price.shares))
    state = price.state()
    assert state["duals"] == pytest.approx([0.1 * exp(0.2 * 0.5), *[0.1] * (KNOTS - 1)], rel=1e-4)
    assert state["prices"] == pytest.approx([0.1 * exp(0.2 * 0.5) * exp(2 * 0.5), *[0.1] * (KNOTS - 1)], rel=1e-4)
    price.observe(0.65, 0.9, 0.65, price.shares + 0.2)  # as far as the mean target is still away
    assert price.state()["prices"][1:] == pytest.approx([0.1] * (KNOTS - 1), rel=1e-4)


def test_processes_get_their_part_of_the_budgets() -> None:
    shares = []
    for rank in range(2):
        generator = torch.Generator().manual_seed(1)
        price = AdaptivePrice(SharedOutcome(), 0.2, 0.7, 7, generator, 0.2, 2.0, Processes(rank, 2))
        price.reward(0.45)
        shares.append(price.shares)
    assert [len(part) for part in shares] == [3, 4]
    assert len(torch.cat(shares).unique()) == 7


def test_every_budget_of_the_range_is_met(whole: TrainResult) -> None:
    policy = whole.policy
    assert isinstance(policy, AdaptivePolicy)
    images, _ = DATA.batch(range(48))
    dense = TokenGame(toy(NAME)).cost.dense()
    for share in (*spaced(0.45, 0.8), 0.5, 0.66):
        now = policy.at(share)
        met = play(TokenGame.for_policy(toy(NAME), now), now, images).outcome.macs.mean() / dense
        assert float(met) == pytest.approx(share, rel=0.06)
    for wrong in (0.4, 0.85):
        with pytest.raises(ValueError, match="share"):
            policy.at(wrong)


def test_files_and_deployment(whole: TrainResult, folder: Path) -> None:
    policy = whole.policy
    loaded = load_policy(folder / "policy.safetensors")
    assert isinstance(loaded, AdaptivePolicy)
    assert loaded.width == toy(NAME).embed_dim
    images = random_images(toy(NAME), 4)
    model = PrunedViT(toy(NAME), loaded.at(0.6))
    expected = PrunedViT(toy(NAME), policy.at(0.6))(images)  # type: ignore[attr-defined]
    torch.testing.assert_close(model(images), expected)


def test_interrupted_and_resumed_gives_the_same_bits(
    whole: TrainResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    observe, calls = AdaptivePrice.observe, []

    def dying(self: AdaptivePrice, *args: float) -> None:
        calls.append(args)
        if len(calls) == 4:
            raise RuntimeError("killed")
        observe(self, *args)

    monkeypatch.setattr(AdaptivePrice, "observe", dying)
    with pytest.raises(RuntimeError, match="killed"):
        run(output=tmp_path)
    resumed = run(output=tmp_path, resume=True)
    assert [row["price"] for row in whole.history] == [row["price"] for row in resumed.history]
    assert whole.policy.thresholds == resumed.policy.thresholds  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "wrong",
    [
        {"budget": (0.5, 0.5)},
        {"budget": (0.6, 0.3)},
        {"budget": (0.3, 1.2)},
        {"learner": PPOSingleConfig(), "reward": TeamOutcome()},
        {"reward": PaperReward()},
        {"finetune": FinetuneConfig()},
    ],
)
def test_settings_that_do_not_fit_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="adaptive"):
        run(but(TINY, **{name: BudgetRange(*value) if name == "budget" else value for name, value in wrong.items()}))
