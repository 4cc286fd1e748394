"""The other mergers of Table 4 by hand: runs, windows, maxima and k-means."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from helpers import random_images, toy
from vitprune_env.baselines import DPCMerge, KMeansMerge, PoolMerge
from vitprune_env.baselines.clusters.mergers import first_of_run, k_means
from vitprune_env.engine.backbone import Backbone
from vitprune_env.game.token_game import TokenGame
from vitprune_env.types import Decision, Observation

SITE = ("4.attn",)


def decided(backbone: Backbone, images: Tensor, policy: Any) -> tuple[Observation, Decision, TokenGame]:
    """One decision inside block 4, and the game after it."""
    game = TokenGame(backbone, SITE, needs=policy.needs)
    obs = game.reset(images)
    decision = policy.decide(obs)
    game.step(decision)
    return obs, decision, game


def groups_of(decision: Decision, image: int, tokens: list[int]) -> list[list[int]]:
    """The listed tokens by the token that they go to, in order of their first members."""
    assert decision.merge_into is not None
    groups: dict[int, list[int]] = {}
    for token in tokens:
        groups.setdefault(int(decision.merge_into[image, token]), []).append(token)
    return list(groups.values())


def inattentive(obs: Observation, image: int, attentive: int) -> list[int]:
    """Tokens of an image that are not among the attentive ones, in patch order."""
    attention = obs.scatter(obs.evidence["cls_attention"])[image]
    return sorted(attention.argsort(descending=True)[attentive:].tolist())


@pytest.mark.parametrize(
    ("length", "count", "expected"),
    [(6, 3, [0, 0, 2, 2, 4, 4]), (7, 3, [0, 0, 0, 3, 3, 5, 5]), (5, 1, [0] * 5), (4, 4, [0, 1, 2, 3])],
)
def test_runs_by_hand(length: int, count: int, expected: list[int]) -> None:
    place = torch.arange(length)[None]
    assert first_of_run(place, torch.tensor([length]), torch.tensor([count]))[0].tolist() == expected


@given(length=st.integers(1, 40), share=st.floats(0, 1), padding=st.integers(0, 5))
def test_runs_are_equally_long_but_for_one(length: int, share: float, padding: int) -> None:
    count = 1 + round(share * (length - 1))
    first = first_of_run(torch.arange(length + padding)[None], torch.tensor([length]), torch.tensor([count]))[0]
    names, sizes = first[:length].unique(return_counts=True)
    assert len(names) == count
    assert sizes.max() - sizes.min() <= 1
    assert torch.equal(first[names], names), "a run is named by its first place"
    assert torch.equal(first[:length], first[:length].sort().values)


def test_average_pooling_by_hand(golden_backbone: Backbone, golden_images: Tensor) -> None:
    obs, decision, game = decided(golden_backbone, golden_images, PoolMerge(0.7, clusters=4, pairs=0))
    tokens, kept = obs.dense(), game.state.tokens.view(8, 49, -1)
    for image in range(8):
        rest = inattentive(obs, image, 45)  # 19 of 64 in runs of 5, 5, 5, 4
        groups = groups_of(decision, image, rest)
        assert groups == [rest[0:5], rest[5:10], rest[10:15], rest[15:19]]
        alive = game.state.alive[image].nonzero()[:, 0].tolist()
        for group in groups:
            mean = tokens[image, group].mean(dim=0)
            torch.testing.assert_close(kept[image, alive.index(group[0])], mean, atol=1e-5, rtol=1e-5)


def test_max_pooling_by_hand(golden_backbone: Backbone, golden_images: Tensor) -> None:
    policy = PoolMerge(0.7, clusters=4, pairs=2, pooling="max")
    obs, decision, game = decided(golden_backbone, golden_images, policy)
    tokens, kept = obs.dense(), game.state.tokens.view(8, 47, -1)
    assert decision.merge_into is not None
    for image in range(8):
        rest = inattentive(obs, image, 45)
        alive = game.state.alive[image].nonzero()[:, 0].tolist()
        for group in (rest[0:5], rest[5:10], rest[10:15], rest[15:19]):
            assert torch.equal(kept[image, alive.index(group[0])], tokens[image, group].amax(dim=0))
        alone = (decision.merge_into[image].bincount(minlength=64) == 1).nonzero()[:, 0].tolist()
        for token in alone:
            assert torch.equal(kept[image, alive.index(token)], tokens[image, token]), "who stands alone stays"


def test_spatial_windows_by_hand() -> None:
    backbone = toy("golden")  # 8 x 8 patches
    images = random_images(backbone, 2)
    policy = PoolMerge(0.001, clusters=9, pairs=0, pooling="spatial")
    obs, decision, _ = decided(backbone, images, policy)
    for image in range(2):
        rest = inattentive(obs, image, 1)  # all but one, 7 to a window
        groups = groups_of(decision, image, rest)
        assert sorted(map(len, groups)) == [7] * 9
        bands = [rest[start : start + 21] for start in (0, 21, 42)]
        expected = []
        for band in bands:
            by_column = sorted(band, key=lambda token: (token % 8, token))
            expected += [by_column[start : start + 7] for start in (0, 7, 14)]
        assert sorted(map(sorted, groups)) == sorted(map(sorted, expected))


@pytest.mark.parametrize("pooling", ["average", "max", "spatial"])
def test_one_group_is_one_token(pooling: Any, golden_backbone: Backbone, golden_images: Tensor) -> None:
    policy = PoolMerge(0.7, clusters=1, pairs=0, pooling=pooling)
    obs, decision, _ = decided(golden_backbone, golden_images, policy)
    assert decision.count == 46
    assert all(len(groups_of(decision, image, inattentive(obs, image, 45))) == 1 for image in range(8))


def lloyd(points: Tensor, seeds: list[int], iterations: int) -> list[int]:
    """K-means on coordinates, point by point: the group number of every point."""
    means = points[seeds]
    group: list[int] = []
    for step in range(iterations):
        distances = (points[:, None] - means[None]).square().sum(dim=2)
        nearest = distances.argmin(dim=1).tolist()
        stays: dict[int, int] = dict(zip(seeds, range(len(seeds)), strict=True))
        if step:  # the member nearest to a mean stays with it
            groups = [[i for i, g in enumerate(group) if g == number] for number in range(len(seeds))]
            stays = {members[int(distances[members, g].argmin())]: g for g, members in enumerate(groups)}
        group = [stays[i] if i in stays else nearest[i] for i in range(len(points))]
        means = torch.stack([points[[i for i, g in enumerate(group) if g == k]].mean(0) for k in range(len(seeds))])
    return group


@given(seed=st.integers(0, 2**31), iterations=st.integers(1, 5), count=st.integers(1, 6), padding=st.integers(0, 3))
def test_k_means_is_lloyds_on_coordinates(seed: int, iterations: int, count: int, padding: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(12, 3, generator=generator, dtype=torch.float64)
    size = 12 + padding
    distances = torch.full((1, size, size), float("inf"), dtype=torch.float64)
    distances[:, :12, :12] = (points[:, None] - points[None]).square().sum(dim=2)
    seeds = torch.randperm(12, generator=generator)[:count].sort().values.tolist()
    start = torch.full((1, size), seeds[0])
    start[0, seeds] = torch.tensor(seeds)
    target = k_means(distances, start, iterations)[0, :12].tolist()
    expected = lloyd(points, seeds, iterations)
    assert [[a == b for b in target] for a in target] == [[a == b for b in expected] for a in expected]
    assert all(target[t] == t for t in target), "a group is named by a member"
    assert len(set(target)) == count, "no group is ever empty"


def test_the_token_nearest_to_a_mean_stays_with_it() -> None:
    # First groups: -6 5 5, mean 4/3, and 16.1 6 6 6 6, mean 8.02, which is nearer to 5. One of the two stays.
    points = torch.tensor([-6.0, 5.0, 5.0, 16.1, 6.0, 6.0, 6.0, 6.0])
    distances = (points[:, None] - points[None]).square()[None]
    target = k_means(distances, torch.tensor([[0, 0, 0, 3, 3, 3, 3, 3]]), iterations=2)[0].tolist()
    assert target[:2] == [1, 1]
    assert len(set(target[2:])) == 1
    assert target[2] >= 3


def test_k_means_merges_by_attention(golden_backbone: Backbone, golden_images: Tensor) -> None:
    obs, decision, _ = decided(golden_backbone, golden_images, KMeansMerge(0.7, pairs=0))
    attention, target, weight = obs.scatter(obs.evidence["cls_attention"]), decision.merge_into, decision.weight
    assert target is not None
    assert weight is not None
    total = torch.zeros(8, 64).scatter_add(1, target, attention).gather(1, target)
    torch.testing.assert_close(weight, attention / total)


@pytest.mark.parametrize("policy", [PoolMerge(0.6), KMeansMerge(0.6), KMeansMerge(0.6, iterations=3)], ids=repr)
def test_they_leave_as_many_tokens_as_dpc(policy: Any, golden_backbone: Backbone, golden_images: Tensor) -> None:
    _, decision, _ = decided(golden_backbone, golden_images, policy)
    _, reference, _ = decided(golden_backbone, golden_images, DPCMerge(0.6))
    assert torch.equal(decision.keep.sum(dim=1), reference.keep.sum(dim=1))


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("pooling", lambda: PoolMerge(0.5, pooling="median")),
        ("iterations", lambda: KMeansMerge(0.5, iterations=0)),
        ("iterations", lambda: KMeansMerge(0.5, iterations=1.5)),
        ("keep_rate", lambda: KMeansMerge(0)),
        ("clusters", lambda: PoolMerge(0.5, clusters=-2)),
    ],
    ids=["pooling", "none", "half", "keep_rate", "clusters"],
)
def test_bad_parameters_are_refused_by_name(name: str, make: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        make()
