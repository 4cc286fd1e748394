"""Closed-form MACs against hand-made ones (published: test_published_gmacs.py); budgets."""

from __future__ import annotations

from functools import cache

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import TIMM_MODELS, make_model, toy
from vitprune_env.engine.backbone import Backbone
from vitprune_env.engine.cost import CostModel, check_budget, mlp_macs
from vitprune_env.errors import BudgetError
from vitprune_env.types import Site, parse_sites


@cache
def deit(size: str) -> CostModel:
    """DeiT-T, -S or -B without weights."""
    with torch.device("meta"):
        return CostModel.of(Backbone(timm.create_model(f"deit_{size}_patch16_224")))


def test_dense_deits() -> None:
    assert deit("small").dense() == 4_598_882_304
    assert deit("tiny").dense() / 1e9 == pytest.approx(1.254, abs=5e-4)
    assert deit("base").dense() / 1e9 == pytest.approx(17.564, abs=5e-4)


def test_ragged_schedule_of_the_specification() -> None:
    """197, 139, 98 and 69 rows; counted once with the flop counter: 5.79069696 GFLOPs = 2 x MACs, after-block sites."""
    counts = torch.tensor([[138, 97, 68]])
    found = float(deit("small").forward(counts, parse_sites((3, 6, 9), 12)))
    assert 2 * found == 5_790_696_960


def test_by_hand() -> None:
    """Width 48, MLP 4 x, 16 + 1 rows, patches of 16 x 16 x 3, 7 classes; 5 patches after block 2, none after 3.attn."""
    backbone = toy("deit_tiny_patch16_224")
    rows, width = 17, 48
    embed, head = 16 * 48 * 3 * 16 * 16, 48 * 7

    def attention(n: int) -> int:
        return 4 * n * width**2 + 2 * n * n * width

    def mlp(n: int) -> int:
        return 8 * n * width**2

    total = embed + head + 2 * (attention(rows) + mlp(rows)) + attention(6) + mlp(1) + attention(1) + mlp(1)
    cost = CostModel.of(backbone)
    assert cost.forward(torch.tensor([[5, 0]]), parse_sites((2, "3.attn"), 4)).tolist() == [total]
    assert cost.evidence(Site.parse(2), torch.tensor([17.0]), frozenset({"cls_attention"})).tolist() == [17 * width]
    assert cost.evidence(Site.parse(2), torch.tensor([17.0]), frozenset({"mean_attention"})).tolist() == [289 * width]
    assert cost.evidence(Site.parse(2), torch.tensor([17.0]), frozenset({"keys", "value_norms"})).tolist() == [0]
    assert mlp_macs((384, 64, 256, 1)) == 384 * 64 + 64 * 256 + 256


@pytest.mark.parametrize("name", [*TIMM_MODELS, "golden"])
@given(rate=st.floats(0.05, 1.0), blocks=st.sets(st.integers(1, 3), min_size=1))
def test_keep_rate_round_trip(name: str, rate: float, blocks: set[int]) -> None:
    cost, sites = CostModel.of(toy(name)), parse_sites(sorted(blocks), 4)
    counts = cost.num_patches * rate ** torch.arange(1, len(sites) + 1, dtype=torch.float64)
    budget = float(cost.forward(counts[None], sites))
    assert cost.keep_rate_for(budget, sites) == pytest.approx(rate, abs=1e-6)


def test_published_keep_rates_for_the_budgets_of_paper_000() -> None:
    """Per-stage rates for 3.5, 3.0 and 2.6 GMACs on DeiT-S and 15.3, 13.1, 11.6 on DeiT-B, sites 3, 6, 9."""
    sites = parse_sites((3, 6, 9), 12)
    rates = [deit("small").keep_rate_for(g * 1e9, sites) for g in (3.5, 3.0, 2.6)]
    assert rates == pytest.approx([0.828, 0.729, 0.633], abs=0.005)
    rates = [deit("base").keep_rate_for(g * 1e9, sites) for g in (15.3, 13.1, 11.6)]
    assert rates == pytest.approx([0.912, 0.812, 0.732], abs=0.005)


def test_more_tokens_cost_more() -> None:
    cost, sites = deit("small"), parse_sites((3, 6, 9), 12)
    grid = torch.arange(0, 197)[:, None].expand(197, 3)
    assert (cost.forward(grid, sites).diff() > 0).all()
    assert float(cost.forward(grid, sites)[0]) == cost.floor(sites)
    assert float(cost.forward(grid, sites)[-1]) == cost.dense()
    assert cost.forward(grid, sites).dtype == torch.float64


@pytest.mark.parametrize("gigas", [0.5, 1.1, 4.7, float("nan")])
def test_budgets_out_of_reach(gigas: float) -> None:
    cost, sites = deit("small"), parse_sites((3, 6, 9), 12)
    with pytest.raises(BudgetError, match=r"budget: expected above 1\.\d+ GMACs .* at most 4\.5989 \(dense\), got"):
        cost.keep_rate_for(gigas * 1e9, sites)


def test_the_dense_budget_is_allowed_and_the_floor_is_not() -> None:
    check_budget(2.0, 1.0, 2.0)
    with pytest.raises(BudgetError):
        check_budget(1.0, 1.0, 2.0)


def test_other_stems_are_counted_by_running_them() -> None:
    model = make_model("vit_tiny_patch16_224")
    expected = CostModel.of(Backbone(model)).embed

    class Stem(type(model.patch_embed)):
        pass

    model.patch_embed.__class__ = Stem
    assert CostModel.of(Backbone(model)).embed == expected == 25 * 48 * 3 * 64
