"""Bisection: where a cost that rises along a range meets a target."""

from __future__ import annotations

from collections.abc import Callable


def bisect(
    cost: Callable[[float], float],
    target: float,
    low: float,
    high: float,
    steps: int,
    done: Callable[[float, float], bool] | None = None,
) -> tuple[float, float]:
    """Halve a range until its ends lie close around the point where the cost reaches the target.

    Args:
        cost: never falls on the way from `low` to `high`; evaluated once per halving, in the middle of the range.
        target: the cost to meet.
        low: end of the range where the cost is below the target. It may be the larger number of the two, for a cost
            that falls with the number.
        high: end of the range where the cost is at least the target.
        steps: halvings, at most.
        done: whether the range `(low, high)` is narrow enough to stop early; None: it never is.

    Returns:
        `(low, high)`, the ends of the last range: the cost at `low` is below the target, at `high` it is not.
    """
    for _ in range(steps):
        if done is not None and done(low, high):
            break
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) < target else (low, middle)
    return low, high
