"""When training may end before its last update: a rule that looks at the rows of the history alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

WINDOW = 10  # updates over which price and cost are averaged
ON_TARGET = 0.05  # how far the mean cost may be from its target, relative to it
STEADY = 0.2  # how far a mean may be from that of the window before; a cost that is 5 % off moves the price by 10 %

Rows = Sequence[Mapping[str, float]]


def reason_to_stop(history: Rows, patience: int, led: bool) -> str | None:
    """Why training may end after the last row of a history.

    The budget has to be reached: the target has been in its final place for two windows of updates, price and cost
    have hardly changed from one to the other, and the cost is on target. And accuracy on held-out images has to have
    stalled: the last `patience` validations were not above the best one before them. Only an update that was
    validated can be the last one.

    Args:
        history: one row of metrics per update.
        patience: validations without a new best one; 0: training does not end early.
        led: whether a price leads the cost to its target; otherwise the cost may settle anywhere.

    Returns:
        The reason in words; None: training goes on.
    """
    if not patience or not history or "validation_accuracy" not in history[-1]:
        return None
    validated = [row for row in history if "validation_accuracy" in row]
    before, last = validated[:-patience], validated[-patience:]
    if not before or not settled(history, led):
        return None
    best = max(before, key=lambda row: row["validation_accuracy"])
    if max(row["validation_accuracy"] for row in last) > best["validation_accuracy"]:
        return None
    return (
        f"price and cost have settled, and the last {patience} validations were not above "
        f"{best['validation_accuracy']:.1%}, that after update {best['update']:.0f}"
    )


def settled(history: Rows, led: bool) -> bool:
    """Whether price and cost have come to rest at the final target.

    Args:
        history: see `reason_to_stop`.
        led: likewise.
    """
    earlier, later = history[-2 * WINDOW : -WINDOW], history[-WINDOW:]
    target = later[-1]["target_share"]
    if len(earlier) < WINDOW or any(abs(row["target_share"] - target) > 1e-9 for row in (*earlier, *later)):
        return False
    for name in ("price", "share"):
        old, new = (fmean(row[name] for row in rows) for rows in (earlier, later))
        if abs(new - old) > STEADY * old:
            return False
    return not led or abs(fmean(row["share"] for row in later) - target) <= ON_TARGET * target
