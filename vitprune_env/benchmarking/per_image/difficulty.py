"""Whether a policy keeps more tokens of harder images: rank correlation with an interval, and means over tenths."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from vitprune_env.benchmarking.intervals import CONFIDENCE, Z95, interval
from vitprune_env.plots.per_image import Part

DRAWS = 1000  # of the bootstrap
AT_ONCE = 200  # draws whose ranks are computed together


class Correlation(NamedTuple):
    """Spearman's rank correlation and its 95 % interval; NaN where one of the two never varies."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        if np.isnan(self.value):
            return "undefined: one of the two is the same for all images"
        return f"{self.value:+.2f} ({self.low:+.2f} to {self.high:+.2f})"


def rank_correlation(x: np.ndarray, y: np.ndarray, groups: np.ndarray | None = None, seed: int = 0) -> Correlation:
    """Spearman's rank correlation of two numbers of each image (Spearman, 1904).

    The interval is the middle 95 % of the correlations of images drawn with replacement (Efron, 1979); of images that
    have groups, whole groups are drawn. Draws in which one of the two does not vary are left out.

    Args:
        x: `[M]`.
        y: `[M]`.
        groups: `[M]`, the group of each image; None: each is its own.
        seed: of the draws.

    Raises:
        ValueError: for numbers of different images.
    """
    if x.shape != y.shape or x.ndim != 1:
        raise ValueError(f"x, y: expected one number of each image in both, got shapes {x.shape} and {y.shape}")
    value = float(_spearman(x[None], y[None])[0])
    if np.isnan(value):
        return Correlation(value, value, value)
    generator = np.random.default_rng(seed)
    members = _members(len(x), groups)
    drawn = []
    for _ in range(DRAWS // AT_ONCE):
        if members is None:
            rows = generator.integers(len(x), size=(AT_ONCE, len(x)))
            drawn.append(_spearman(x[rows], y[rows]))
            continue
        for chosen in generator.integers(len(members), size=(AT_ONCE, len(members))):
            rows = np.concatenate([members[group] for group in chosen])
            drawn.append(_spearman(x[None, rows], y[None, rows]))
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.nanpercentile(np.concatenate(drawn), [tail, 100 - tail])
    return Correlation(value, float(low), float(high))


def _members(count: int, groups: np.ndarray | None) -> list[np.ndarray] | None:
    """The images of each group; None where no two images share one."""
    if groups is None:
        return None
    order, (_, sizes) = np.argsort(groups, kind="stable"), np.unique(groups, return_counts=True)
    return None if len(sizes) == count else np.split(order, np.cumsum(sizes)[:-1])


def _spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Correlation of the ranks in each row of `[draws, images]`; NaN where one of the two does not vary."""
    from scipy.stats import rankdata

    centred = [ranks - ranks.mean(axis=1, keepdims=True) for ranks in (rankdata(x, axis=1), rankdata(y, axis=1))]
    norms = np.sqrt((centred[0] ** 2).sum(axis=1) * (centred[1] ** 2).sum(axis=1))
    products = (centred[0] * centred[1]).sum(axis=1)
    return np.divide(products, norms, out=np.full(len(x), np.nan), where=norms > 0)


def binned(x: np.ndarray, y: np.ndarray, groups: np.ndarray | None = None, bins: int = 10) -> list[Part]:
    """Mean of y over parts with equally many images, from the smallest x to the largest.

    Args:
        x: `[M]`.
        y: `[M]`, numbers; or bool, for the share of images that are True.
        groups: `[M]`, the group of each image; None: each is its own.
        bins: parts; fewer where there would be less than five images in one.

    Returns:
        One for each part. The interval of a share is that of an accuracy, see `intervals.interval`; that of a mean is
        1.96 standard errors over independent groups to both sides.
    """
    found = []
    order = np.argsort(x, kind="stable")
    for rows in np.array_split(order, max(1, min(bins, len(x) // 5))):
        values, inside = y[rows].astype(float), None if groups is None else groups[rows]
        low, high = interval(values[None], inside) if y.dtype == bool else _around_mean(values, inside)
        found.append(Part(float(np.median(x[rows])), float(values.mean()), low, high, len(rows)))
    return found


def _around_mean(values: np.ndarray, groups: np.ndarray | None) -> tuple[float, float]:
    """The 95 % interval of a mean whose groups are independent."""
    mean = float(values.mean())
    number = np.arange(len(values)) if groups is None else np.unique(groups, return_inverse=True)[1]
    sums = np.bincount(number, values - mean)
    half = Z95 * float(np.sqrt((sums**2).sum() * len(sums) / max(1, len(sums) - 1))) / len(values)
    return mean - half, mean + half
