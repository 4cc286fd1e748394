"""The papers' GMACs ("GFLOPs" in print) out of closed form and our policies' counts, within one per cent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import pytest
import timm
import torch

from decisions import counts_of
from vitprune_env import Backbone, load_backbone
from vitprune_env.baselines import DynamicViT, EViT, EvoViT, LifeRegression, ToMe
from vitprune_env.baselines.dynamicvit.policy import ScorePredictor
from vitprune_env.engine.cost import CostModel
from vitprune_env.types import parse_sites

EVIT_SITES, AFTER_SITES, LATE_SITES = ("4.attn", "7.attn", "10.attn"), (3, 6, 9), (4, 7, 10)
WIDTHS = {"tiny": 192, "small": 384, "base": 768, "lv": 384}
RATES = (0.9, 0.8, 0.7, 0.6, 0.5)


@cache
def cost_of(size: str) -> CostModel:
    """A DeiT, or LV-ViT-S, without weights."""
    if size == "lv":
        return CostModel.of(load_backbone("lv_vit_s"))
    with torch.device("meta"):
        return CostModel.of(Backbone(timm.create_model(f"deit_{size}_patch16_224")))


def gmacs(size: str, counts: Sequence[int], sites: Sequence[int | str]) -> float:
    """One image's cost when `counts` patch tokens stay after each site."""
    cost = cost_of(size)
    depth = cost.num_halves // 2
    return float(cost.forward(torch.tensor([list(counts)]), parse_sites(sites, depth))) / 1e9


def predictor_gmacs(size: str, counts: Sequence[int]) -> float:
    """DynamicViT's predictors, each on the tokens that enter its site."""
    return ScorePredictor(WIDTHS[size]).macs_per_token * sum([196, *counts][:3]) / 1e9


def dynamicvit_gmacs(size: str, rate: float) -> float:
    """The network and its predictors."""
    counts = counts_of(DynamicViT(rate))
    return gmacs(size, counts, AFTER_SITES) + predictor_gmacs(size, counts)


Rule = Callable[[str, float], float]
RULES: dict[str, Rule] = {
    "EViT": lambda size, rate: gmacs(size, counts_of(EViT(rate)), EVIT_SITES),
    "EViT without fusion": lambda size, rate: gmacs(size, counts_of(EViT(rate, fuse=False)), EVIT_SITES),
    "DynamicViT": dynamicvit_gmacs,
    "life regression": lambda size, rate: gmacs(size, counts_of(LifeRegression(rate)), LATE_SITES),
    # The placeholders of Evo-ViT wait outside: blocks 5 to 12 compute on the selected tokens only.
    "Evo-ViT": lambda size, rate: gmacs(size, counts_of(EvoViT(rate)), range(4, 9)),
}
# rule, size -> GMACs at keep rates 0.9, 0.8, 0.7, 0.6, 0.5
PUBLISHED: dict[tuple[str, str], tuple[float, ...]] = {
    ("EViT", "tiny"): (1.09, 0.94, 0.82, 0.72, 0.63),
    ("EViT", "small"): (4.02, 3.48, 3.03, 2.64, 2.31),
    ("EViT", "base"): (15.40, 13.33, 11.61, 10.09, 8.82),
    ("EViT without fusion", "small"): (3.99, 3.44, 3.00, 2.61, 2.28),
    ("EViT without fusion", "base"): (15.27, 13.20, 11.49, 9.98, 8.72),
    ("DynamicViT", "tiny"): (1.09, 0.93, 0.80, 0.69, 0.60),
    ("DynamicViT", "small"): (4.04, 3.46, 2.98, 2.56, 2.23),
    ("DynamicViT", "base"): (15.51, 13.32, 11.48, 9.87, 8.56),
    ("life regression", "small"): (4.03, 3.55, 3.13, 2.79, 2.48),
    ("life regression", "base"): (15.45, 13.61, 12.03, 10.69, 9.51),
    ("Evo-ViT", "small"): (4.27, 3.95, 3.64, 3.33, 3.03),
    ("Evo-ViT", "base"): (16.34, 15.12, 13.98, 12.78, 11.66),
}
ROWS = [(rule, size, rate, g) for (rule, size), row in PUBLISHED.items() for rate, g in zip(RATES, row, strict=True)]


@pytest.mark.parametrize(("size", "expected"), [("tiny", 1.254), ("small", 4.599), ("base", 17.564)])
def test_dense(size: str, expected: float) -> None:
    assert cost_of(size).dense() / 1e9 == pytest.approx(expected, abs=5e-4)


@pytest.mark.parametrize(("rule", "size", "rate", "expected"), ROWS)
def test_keep_rates(rule: str, size: str, rate: float, expected: float) -> None:
    assert RULES[rule](size, rate) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    ("size", "r", "expected"),
    [
        *(("small", r, g) for r, g in {7: 3.56, 8: 3.42, 10: 3.13, 11: 2.99, 13: 2.70, 14: 2.56, 16: 2.29}.items()),
        *(("base", r, g) for r, g in {4: 15.32, 8: 13.10, 10: 12.00, 11: 11.46, 12: 10.91, 13: 10.37}.items()),
        *(("tiny", r, g) for r, g in {8: 0.92, 13: 0.73}.items()),
    ],
)
def test_tome(size: str, r: int, expected: float) -> None:
    sites = [f"{block}.attn" for block in range(1, 13)]
    assert gmacs(size, counts_of(ToMe(r)), sites) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    ("size", "rate", "printed"),
    [("small", 0.7, 3.2), ("small", 0.8, 3.6), ("small", 0.9, 4.1), ("base", 0.7, 12.3), ("tiny", 0.7, 0.9)],
)
def test_life_regression_with_its_projections(size: str, rate: float, printed: float) -> None:
    """Two D x D projections of the 196 tokens, once; printed with one decimal."""
    projections = 2 * 196 * WIDTHS[size] ** 2 / 1e9
    assert round(gmacs(size, counts_of(LifeRegression(rate)), LATE_SITES) + projections, 1) == printed


@pytest.mark.parametrize(
    ("size", "alive", "expected"),
    [
        *(("small", n, g) for n, g in {136: 3.5, 107: 3.0, 84: 2.6, 55: 2.1}.items()),
        *(("base", n, g) for n, g in {163: 15.3, 131: 13.1, 108: 11.6, 96: 10.8}.items()),
    ],
)
def test_rl4evit_if_all_pruning_is_at_the_first_site(size: str, alive: int, expected: float) -> None:
    assert gmacs(size, [alive], (3,)) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    ("method", "small", "base"),
    [
        ("EViT", (0.8, 0.7, 0.6), (0.9, 0.79, 0.7)),
        ("DynamicViT", (0.8, 0.7, 0.6), (0.9, 0.8, 0.7)),
        ("Evo-ViT", (0.65, 0.5, 0.36), (0.81, 0.63, 0.5)),
    ],
)
def test_keep_rates_behind_table_1_of_paper_000(method: str, small: tuple[float, ...], base: tuple[float, ...]) -> None:
    found = [RULES[method](size, rate) for size, rates in (("small", small), ("base", base)) for rate in rates]
    assert found == pytest.approx([3.5, 3.0, 2.6, 15.3, 13.1, 11.6], rel=0.02)  # printed with one decimal


def test_evo_vit_as_printed() -> None:
    assert [round(RULES["Evo-ViT"](size, 0.5), 1) for size in ("tiny", "small")] == [0.8, 3.0]


def test_lv_vit_s_pruned_in_table_2_of_paper_001() -> None:
    evit = gmacs("lv", counts_of(EViT(0.7), depth=16), ("5.attn", "9.attn", "13.attn"))
    counts = counts_of(DynamicViT(0.7))
    dynamic = gmacs("lv", counts, (4, 8, 12)) + predictor_gmacs("lv", counts)
    assert [round(evit, 1), round(dynamic, 1)] == [4.7, 4.6]
