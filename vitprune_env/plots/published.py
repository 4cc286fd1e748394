"""Marks for numbers that others published, which nobody takes for measurements of ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARKS = "D<>*hP"
GREY = "0.35"


def mark_published(axes: Axes, points: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """Add hollow grey marks, one kind for each source, with a legend that names the sources.

    Args:
        axes: of accuracy over cost.
        points: for each source pairs of cost and accuracy, in the units of the axes.
    """
    shown = []
    for (label, pairs), mark in zip(points.items(), MARKS * len(points), strict=False):
        cost, accuracy = zip(*pairs, strict=True)
        shown.append(
            axes.scatter(cost, accuracy, s=34, marker=mark, facecolors="none", edgecolors=GREY, zorder=2, label=label)
        )
    if shown:
        axes.legend(handles=shown, loc="upper center", bbox_to_anchor=(0.5, -0.1), frameon=False, fontsize="small")
