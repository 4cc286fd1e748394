"""What is noted of every image: lives, margins, reasons to leave, thresholds, rank correlations, and their files."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from helpers import random_images, toy
from vitprune_env.agents import AdaptivePolicy, TokenActor, TokenPolicy
from vitprune_env.baselines import LTMP, EViT, EvoViT, RandomDrop, ToMe, TopK, diversity_score
from vitprune_env.benchmarking import interval
from vitprune_env.benchmarking.contestants import Task, contestants_of
from vitprune_env.benchmarking.per_image import diversity_points, lives_of, rank_correlation, record
from vitprune_env.benchmarking.per_image.difficulty import binned
from vitprune_env.benchmarking.per_image.layers import layer_rows, thresholds_of
from vitprune_env.benchmarking.per_image.records import margin_of
from vitprune_env.benchmarking.prepared import PreparedImages
from vitprune_env.game.rollout import play
from vitprune_env.game.token_game import TokenGame
from vitprune_env.types import Site, Step


def flags(text: str) -> torch.Tensor:
    return torch.tensor([[mark == "1" for mark in text]])


def test_lives_by_hand() -> None:
    """Sites in block 2 and after block 3 of 5: lives end at 1.5 or 3, or last 5; patch 3 waits from 1.5 to 3."""
    first = Step(Site.parse("2.attn"), flags("1111"), flags("0111"), 0.3, parked=flags("0001"))
    second = Step(Site.parse(3), flags("0111"), flags("0011"), 0.4, parked=flags("0000"))
    assert lives_of([first, second], depth=5).tolist() == [[1.5, 3.0, 5.0, 3.5]]


def test_margins_by_hand() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.5], [3.0, 1.0, 2.5]])
    assert margin_of(logits, torch.tensor([0, 1])).tolist() == [0.5, -2.0]


@pytest.mark.parametrize("policy", [EViT(0.5), RandomDrop(0.5), ToMe(3), EvoViT(0.5)], ids=lambda it: type(it).__name__)
def test_a_record_agrees_with_the_game(policy: object) -> None:
    backbone, labels = toy("deit_tiny_patch16_224"), torch.tensor([0, 1, 2, 0])
    images = random_images(backbone, 4)
    found = record(backbone, policy, [(images[:3], labels[:3]), (images[3:], labels[3:])])  # type: ignore[arg-type]
    game = TokenGame.for_policy(backbone, policy)  # type: ignore[arg-type]
    outcome = play(game, policy, images, labels).outcome  # type: ignore[arg-type]
    count = backbone.num_patches
    if not isinstance(policy, RandomDrop):  # draws anew for every batch
        assert (found.kept == outcome.n_kept.numpy()).all()
        assert found.predicted.tolist() == outcome.logits.argmax(dim=1).tolist()
        np.testing.assert_allclose(found.diversity, diversity_score(game.state), rtol=1e-4)
    assert found.dense_predicted.tolist() == backbone(images).argmax(dim=1).tolist()
    assert ((found.margin > 0) == (found.dense_predicted == found.label)).all()
    halves = np.diff([0, *(site.half for site in game.sites), 2 * backbone.depth])
    carried = np.concatenate([np.full((4, 1), count), found.kept], axis=1)
    np.testing.assert_allclose(found.lives.sum(axis=1), carried @ halves / 2)
    np.testing.assert_allclose(found.tokens, carried @ halves / halves.sum())
    left = found.dropped.cumsum(axis=1) + found.merged.cumsum(axis=1) + found.waiting
    assert (left + found.kept == count).all()
    reasons = {name for name in ("dropped", "merged", "waiting") if getattr(found, name).any()}
    assert (
        reasons
        == {"EViT": {"merged"}, "RandomDrop": {"dropped"}, "ToMe": {"merged"}, "EvoViT": {"waiting"}}[
            type(policy).__name__
        ]
    )
    rows = layer_rows(found, {"x": [0.5] * len(game.sites)})
    assert [row["kept"] for row in rows] == pytest.approx(found.kept.mean(axis=0))
    assert [row["block"] for row in rows] == [site.half / 2 for site in game.sites]
    assert rows[0]["threshold on x"] == 0.5


def test_thresholds_are_those_that_decide() -> None:
    actor = TokenActor(8, generator=torch.Generator().manual_seed(0))
    assert thresholds_of(TopK(0.5), 3) == {}
    assert thresholds_of(TokenPolicy(actor, threshold=0.3), 3) == {"score": (0.3, 0.3, 0.3)}
    wide = TokenActor(9, generator=torch.Generator().manual_seed(0))
    adaptive = AdaptivePolicy(wide, (0.3, 0.5), (1.0, 2.0), share=0.4)
    assert thresholds_of(adaptive, 2)["score"] == pytest.approx((1.5, 1.5))
    moved = thresholds_of(LTMP((0.9, 0.8), 0.001, ("1", "2"), offset=0.5), 2)
    assert moved["similarity (merged above)"] == pytest.approx((1 - 0.1 * 10**0.5, 1 - 0.2 * 10**0.5))
    assert moved["importance (pruned up to)"] == pytest.approx((0.001 * 10**0.5,) * 2)


def test_rank_correlation_is_spearmans_and_its_interval_knows_groups() -> None:
    generator = np.random.default_rng(0)
    x = generator.integers(0, 9, size=60).astype(float)  # with ties
    y = x + generator.normal(scale=3, size=60)
    alone = rank_correlation(x, y)
    assert alone.value == pytest.approx(cast(Any, spearmanr(x, y)).statistic)
    assert alone.low < alone.value < alone.high
    assert 0.1 < alone.high - alone.low < 0.6
    assert rank_correlation(x, y, np.arange(60)) == alone
    fourfold = [values.repeat(4) for values in (x, y, np.arange(60))]
    copies, grouped = rank_correlation(*fourfold[:2]), rank_correlation(*fourfold)
    assert copies.high - copies.low < 0.7 * (alone.high - alone.low), "copies taken for new images"
    assert grouped.high - grouped.low == pytest.approx(alone.high - alone.low, rel=0.2)
    assert "undefined" in str(rank_correlation(x, np.ones(60)))
    with pytest.raises(ValueError, match="one number of each image"):
        rank_correlation(x, y[:9])


def test_parts_have_equally_many_images() -> None:
    x, y = np.arange(40.0)[::-1], np.arange(40) % 2 == 1
    parts = binned(x, y, bins=4)
    assert [(part.centre, part.mean, part.images) for part in parts] == [(9 * index + 4.5 + index, 0.5, 10)
                                                                         for index in range(4)]  # fmt: skip
    assert (parts[0].low, parts[0].high) == pytest.approx(interval(y[None, :10].astype(float)))
    numbers = binned(x, x, bins=10)
    assert len(numbers) == 8, "no part of less than five"
    half = 1.959964 * np.std([0, 1, 2, 3, 4], ddof=1) / 5**0.5
    assert (numbers[0].low, numbers[0].high) == pytest.approx((2 - half, 2 + half))


def test_diversity_falls_with_the_budget() -> None:
    backbone, labels = toy("deit_tiny_patch16_224"), torch.tensor([0, 1, 2, 0])
    images = PreparedImages(backbone, [(random_images(backbone, 4), labels)])
    task = Task(backbone, images, images)
    points, missing = diversity_points(contestants_of(["topk"], controls=False), task, (0.001, 0.6, 0.8))
    assert [point.policy for point in points] == ["topk", "topk"]
    assert [point.share for point in points] == pytest.approx([0.6, 0.8], abs=0.1)
    assert points[0].score < points[1].score
    assert points[0].tokens < points[1].tokens
    assert points[0].low <= points[0].accuracy <= points[0].high
    (sentence,) = missing
    assert sentence.startswith("topk at 0%")
