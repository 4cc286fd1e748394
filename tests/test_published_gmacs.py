"""The papers' GMACs ("GFLOPs" in print) out of closed form and token counts, within one per cent."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache

import pytest
import timm
import torch

from vitprune_env import Backbone, load_backbone
from vitprune_env.cost import CostModel, mlp_macs
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


def evit_counts(rate: float, fused: bool) -> list[int]:
    """EViT keeps `ceil(rate n)` of n, and may add one that competes at the next site."""
    counts, tokens = [], 196
    for _ in range(3):
        tokens = math.ceil(rate * tokens) + int(fused)
        counts.append(tokens)
    return counts


def fixed_counts(rate: float) -> list[int]:
    """DynamicViT and life regression keep `int(rate^s N)` of the original N."""
    return [int(196 * rate**site) for site in (1, 2, 3)]


def tome_counts(r: int) -> list[int]:
    """ToMe merges r tokens in every block, at most half of those that are there, class token included."""
    counts, rows = [], 197
    for _ in range(12):
        rows -= min(r, (rows - 1) // 2)
        counts.append(rows - 1)
    return counts


def predictor_gmacs(size: str, rate: float) -> float:
    """DynamicViT's predictors (D, D, D/2, D/4, 2), each on the tokens that enter its site."""
    width = WIDTHS[size]
    per_token = mlp_macs((width, width, width // 2, width // 4, 2))
    return per_token * sum([196, *fixed_counts(rate)][:3]) / 1e9


Rule = Callable[[str, float], float]
RULES: dict[str, Rule] = {
    "EViT": lambda size, rate: gmacs(size, evit_counts(rate, fused=True), EVIT_SITES),
    "EViT without fusion": lambda size, rate: gmacs(size, evit_counts(rate, fused=False), EVIT_SITES),
    "DynamicViT": lambda size, rate: gmacs(size, fixed_counts(rate), AFTER_SITES) + predictor_gmacs(size, rate),
    "after blocks 4, 7, 10": lambda size, rate: gmacs(size, fixed_counts(rate), LATE_SITES),
    # The placeholders of Evo-ViT wait outside: blocks 5 to 12 compute on the selected tokens only.
    "Evo-ViT": lambda size, rate: gmacs(size, [int(196 * rate)], (4,)),
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
    ("after blocks 4, 7, 10", "small"): (4.03, 3.55, 3.13, 2.79, 2.48),
    ("after blocks 4, 7, 10", "base"): (15.45, 13.61, 12.03, 10.69, 9.51),
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
    assert gmacs(size, tome_counts(r), sites) == pytest.approx(expected, rel=0.01)


def test_tome_stops_at_half_of_the_tokens() -> None:
    assert tome_counts(8)[-1] == 101 - 1
    assert tome_counts(16)[-3:] == [36, 20, 10]


@pytest.mark.parametrize(
    ("size", "rate", "printed"),
    [("small", 0.7, 3.2), ("small", 0.8, 3.6), ("small", 0.9, 4.1), ("base", 0.7, 12.3), ("tiny", 0.7, 0.9)],
)
def test_life_regression_with_its_projections(size: str, rate: float, printed: float) -> None:
    """Two D x D projections of the 196 tokens, once; printed with one decimal."""
    projections = 2 * 196 * WIDTHS[size] ** 2 / 1e9
    assert round(gmacs(size, fixed_counts(rate), LATE_SITES) + projections, 1) == printed


@pytest.mark.parametrize(
    ("size", "alive", "expected"),
    [
        *(("small", n, g) for n, g in {136: 3.5, 107: 3.0, 84: 2.6, 55: 2.1}.items()),
        *(("base", n, g) for n, g in {163: 15.3, 131: 13.1, 108: 11.6, 96: 10.8}.items()),
    ],
)
def test_rl4evit_if_all_pruning_is_at_the_first_site(size: str, alive: int, expected: float) -> None:
    assert gmacs(size, [alive], (3,)) == pytest.approx(expected, rel=0.01)


def test_published_keep_rates_of_evit_in_table_1_of_paper_000() -> None:
    found = [RULES["EViT"]("small", rate) for rate in (0.8, 0.7, 0.6)]
    found += [RULES["EViT"]("base", rate) for rate in (0.9, 0.79, 0.7)]
    assert found == pytest.approx([3.5, 3.0, 2.6, 15.3, 13.1, 11.6], rel=0.02)  # printed with one decimal


def test_lv_vit_s_pruned_in_table_2_of_paper_001() -> None:
    evit = gmacs("lv", evit_counts(0.7, fused=True), ("5.attn", "9.attn", "13.attn"))
    dynamic = gmacs("lv", fixed_counts(0.7), (4, 8, 12)) + predictor_gmacs("lv", 0.7)
    assert [round(evit, 1), round(dynamic, 1)] == [4.7, 4.6]
