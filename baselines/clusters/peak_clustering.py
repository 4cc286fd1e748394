"""Density peak clustering (Rodriguez and Laio, 2014) with a nearest-neighbour density, batched."""

from __future__ import annotations

import torch
from torch import Tensor


def peak_scores(distances: Tensor, channels: int, neighbours: int) -> Tensor:
    """Score of every point as a cluster centre: log(density * distance to the nearest point of higher density).

    The density is `exp(-mean of d^2 / C over the nearest points, the point itself included)`, as in DPC-KNN (Du et al.,
    2016). Logarithms avoid underflow, so that features of any scale keep their ranking.

    Args:
        distances: `[B, M, M]` squared Euclidean distances, infinite to and from padding.
        channels: C, the width of the features.
        neighbours: nearest points that the density is computed from; all where there are fewer.

    Returns:
        `[B, M]`; minus infinity for padding, and only there.
    """
    valid = distances.diagonal(dim1=1, dim2=2).isfinite()
    nearest = distances.topk(min(neighbours, distances.shape[2]), dim=2, largest=False).values
    there = nearest.isfinite()
    density = -nearest.masked_fill(~there, 0).sum(dim=2) / (there.sum(dim=2).clamp(min=1) * channels)
    density = density.masked_fill(~valid, float("-inf"))
    is_denser = density[:, None, :] > density[:, :, None]
    to_denser = distances.masked_fill(~is_denser, float("inf")).amin(dim=2)
    farthest = distances.masked_fill(~valid[:, None, :], 0).amax(dim=2)
    separation = torch.where(to_denser.isfinite(), to_denser, farthest)
    scores = density + separation.log() / 2
    # A point that coincides with a denser one has a score of -inf, and must still rank before padding.
    return scores.clamp(min=torch.finfo(scores.dtype).min).masked_fill(~valid, float("-inf"))


def density_peaks(distances: Tensor, count: Tensor, channels: int, neighbours: int = 5) -> tuple[Tensor, Tensor]:
    """Choose the points with the best scores as centres and assign every other point to the nearest centre.

    Args:
        distances: `[B, M, M]` squared Euclidean distances, infinite to and from padding.
        count: `[B]` clusters wanted; in images with points at least 1 and at most their number.
        channels: C, the width of the features.
        neighbours: nearest points that the density is computed from.

    Returns:
        `[B, M]` bool, the centres, and `[B, M]` int64, the centre of every point (itself for a centre); undefined for
        padding.
    """
    scores = peak_scores(distances, channels, neighbours)
    ranks = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    centres = ranks < count[:, None]
    return centres, nearest_of(distances, centres)


def nearest_of(distances: Tensor, centres: Tensor) -> Tensor:
    """The nearest centre of every point, `[B, M]` int64; that of a centre is itself, also where two coincide.

    Args:
        distances: `[B, M, M]`.
        centres: `[B, M]` bool.
    """
    itself = torch.arange(centres.shape[1], device=centres.device)
    nearest = distances.masked_fill(~centres[:, None, :], float("inf")).argmin(dim=2)
    return torch.where(centres, itself, nearest)
