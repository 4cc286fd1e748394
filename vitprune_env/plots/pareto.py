"""Accuracy over cost of many methods, each named beside its line."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito, 2008: told apart by people who see few colours; black is that of the reference.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D00")
MARKERS = "osD^vPX"
GREY, PALE = "0.45", "0.72"
NEAR = 0.1  # the enlarged panel shows accuracies down to this far below the reference
LINE = 0.145  # inches from one name to the next


class Point(NamedTuple):
    """A method at one budget."""

    share: float  # GMACs as a share of the dense model's
    accuracy: float  # 0 to 1
    low: float  # of the accuracy's interval
    high: float


def pareto_figure(
    lines: Mapping[str, Sequence[Point]],
    reference: tuple[str, float] | None = None,
    muted: Container[str] = (),
    title: str = "",
) -> Figure:
    """Accuracy over cost, one line per method; a second panel enlarges accuracies close to the reference.

    The seven methods that are most accurate on average have colours, markers and intervals; the others are grey. Names
    stand beside the cheapest point of each line, in the order of accuracy there.

    Args:
        lines: points of each method, in any order.
        reference: name and accuracy of a model to compare with, drawn as a horizontal line; None: no line and no
            second panel.
        muted: methods that are drawn in pale grey and dashed, such as controls.
        title: of the figure.

    Raises:
        ValueError: if there are no methods, or one has no points.
    """
    if not lines or not all(lines.values()):
        raise ValueError("lines: expected methods with points, got none, or one without any")
    from matplotlib.figure import Figure

    shares = sorted({round(point.share, 2) for points in lines.values() for point in points})
    mean = {name: _mean(points, shares) for name, points in lines.items()}
    best = sorted((name for name in lines if name not in muted), key=lambda name: -mean[name])[: len(COLOURS)]
    near = reference is not None and any(p.accuracy > reference[1] - NEAR for line in lines.values() for p in line)
    height = max(4.5, LINE * len(lines) + 1.2)
    figure = Figure(figsize=(12.5 if near else 8.0, height), layout="constrained")
    panels = figure.subplots(1, 2 if near else 1, squeeze=False, width_ratios=(3, 2) if near else (1,))[0]
    styles = {name: _style(name, best, muted) for name in lines}
    for axes in panels:
        for name, points in lines.items():
            share, accuracy, low, high = np.array(sorted(points)).T
            if name in best:
                error = np.stack([accuracy - low, high - accuracy])
                axes.errorbar(share, accuracy, error, capsize=2, elinewidth=0.7, label=name, **styles[name])
            else:
                axes.plot(share, accuracy, label=name, **styles[name])
        if reference is not None:
            axes.axhline(reference[1], color="black", linestyle=":", label=f"{reference[0]} {reference[1]:.1%}")
            axes.annotate(
                f"{reference[0]} {reference[1]:.1%}", (1, reference[1]), (-2, 2), xycoords=("axes fraction", "data"),
                textcoords="offset points", ha="right", fontsize="small",
            )  # fmt: skip
        axes.set(xlabel="GMACs, share of dense, policy included")
        axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
        axes.yaxis.tick_right()
        axes.spines[["top", "left"]].set_visible(False)
        axes.grid(alpha=0.25)
    panels[0].set(title=title)
    panels[-1].yaxis.set_label_position("right")
    panels[-1].set(ylabel="accuracy, with 95 % intervals")
    _name_lines(panels[0], lines, {name: style["color"] for name, style in styles.items()}, best, height)
    if near and reference is not None:
        panels[1].set(ylim=(reference[1] - NEAR, min(1.0, reference[1] + NEAR / 5)), title=f"near {reference[0]}")
    return figure


def _mean(points: Sequence[Point], shares: Sequence[float]) -> float:
    """Mean accuracy over the budgets; 0 at budgets that the method cannot meet."""
    return sum(point.accuracy for point in points) / max(len(shares), len(points))


def _style(name: str, best: Sequence[str], muted: Container[str]) -> dict[str, Any]:
    """How a line is drawn."""
    if name in best:
        rank = best.index(name)
        return {"color": COLOURS[rank], "marker": MARKERS[rank], "markersize": 5, "linewidth": 1.4, "zorder": 3}
    if name in muted:
        return {"color": PALE, "marker": ".", "markersize": 4, "linewidth": 0.9, "linestyle": "--"}
    return {"color": GREY, "marker": ".", "markersize": 4, "linewidth": 0.8}


def _name_lines(
    axes: Axes, lines: Mapping[str, Sequence[Point]], colours: Mapping[str, str], bold: Sequence[str], height: float
) -> None:
    """Write the names on the left, each connected to the cheapest point of its line."""
    first = {name: min(points) for name, points in lines.items()}
    low, high = axes.get_ylim()
    gap = LINE / (0.8 * height)  # of the axes' height
    order = sorted(first, key=lambda name: first[name].accuracy)
    wanted = [(first[name].accuracy - low) / (high - low) for name in order]
    for name, place in zip(order, _apart(wanted, gap), strict=True):
        axes.annotate(
            name,
            (first[name].share, first[name].accuracy),
            (-0.03, place),
            textcoords="axes fraction",
            ha="right",
            va="center",
            fontsize="small",
            fontweight="bold" if name in bold else "normal",
            color=colours[name] if name in bold else GREY,
            arrowprops={"arrowstyle": "-", "color": colours[name], "linewidth": 0.5, "relpos": (1, 0.5)},
        )


def _apart(places: Sequence[float], gap: float) -> list[float]:
    """Rising places, moved as little as needed to lie at least `gap` apart, and from 0 to 1 if there is room."""
    up, down = list(places), list(places)
    for index in range(1, len(up)):
        up[index] = max(up[index], up[index - 1] + gap)
        down[-1 - index] = min(down[-1 - index], down[-index] - gap)
    between = [(one + other) / 2 for one, other in zip(up, down, strict=True)]  # still `gap` apart
    moved: list[float] = []
    for place in between:
        moved.append(max(place, moved[-1] + gap if moved else 0.0))
    ceiling = 1.0
    for index in reversed(range(len(moved))):
        moved[index] = min(moved[index], ceiling)
        ceiling = moved[index] - gap
    return moved
