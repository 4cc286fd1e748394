"""How many of 196 patches every published method leaves, from games on a DeiT-T whose blocks are left out.

The numbers are those of the papers' codes. No paper prints them: they follow from printed rules and keep rates.
"""

from __future__ import annotations

import pytest

from hollow import played
from vitprune_env.baselines import DPCKNN, DPCMerge, DynamicViT, EViT, EvoViT, LifeRegression, ToMe, TopK, TriLevel
from vitprune_env.baselines.life_regression.policy import LifeTable
from vitprune_env.policy import Policy
from vitprune_env.types import parse_sites


def counts_of(
    policy: Policy, sites: tuple[str, ...] | None = None, image_size: tuple[int, int] = (224, 224)
) -> list[int]:
    """Tokens that go on after each site of one image."""
    return played(policy, "deit_tiny_patch16_224", sites, image_size).n_kept[0].tolist()


OF_CURRENT = {
    0.9: [177, 160, 144],
    0.8: [157, 126, 101],
    0.7: [138, 97, 68],
    0.6: [118, 71, 43],
    0.5: [98, 49, 25],
}
OF_ORIGINAL = {
    0.9: [176, 158, 142],
    0.8: [156, 125, 100],
    0.7: [137, 96, 67],
    0.6: [117, 70, 42],
    0.5: [98, 49, 24],
}
FUSED = {0.9: [177, 161, 146], 0.8: [157, 127, 103], 0.7: [138, 98, 70], 0.6: [118, 72, 44], 0.5: [98, 50, 26]}


@pytest.mark.parametrize("rate", OF_CURRENT)
def test_a_share_of_the_current_tokens(rate: float) -> None:
    assert counts_of(EViT(rate, fuse=False)) == OF_CURRENT[rate]
    assert counts_of(TriLevel(rate)) == OF_CURRENT[rate]
    assert counts_of(DPCMerge(rate)) == OF_CURRENT[rate]
    assert counts_of(EViT(rate)) == [kept + 1 for kept in FUSED[rate]], "and the fused token"


@pytest.mark.parametrize("rate", OF_ORIGINAL)
def test_a_share_of_the_original_tokens(rate: float) -> None:
    assert counts_of(DynamicViT(rate)) == OF_ORIGINAL[rate]
    assert counts_of(TopK(rate)) == OF_ORIGINAL[rate]
    assert counts_of(DPCKNN(rate)) == OF_ORIGINAL[rate]


@pytest.mark.parametrize(
    ("policy", "image_size", "left"),
    [
        (EViT(0.55, fuse=False), (160, 160), 56),
        (EViT(0.56, fuse=False), (160, 240), 85),
        (TriLevel(0.55), (160, 160), 56),
    ],
    ids=str,
)
def test_the_ceiling_of_the_product_in_double_precision(policy: Policy, image_size: tuple[int, int], left: int) -> None:
    """0.55 * 100 is 55.00000000000001, 0.56 * 150 is 84.00000000000001."""
    assert counts_of(policy, ("4.attn",), image_size) == [left]


@pytest.mark.parametrize(("rate", "mean", "spread"), [(0.7, 8.25, 3.32), (0.8, 9.34, 3.20), (0.9, 10.59, 2.65)])
def test_lives_have_the_mean_and_spread_of_eqs_9_and_10(rate: float, mean: float, spread: float) -> None:
    """Derived: Chen et al. print the equations. Rounded to the nearest; rounded down, 0.8 would give 9.32 and 3.22."""
    counts = counts_of(LifeRegression(rate))
    table = LifeTable.of(counts, 196, parse_sites((4, 7, 10), 12), 12)
    assert (round(table.mean, 2), round(table.spread, 2)) == (mean, spread)


def test_life_regression_at_the_published_rate() -> None:
    assert counts_of(LifeRegression(0.7)) == [137, 96, 67]


@pytest.mark.parametrize(("rate", "slow"), [(0.5, 98), (0.7, 137), (0.36, 70)])
@pytest.mark.parametrize("layer_wise", [False, True])
def test_evo_vit(rate: float, slow: int, layer_wise: bool) -> None:
    assert set(counts_of(EvoViT(rate, layer_wise))) == {slow}


def test_tome_with_a_decreasing_schedule() -> None:
    """The authors' (8, -1): from 16 linearly down to 0, each rounded down."""
    merged = [16, 14, 13, 11, 10, 8, 7, 5, 4, 2, 1, 0]
    assert counts_of(ToMe(8, inflect=-1.0)) == [196 - sum(merged[: step + 1]) for step in range(12)]
