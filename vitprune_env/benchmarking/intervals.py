"""How sure an accuracy is, and how sure the difference of two: standard errors and 95 % intervals over images and runs.

Images that were made from the same original (scenes with the same handwritten digit) are right or wrong together. They
are a group: what varies independently are groups, not images (Cameron & Miller, 2015). Every function takes the number
of each image's group, `[images]`. Without groups, or where each image is its own, images are independent.
"""

from __future__ import annotations

import statistics
from math import inf, nan, sqrt

import numpy as np

CONFIDENCE = 0.95
DRAWS = 5000  # of a bootstrap
Z95 = 1.959964  # half-width of the central 95 % of a normal distribution, in standard deviations


def standard_error(correct: np.ndarray, groups: np.ndarray | None = None) -> float:
    """Standard error of an accuracy: over the runs, or over the images or groups of a single run.

    Args:
        correct: `[runs, images]`, 1 where an image is classified correctly.
        groups: `[images]`, the group of each image; None: each is its own.
    """
    if len(correct) > 1:
        return statistics.stdev(correct.mean(axis=1).tolist()) / len(correct) ** 0.5
    number = _numbered(groups)
    if number is not None:
        sample = _over_groups(correct[0], number)
        return sqrt(sample.var(ddof=1) / len(sample)) if len(sample) > 1 else nan
    p = float(correct[0].mean())
    return (p * (1 - p) / correct.shape[1]) ** 0.5


def interval(correct: np.ndarray, groups: np.ndarray | None = None) -> tuple[float, float]:
    """95 % interval of an accuracy: Wilson's score interval (Wilson, 1927).

    Several runs on the same images are not independent, nor are images of the same group. For them the number of images
    in Wilson's formula is the number of independent images whose mean would vary as much as this one does over groups
    and runs, and Student's quantile takes the place of the normal one. The interval always lies within 0 and 1.

    Args:
        correct: `[runs, images]`, 1 where an image is classified correctly; or `[runs, 1]`, accuracies of runs on
            images that are taken as given.
        groups: `[images]`, the group of each image; None: each is its own.

    Returns:
        Lower and upper end; NaN for a single number.
    """
    number = _numbered(groups)
    if number is not None and not number.any():  # a single group is taken as given
        correct, number = correct.mean(axis=1, keepdims=True), None
    runs, images = correct.shape
    p = float(correct.mean())
    if correct.size == 1:
        return nan, nan
    n, z = float(images), Z95
    if runs > 1 or number is not None:
        over_images = correct.mean(axis=0) if number is None else _over_groups(correct.mean(axis=0), number)
        variance, z = _variance([over_images, correct.mean(axis=1)])
        fallback = len(over_images) if images > 1 else inf
        n = p * (1 - p) / variance if variance else fallback
    half = z / (1 + z * z / n) * sqrt(max(0.0, p * (1 - p)) / n + z * z / (4 * n * n))
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    return max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half))  # rounding must not put p outside


def difference(
    correct: np.ndarray, other: np.ndarray, seed: int = 0, groups: np.ndarray | None = None
) -> tuple[float, float, float]:
    """How much more accurate one policy is than another, and the 95 % interval of that.

    The difference is taken image by image, and run by run where both have as many runs: what makes an image hard, or a
    seed lucky, is common to both and cancels.

    The interval is that of a paired bootstrap (Efron, 1979): images are drawn with replacement, the same for both
    policies, and the middle 95 % of the differences on such draws are taken. Where images have groups, whole groups
    are drawn instead (Cameron, Gelbach & Miller, 2008). Where there are several runs, one run less is drawn than there
    are, so that few runs vary as much as they should (Rao & Wu, 1988). Accuracies of runs on given images have no
    images to draw; their interval is Student's.

    Args:
        correct: `[runs, images]`, 1 where an image is classified correctly; or `[runs, 1]`, see `interval`.
        other: the same of the other policy, on the same images.
        seed: of the draws.
        groups: `[images]`, the group of each image; None: each is its own.

    Returns:
        Difference, lower and upper end; NaN ends for single numbers.
    """
    gap = float(correct.mean() - other.mean())
    number = _numbered(groups)
    if number is not None and not number.any():
        correct, other = (marks.mean(axis=1, keepdims=True) for marks in (correct, other))
    if correct.shape[1] == 1:
        return gap, *_students_ends(gap, correct, other)
    generator = np.random.default_rng(seed)
    number = np.arange(correct.shape[1]) if number is None else number
    sizes = np.bincount(number)
    counts = generator.multinomial(len(sizes), np.full(len(sizes), 1 / len(sizes)), size=DRAWS)  # [draws, groups]
    drawn = counts / (counts @ sizes)[:, None]  # what each image of a group counts in a draw
    sums = [np.array([np.bincount(number, run) for run in marks]) for marks in (correct, other)]  # [runs, groups]
    runs = [_drawn_runs(generator, len(correct))]
    runs.append(runs[0] if len(correct) == len(other) else _drawn_runs(generator, len(other)))
    means = [((drawn @ right.T) * weights).sum(axis=1) for right, weights in zip(sums, runs, strict=True)]
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(means[0] - means[1], [tail, 100 - tail])
    return gap, float(low), float(high)


def _numbered(groups: np.ndarray | None) -> np.ndarray | None:
    """`[images]`, groups as numbers from 0 on; None where no two images share one."""
    if groups is None:
        return None
    found, number = np.unique(groups, return_inverse=True)
    return None if len(found) == len(number) else number


def _over_groups(values: np.ndarray, number: np.ndarray) -> np.ndarray:
    """`[groups]`, a sample whose mean varies as the mean of `values [images]` does when groups are drawn.

    A group counts with the sum of its deviations from the mean, in units of the mean size of a group.
    """
    sums = np.bincount(number, values - values.mean())
    return sums * len(sums) / len(values)


def _drawn_runs(generator: np.random.Generator, runs: int) -> np.ndarray:
    """`[draws, runs]`, the weight of each run in each draw."""
    if runs == 1:
        return np.ones((DRAWS, 1))
    return generator.multinomial(runs - 1, np.full(runs, 1 / runs), size=DRAWS) / (runs - 1)


def _students_ends(gap: float, correct: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """The interval of a difference of accuracies of runs, `[runs, 1]` each."""
    samples = [correct[:, 0], other[:, 0]]
    if len(correct) == len(other):
        samples = [samples[0] - samples[1]]
    if all(len(sample) == 1 for sample in samples):
        return nan, nan
    variance, z = _variance(samples)
    half = z * sqrt(variance)
    return gap - half, gap + half


def _variance(samples: list[np.ndarray]) -> tuple[float, float]:
    """Sum of the variances of the samples' means, and Student's quantile with Satterthwaite's degrees of freedom."""
    from scipy.stats import t as student

    parts = [(float(sample.var(ddof=1)) / len(sample), len(sample) - 1) for sample in samples if len(sample) > 1]
    total = sum(variance for variance, _ in parts)
    if not total:
        return 0.0, Z95
    freedom = total**2 / sum(variance**2 / degrees for variance, degrees in parts)
    return total, float(student.ppf((1 + CONFIDENCE) / 2, freedom))
