"""How sure an accuracy is, and how sure the difference of two: 95 % intervals over images and runs."""

from __future__ import annotations

from math import inf, nan, sqrt

import numpy as np

CONFIDENCE = 0.95
DRAWS = 5000  # of a bootstrap
Z95 = 1.959964  # half-width of the central 95 % of a normal distribution, in standard deviations


def interval(correct: np.ndarray) -> tuple[float, float]:
    """95 % interval of an accuracy: Wilson's score interval (Wilson, 1927).

    Several runs on the same images are not independent. For them the number of images in Wilson's formula is the number
    of independent images whose mean would vary as much as this one does over images and runs, and Student's quantile
    takes the place of the normal one. The interval always lies within 0 and 1.

    Args:
        correct: `[runs, images]`, 1 where an image is classified correctly; or `[runs, 1]`, accuracies of runs on
            images that are taken as given.

    Returns:
        Lower and upper end; NaN for a single number.
    """
    runs, images = correct.shape
    p = float(correct.mean())
    if correct.size == 1:
        return nan, nan
    n, z = float(images), Z95
    if runs > 1:
        variance, z = _variance([(correct.mean(axis=0)), correct.mean(axis=1)])
        fallback = images if images > 1 else inf
        n = p * (1 - p) / variance if variance else fallback
    half = z / (1 + z * z / n) * sqrt(max(0.0, p * (1 - p)) / n + z * z / (4 * n * n))
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    return max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half))  # rounding must not put p outside


def difference(correct: np.ndarray, other: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """How much more accurate one policy is than another, and the 95 % interval of that.

    The difference is taken image by image, and run by run where both have as many runs: what makes an image hard, or a
    seed lucky, is common to both and cancels.

    The interval is that of a paired bootstrap (Efron, 1979): images are drawn with replacement, the same for both
    policies, and the middle 95 % of the differences on such draws are taken. Where there are several runs, one run
    less is drawn than there are, so that few runs vary as much as they should (Rao & Wu, 1988). Accuracies of runs on
    given images have no images to draw; their interval is Student's.

    Args:
        correct: `[runs, images]`, 1 where an image is classified correctly; or `[runs, 1]`, see `interval`.
        other: the same of the other policy, on the same images.
        seed: of the draws.

    Returns:
        Difference, lower and upper end; NaN ends for single numbers.
    """
    gap = float(correct.mean() - other.mean())
    if correct.shape[1] == 1:
        return gap, *_students_ends(gap, correct, other)
    generator = np.random.default_rng(seed)
    images = correct.shape[1]
    drawn = generator.multinomial(images, np.full(images, 1 / images), size=DRAWS) / images  # [draws, images]
    runs = [_drawn_runs(generator, len(correct))]
    runs.append(runs[0] if len(correct) == len(other) else _drawn_runs(generator, len(other)))
    means = [((drawn @ marks.T) * weights).sum(axis=1) for marks, weights in zip((correct, other), runs, strict=True)]
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(means[0] - means[1], [tail, 100 - tail])
    return gap, float(low), float(high)


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
