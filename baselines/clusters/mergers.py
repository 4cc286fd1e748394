"""Pooling and k-means, the untrained alternatives to density peaks in Long et al., 2023, Table 4.

The paper names them but does not describe them. Our reading: each replaces the clustering of the inattentive tokens.
Everything else stays as in `DPCMerge`, so that they leave equally many tokens. Pooling groups the inattentive tokens in
patch order, row by row, and takes plain means or maxima. Clusters by k-means are merged by attention, as in `DPCMerge`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...types import Observation
from ..argument_checks import whole_number
from .decouple import DecoupleAndMerge, Merged
from .peak_clustering import nearest_of
from .token_lists import TokenLists

POOLINGS = ("average", "max", "spatial")


@dataclass
class PoolMerge(DecoupleAndMerge):
    """Pool the inattentive tokens: the pooling strategies of the paper's Table 4.

    See `DecoupleAndMerge` for what all mergers share.

    Args:
        keep_rate: fraction that is attentive at every site, above 0 and at most 1.
        clusters: tokens that the inattentive ones are merged into, one number or one per site; None: a quarter of them.
        pairs: pairs of attentive tokens to merge, likewise; None: as many as `clusters`.
        pooling: `"average"` and `"max"` (of every channel) pool runs of consecutive tokens whose lengths differ by one
            at most; `"spatial"` averages windows of the image, bands of rows cut into columns, with equally many tokens
            each.
    """

    pooling: Literal["average", "max", "spatial"] = "average"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pooling not in POOLINGS:
            raise ValueError(f"pooling: expected one of {', '.join(POOLINGS)}, got {self.pooling!r}")

    def merge(self, lists: TokenLists, count: Tensor, obs: Observation) -> Merged:
        """Pool runs or windows."""
        if self.pooling == "max":
            return maxima(lists, runs(lists, count))
        target = windows(lists, count, obs.position) if self.pooling == "spatial" else runs(lists, count)
        return Merged(target, importance=torch.ones_like(lists.features[..., 0]))


@dataclass
class KMeansMerge(DecoupleAndMerge):
    """Cluster the inattentive tokens by k-means: the cluster strategy of the paper's Table 4.

    The initial means are tokens spread evenly over the patch order. An iteration assigns every token to the nearest
    mean, except that the token nearest to a mean stays in its cluster, so that no cluster becomes empty.

    Args:
        keep_rate: fraction that is attentive at every site, above 0 and at most 1.
        clusters: tokens that the inattentive ones are merged into, one number or one per site; None: a quarter of them.
        pairs: pairs of attentive tokens to merge, likewise; None: as many as `clusters`.
        iterations: at least 1; the paper shows 1 and 3.
    """

    iterations: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.iterations = whole_number("iterations", self.iterations, least=1)

    def merge(self, lists: TokenLists, count: Tensor, obs: Observation) -> Merged:
        """Cluster; distances to means are derived from those between tokens, which are computed once."""
        return Merged(
            k_means(lists.squared_distances(), runs(lists, count), self.iterations), macs=lists.inner_product_macs()
        )


def runs(lists: TokenLists, count: Tensor) -> Tensor:
    """Cut every list into `count` `[B]` runs whose lengths differ by one token at most.

    Returns:
        `[B, M]` int64, the place of the first token of each token's run; undefined where a list is shorter.
    """
    place = torch.arange(lists.width, device=count.device)
    return first_of_run(place.expand(lists.valid.shape), lists.length, count)


def first_of_run(place: Tensor, length: Tensor, count: Tensor) -> Tensor:
    """First place of the run of each place `[B, M]`, if `length` `[B]` places are cut into `count` `[B]` runs."""
    length, count = length.clamp(min=1)[:, None], count.clamp(min=1)[:, None]
    run = place * count // length
    return ((run * length + count - 1) // count).clamp(max=place.shape[1] - 1)


def windows(lists: TokenLists, count: Tensor, position: Tensor) -> Tensor:
    """Cut the image into `count` `[B]` windows with equally many listed tokens: bands of rows, cut by column.

    Args:
        lists: the tokens, in patch order.
        count: windows wanted.
        position: `[N, 2]`, row and column of each patch, 0 to 1.

    Returns:
        `[B, M]` int64, the place of one token of each token's window; undefined where a list is shorter.
    """
    wanted, length = count.clamp(min=1)[:, None], lists.length.clamp(min=1)[:, None]
    place = torch.arange(lists.width, device=count.device).expand(lists.valid.shape)
    bands = wanted.double().sqrt().round().long()
    band = (place * wanted // length) * bands // wanted  # as many whole runs in each band as fit
    column = position[lists.token.clamp(max=lists.num_tokens - 1), 1]
    order = (2 * band + column).masked_fill(~lists.valid, float("inf")).argsort(dim=1, stable=True)
    first = order.gather(1, first_of_run(place, lists.length, count))
    return torch.zeros_like(order).scatter(1, order, first)


def maxima(lists: TokenLists, target: Tensor) -> Merged:
    """Merge each group into the largest value of every channel, at the place of its target `[B, M]`."""
    features = lists.features.masked_fill(~lists.valid[..., None], float("-inf"))
    index = target[..., None].expand_as(features)
    largest = features.scatter_reduce(1, index, features, "amax", include_self=True)
    is_target = target == torch.arange(lists.width, device=target.device)
    return Merged(target, importance=is_target.to(features), features=largest.masked_fill(~lists.valid[..., None], 0))


def k_means(distances: Tensor, target: Tensor, iterations: int) -> Tensor:
    """K-means by Lloyd's iterations, computed from pairwise distances alone.

    The squared distance of a point to the mean of a group is the mean squared distance to the points of the group,
    minus half the mean squared distance between them.

    Args:
        distances: `[B, M, M]` squared Euclidean distances, infinite to and from padding.
        target: `[B, M]` int64, for every point the point that stands for its initial group.
        iterations: the first one assigns every point to the nearest of the points that stand for groups.

    Returns:
        `[B, M]` int64, for every point the point that stands for its final group; undefined for padding.
    """
    itself = torch.arange(target.shape[1], device=target.device)
    valid = distances.diagonal(dim1=1, dim2=2).isfinite()
    anchors = (target == itself) & valid
    target = nearest_of(distances, anchors)
    known = distances.masked_fill(~(valid[:, :, None] & valid[:, None, :]), 0)
    for _ in range(iterations - 1):
        size = torch.zeros_like(known[:, 0]).scatter_add(1, target, valid.to(known)).clamp(min=1)
        to_group = torch.zeros_like(known).scatter_add(2, target[:, None, :].expand_as(known), known) / size[:, None, :]
        own = to_group.gather(2, target[..., None]).squeeze(2) * valid
        spread = torch.zeros_like(own).scatter_add(1, target, own) / size / 2
        to_mean = (to_group - spread[:, None, :]).masked_fill(~anchors[:, None, :], float("inf"))
        in_group = (target[:, :, None] == itself) & valid[:, :, None]
        medoid = to_mean.masked_fill(~in_group, float("inf")).argmin(dim=1)  # nearest to the mean, of each group
        anchors = (medoid.gather(1, target) == itself) & valid
        target = medoid.gather(1, torch.where(anchors, target, to_mean.argmin(dim=2)))
    return target
