"""Intervals of accuracies and of paired differences, against known numbers."""

from __future__ import annotations

import numpy as np
import pytest

from vitprune_env.benchmarking import difference, interval, standard_error


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


GROUPS = np.array([7, 7, 3, 3, 3, 9])
GROUPED = np.array([[1.0, 1.0, 1.0, 0.0, 0.0, 1.0]])


def test_standard_error_of_groups_by_hand() -> None:
    """Mean 2/3; deviations of the groups add up to 2/3, -1 and 1/3: 3/2 of (4/9 + 1 + 1/9) over 6 squared."""
    assert standard_error(GROUPED, GROUPS) == pytest.approx((1.5 * (14 / 9) / 36) ** 0.5)
    assert standard_error(GROUPED) == pytest.approx((2 / 9 / 6) ** 0.5)
    twice = np.repeat(marks(1, 300, 0.7), 2, axis=1)  # every image twice tells no more than once
    pairs = np.arange(600) // 2
    assert standard_error(twice, pairs) == pytest.approx(standard_error(twice[:, ::2]), rel=0.01)
    assert standard_error(twice) < 0.75 * standard_error(twice, pairs)
    several = np.array([[1.0, 0.0], [1.0, 1.0]])  # runs: 0.5 and 1
    assert standard_error(several, np.array([4, 4])) == standard_error(several) == pytest.approx(0.25)


def test_interval_of_groups_is_that_of_as_many_independent_images_as_vary_alike() -> None:
    low, high = interval(GROUPED, GROUPS)
    n, z, p = (2 / 9) / (1.5 * (14 / 9) / 36), 4.302653, 2 / 3  # Student's quantile for 2 degrees of freedom
    centre, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    scale = 1 + z * z / n
    assert (low, high) == pytest.approx(((centre - half) / scale, (centre + half) / scale), abs=1e-6)
    right = np.ones((1, 40))  # nothing varies: as many independent images as groups
    assert interval(right, np.arange(40) // 2) == interval(right[:, ::2])
    two = np.repeat(marks(2, 300, 0.7), 2, axis=1)
    assert interval(two, np.arange(600) // 2) == pytest.approx(interval(two[:, ::2]), abs=1e-6)


def test_bootstrap_draws_whole_groups() -> None:
    """Ten groups of three, five won altogether: the same as ten images, of which five are won."""
    groups = np.repeat(np.arange(10), 3)
    one = np.repeat(np.array([[1.0] * 5 + [0.0] * 5]), 3, axis=1)
    assert difference(one, np.zeros((1, 30)), groups=groups) == pytest.approx((0.5, 0.2, 0.8))
    _, low, high = difference(one, np.zeros((1, 30)))
    assert 0.2 < low < high < 0.8
    # Groups of 1 and 3 images: a draw of both has the mean of all images, one of the large group alone its own mean.
    found = difference(np.array([[0.0, 1.0, 1.0, 1.0]]), np.zeros((1, 4)), groups=np.array([5, 2, 2, 2]))
    assert found == (0.75, 0.0, 1.0)


@pytest.mark.parametrize("runs", [1, 3])
def test_with_one_image_per_group_everything_is_as_without_groups(runs: int) -> None:
    one, other, own = marks(runs, 90, 0.7), marks(1, 90, 0.6, seed=1), np.random.default_rng(0).permutation(90)
    assert standard_error(one, own) == standard_error(one)
    assert interval(one, own) == interval(one)
    assert difference(one, other, groups=own) == difference(one, other)


def test_without_groups_the_numbers_of_earlier_versions_stay() -> None:
    one, other = marks(1, 90, 0.7), marks(1, 90, 0.6, seed=1)
    p = float(one.mean())
    assert standard_error(one) == (p * (1 - p) / 90) ** 0.5
    drawn = np.random.default_rng(0).multinomial(90, np.full(90, 1 / 90), size=5000) / 90
    ends = np.percentile((drawn @ one.T - drawn @ other.T)[:, 0], [2.5, 97.5])
    assert difference(one, other)[1:] == tuple(ends)


def test_a_single_group_tells_nothing_about_others() -> None:
    single = np.zeros(6, dtype=np.int64)
    assert np.isnan(standard_error(GROUPED, single))
    assert np.isnan(interval(GROUPED, single)).all()
    assert np.isnan(difference(GROUPED, 1 - GROUPED, groups=single)[1:]).all()


def test_groups_cover_the_truth_where_images_alone_do_not() -> None:
    """Images of one original are all right or all wrong; the truth is 0.8."""
    generator, groups = np.random.default_rng(0), np.repeat(np.arange(60), 5)
    draws = [np.repeat(generator.random((1, 60)) < 0.8, 5, axis=1).astype(float) for _ in range(200)]
    hits = [np.mean([low < 0.8 < high for low, high in found]) for found in (
        [interval(draw, groups) for draw in draws],
        [interval(draw) for draw in draws],
    )]  # fmt: skip
    assert 0.9 < hits[0] < 1
    assert hits[1] < 0.75
