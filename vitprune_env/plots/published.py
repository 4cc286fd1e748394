"""What pruning costs here and in papers, so drawn that nobody takes a number of theirs for one of ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any, NamedTuple

from vitprune_env.plots.pareto import COLOURS, SPAN, at_least

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURED = 7  # methods with a colour; the others are grey
GREY = "0.6"
MARKS = "D<>*hPs"  # of sources
OTHERS = "published, in the colour of the method: measured by others on other images"


class PublishedMark(NamedTuple):
    """A number that is printed in a paper."""

    method: str  # its name among ours
    source: str  # paper and table
    share: float  # of the dense GMACs
    change: float  # of the accuracy, in points, against the paper's own dense network


def published_figure(ours: Mapping[str, Sequence[tuple[float, float]]], theirs: Sequence[PublishedMark]) -> Figure:
    """Change of accuracy over cost: ours as lines with full marks, those of papers as hollow marks of the same colour.

    Args:
        ours: for each method shares of the dense GMACs, and changes of the accuracy against the dense network in
            points. The methods that papers print most numbers of have colours.
        theirs: the numbers of papers; each source has a mark of its own.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    often = sorted(ours, key=lambda name: -sum(mark.method == name for mark in theirs))
    colours = dict(zip(often[:COLOURED], COLOURS, strict=False))
    marks = dict(zip(dict.fromkeys(mark.source for mark in theirs), cycle(MARKS), strict=False))
    figure = Figure(figsize=(8.0, 5.6), layout="constrained")
    axes = figure.subplots()
    lines = []
    for name, points in ours.items():
        share, change = zip(*sorted(points), strict=True)
        style: dict[str, Any] = {"marker": "o", "markersize": 5, "linewidth": 1.3, "color": colours.get(name, GREY)}
        lines += axes.plot(share, change, label=name, **style)
    for mark in theirs:
        axes.scatter(mark.share, mark.change, s=38, marker=marks[mark.source], facecolors="none", linewidths=1.0,
                     edgecolors=colours.get(mark.method, GREY))  # fmt: skip
    axes.axhline(0, color="black", linestyle=":", linewidth=1)
    axes.set_yscale("symlog", linthresh=3)  # most numbers of papers lie within a point, a few far below
    ticks = [sign * size for size in (1, 2, 3, 5, 10, 20, 40, 80) for sign in (1, -1)]
    axes.set_yticks([0, *ticks], labels=["0", *(f"{tick:+d}" for tick in ticks)])
    axes.minorticks_off()
    changes = [-1.0, 0.0, *(mark.change for mark in theirs), *(change for each in ours.values() for _, change in each)]
    axes.set(xlabel="GMACs, share of dense", ylabel="top-1 against the own dense network, points")
    axes.set(ylim=(1.3 * min(changes), max(changes) + 0.5))
    at_least(axes, SPAN)
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    hollow: dict[str, Any] = {"linestyle": "", "markerfacecolor": "none", "color": "0.3"}
    sources = [Line2D([], [], marker=mark, label=source, **hollow) for source, mark in marks.items()]
    small: dict[str, Any] = {"frameon": False, "fontsize": "small", "ncols": 2}
    figure.legend(handles=lines, title="measured here", loc="outside right upper", **{**small, "ncols": 1})
    if sources:
        figure.legend(handles=sources, title=OTHERS, loc="outside lower center", **small)
    return figure
