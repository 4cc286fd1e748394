"""Intervals of accuracies and of paired differences, against known numbers."""

from __future__ import annotations

import numpy as np
import pytest

from vitprune_env.benchmarking import difference, interval


def marks(runs: int, images: int, share: float, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).random((runs, images)) < share).astype(float)


def test_wilson_interval_by_hand() -> None:
    correct = np.array([[1.0] * 8 + [0.0] * 2])  # 8 of 10: Wilson's interval of the textbooks
    assert interval(correct) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    low, high = interval(np.ones((1, 20)))
    assert (low, high) == pytest.approx((0.8389, 1.0), abs=1e-4)
    for images in range(1, 60):  # the accuracy itself is never outside, whatever is rounded
        assert interval(np.ones((1, images)))[1] == 1 or images == 1
        assert interval(np.zeros((1, images)))[0] == 0 or images == 1


def test_interval_of_several_seeds_covers_the_spread_of_images_and_of_seeds() -> None:
    same = np.repeat(marks(1, 400, 0.7), 5, axis=0)  # seeds that agree tell nothing new
    low, high = interval(same)
    one = interval(same[:1])
    assert high - low == pytest.approx(one[1] - one[0], rel=0.1)
    apart = np.concatenate([np.ones((2, 400)), np.zeros((2, 400))])  # seeds that disagree altogether
    low, high = interval(apart)
    assert low < 0.1
    assert high > 0.9


def test_interval_of_runs_on_given_images_is_students_and_stays_within_0_and_1() -> None:
    accuracies = np.array([[0.974], [0.972], [0.976], [0.973], [0.975]])
    low, high = interval(accuracies)
    half = 2.776 * accuracies.std(ddof=1) / 5**0.5  # Student's quantile for 4 degrees of freedom
    assert (low, high) == pytest.approx((0.974 - half, 0.974 + half), abs=2e-4)
    low, high = interval(np.array([[0.95], [0.55]]))  # two runs say next to nothing
    assert 0 <= low < 0.1
    assert 0.95 < high <= 1
    assert np.isnan(interval(np.array([[0.9]]))).all()
    assert interval(np.array([[0.9], [0.9]])) == pytest.approx((0.9, 0.9))


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(300):
        luck = generator.normal(0.8, 0.05, size=(5, 1))  # of each run
        low, high = interval((generator.random((5, 200)) < luck).astype(float))
        hits += low < 0.8 < high
    assert 0.92 < hits / 300 <= 1


def test_differences_are_paired() -> None:
    base = marks(1, 500, 0.6)
    better = base.copy()
    better[0, np.flatnonzero(base[0] == 0)[:25]] = 1
    gain, low, high = difference(better, base)
    assert gain == pytest.approx(0.05)
    assert 0.03 < low < 0.05 < high < 0.075  # unpaired it would reach below 0
    assert difference(base, base) == (0.0, 0.0, 0.0)
    back, below, above = difference(base, better)
    assert (back, below, above) == pytest.approx((-gain, -high, -low))


def test_bootstrap_by_hand() -> None:
    """Of 10 images 5 are won: a draw wins as many as 10 throws of a coin show heads, 2 to 8 in the middle 95 %."""
    one = np.array([[1.0] * 5 + [0.0] * 5])
    assert difference(one, np.zeros((1, 10))) == pytest.approx((0.5, 0.2, 0.8))
    # Chances of 0 to 2 heads: 1, 10 and 45 of 1024; 2.5 % are 25.6 of 1024, so the end is at 2.
    assert 1 + 10 < 0.025 * 1024 < 1 + 10 + 45


def test_bootstrap_draws_runs_as_well() -> None:
    """Two runs of which one is right everywhere: a draw takes one of the two."""
    apart = np.array([[1.0] * 10, [0.0] * 10])
    assert difference(apart, np.zeros((1, 10))) == pytest.approx((0.5, 0.0, 1.0))
    assert difference(apart, apart) == (0.0, 0.0, 0.0)  # the same run of both


def test_differences_of_runs_on_given_images_are_students() -> None:
    first, second = np.array([[0.9], [0.8], [0.7]]), np.array([[0.8], [0.6], [0.7]])
    gap, low, high = difference(first, second)  # differences 0.1, 0.2 and 0
    assert gap == pytest.approx(0.1)
    half = 4.303 * 0.1 / 3**0.5  # Student's quantile for 2 degrees of freedom
    assert (low, high) == pytest.approx((0.1 - half, 0.1 + half), abs=1e-4)
    assert np.isnan(difference(first[:1], second[:1])[1:]).all()
