"""Which budgets methods reach: LTMP all of them on any network; what is out of reach names the range and why."""

from __future__ import annotations

import re
from typing import Any

import pytest

from helpers import everyday, make_model, random_images
from vitprune_env import Backbone, TokenGame, load_backbone
from vitprune_env.baselines import EvoViT, available, calibrate, describe, fit
from vitprune_env.data import Digits, batches_of
from vitprune_env.engine.cost import CostModel
from vitprune_env.errors import BudgetError
from vitprune_env.game.rollout import evaluate
from vitprune_env.types import every_block

LTMPS = [name for name in available() if name.startswith("ltmp")]
SHARES = (0.7, 0.35)


def problem(network: str) -> tuple[Backbone, list[Any]]:
    """The built-in network with digits, or a network with random weights, 12 blocks and 64 tokens, with noise."""
    if network == "digits":
        return load_backbone("vit_digits"), batches_of(Digits("train", 16), 16)
    backbone = Backbone(make_model("deit_tiny_patch16_224", depth=12, patch_size=8), name="deit")
    return backbone, [(random_images(backbone, 8), random_images(backbone, 8)[:, 0, 0, 0].long() * 0)]


def share_of(backbone: Backbone, policy: Any, batches: list[Any], sites: Any = None) -> float:
    game = TokenGame.for_policy(backbone, policy, sites=sites)
    return evaluate(game, policy, batches).macs / game.cost.dense()


@pytest.mark.parametrize("name", everyday(LTMPS, LTMPS[0]))
@pytest.mark.parametrize("network", everyday(["digits", "random weights"], "digits"))
def test_unfitted_thresholds_reach_the_budgets(name: str, network: str) -> None:
    backbone, batches = problem(network)
    dense = CostModel.of(backbone).dense() / 1e9
    for share in SHARES:
        policy = calibrate(name, share * dense, backbone, batches, tolerance=0.01)
        assert share_of(backbone, policy, batches) == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize("network", everyday(["digits", "random weights"], "digits"))
def test_heights_of_ats_reach_the_budgets_on_other_networks(network: str) -> None:
    backbone, batches = problem(network)
    dense = CostModel.of(backbone).dense() / 1e9
    for share in SHARES:
        policy = calibrate("ats", share * dense, backbone, batches, sites=every_block(backbone.depth), tolerance=0.02)
        game = TokenGame.for_policy(backbone, policy, sites=every_block(backbone.depth))
        assert evaluate(game, policy, batches).macs / game.cost.dense() == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize("name", [LTMPS[0], *(pytest.param(name, marks=pytest.mark.slow) for name in LTMPS[1:])])
def test_fitted_thresholds_reach_the_budgets(name: str) -> None:
    backbone, batches = problem("digits")
    dense = CostModel.of(backbone).dense() / 1e9
    config = describe(name).fit_config().quick()
    policy: Any = fit(name, backbone, Digits("train", 48), 0.5 * dense, config=config, progress=False)
    for share in SHARES:
        knob = describe(name).fitted_knob
        moved = calibrate(policy.at, share * dense, backbone, batches, knob=knob, tolerance=0.01)
        assert share_of(backbone, moved, batches) == pytest.approx(share, abs=0.03)


def test_a_late_first_site_is_named_with_the_range() -> None:
    backbone, batches = problem("digits")
    dense = CostModel.of(backbone).dense() / 1e9
    with pytest.raises(BudgetError) as refused:
        calibrate(EvoViT, 0.3 * dense, backbone, batches, "published")
    why = r"up to the first site \(3, of 8 blocks\) all tokens run, which takes (\S+) % alone"
    found = re.search(rf"that is (\S+) to (\S+) % of dense, got 30 %; {why}", str(refused.value))
    assert found is not None
    cheapest, dearest, floor = map(float, found.groups())
    game = TokenGame.for_policy(backbone, EvoViT(0.5), sites="published")
    assert floor == pytest.approx(100 * game.cost.floor(game.sites) / game.cost.dense(), abs=0.05)
    assert floor < cheapest == pytest.approx(100 * share_of(backbone, EvoViT(1e-6), batches, "published"), abs=0.06)
    assert dearest == pytest.approx(100, abs=0.5)


def test_a_budget_above_the_dearest_setting_has_no_reason_in_the_sites() -> None:
    backbone, batches = problem("digits")
    dense = CostModel.of(backbone).dense() / 1e9
    with pytest.raises(BudgetError, match=r"% of dense, got 150 %$"):
        calibrate("evit", 1.5 * dense, backbone, batches)
