"""Accuracy over cost of many methods: a few in colour with their names, the others grey, and the front of all."""

from __future__ import annotations

import textwrap
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito, 2008, without yellow and black, then indigo and brown: told apart by people who see few colours. Black is
# the reference.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#332288", "#8C6D00")
MARKERS = "osD^vPX*"
GREY, PALE, FRONT = "0.55", "0.7", "#F3E3B3"
NAMED_CONTROLS = 2  # have their names beside their lines; further ones are listed below
ROUGH = 0.005  # added to every error, so that an error of 0 has a place on the axis
SAME_COST = 0.01  # policies whose costs differ by less, in shares of dense, are not told apart by the front
TICKS = (1, 0, 0.5, 0.9, 0.8, 0.95, 0.7, 0.99, 0.2, 0.6, 0.85, 0.4, 0.97, 0.98, 0.3, 0.75, 0.1, 0.88, 0.92, 0.86, 0.84)
ENOUGH = 3  # of these ticks; where fewer fit, others are found
SPAN = 0.06  # of the axis of costs at least, in shares of dense
LINE = 0.135  # inches from one name to the next
LETTERS = 146  # in a line of the list below


class Point(NamedTuple):
    """A method at one budget."""

    share: float  # GMACs as a share of the dense model's
    accuracy: float  # 0 to 1
    low: float  # of the accuracy's interval
    high: float


Lines = Mapping[str, Sequence[Point]]


def best_of(lines: Lines, ours: Container[str] = (), count: int = len(COLOURS)) -> list[str]:
    """The names of a few methods: ours first, and then by mean accuracy, which is 0 at budgets that are not met."""
    shares = {round(point.share, 2) for points in lines.values() for point in points}

    def mean(name: str) -> float:
        return sum(point.accuracy for point in lines[name]) / max(len(shares), len(lines[name]))

    return sorted(lines, key=lambda name: (name not in ours, -mean(name)))[:count]


def front_of(points: Iterable[Point]) -> list[Point]:
    """The points that no other beats at the same or a lower cost, the cheapest first."""
    found = sorted(set(points))
    return [
        point
        for point in found
        if not any(other.accuracy > point.accuracy and other.share < point.share + SAME_COST for other in found)
    ]


def pareto_figure(
    lines: Lines,
    reference: tuple[str, float] | None = None,
    muted: Container[str] = (),
    title: str = "",
    *,
    ours: Container[str] = (),
    shown: Sequence[str] | None = None,
) -> Figure:
    """Accuracy over cost, one line per method, as wide as the text of a page.

    The axis of accuracies is logarithmic in the error, so that what is close to the reference can be told apart and
    nothing is cut off. A broad line behind the others is the front: the methods that no cheaper one beats. Names stand
    left of the cheapest point of their lines; those of grey lines are listed below.

    Args:
        lines: points of each method, in any order.
        reference: name and accuracy of a model to compare with, drawn as a horizontal line; None: no line.
        muted: controls, drawn pale and dashed; the first two have names and intervals.
        title: of the figure.
        ours: methods to emphasise.
        shown: methods to draw in colour with intervals, at most eight; None: ours, and the most accurate on average.

    Raises:
        ValueError: if there are no methods, one has no points, or too many are to be in colour.
    """
    if not lines or not all(lines.values()):
        raise ValueError("lines: expected methods with points, got none, or one without any")
    methods = {name: points for name, points in lines.items() if name not in muted}
    shown = best_of(methods, ours) if shown is None else shown
    if len(shown) > len(COLOURS):
        raise ValueError(f"shown: expected at most {len(COLOURS)} methods, got {len(shown)}")
    from matplotlib.figure import Figure

    controls = [name for name in lines if name in muted]
    named = [*shown, *controls[:NAMED_CONTROLS]]
    front = front_of(point for points in methods.values() for point in points)
    notes = _notes(len(front) > 1, best_of(methods, count=len(methods)), shown, controls)
    below = 0.13 * (notes.count("\n") + 1) + 0.08
    height = max(3.6, LINE * (len(named) + 1) + 1.0)
    figure = Figure(figsize=(7.2, height + below))
    figure.set_layout_engine("constrained", rect=(0, below / (height + below), 1, height / (height + below)))
    figure.text(0.01, 0.05 / (height + below), notes, fontsize=7, color="0.35", va="bottom")
    axes = figure.subplots()
    axes.plot(*np.array(front).T[:2], color=FRONT, linewidth=8, solid_capstyle="round", zorder=0, label="front")
    for name, points in lines.items():
        share, accuracy, low, high = np.array(sorted(points)).T
        style = _style(name, shown, muted, name in ours)
        if name in named:
            error = np.stack([accuracy - low, high - accuracy])
            axes.errorbar(share, accuracy, error, capsize=1.5, elinewidth=0.6, capthick=0.6, label=name, **style)
        else:
            axes.plot(share, accuracy, label=name, **style)
    if reference is not None:
        axes.axhline(reference[1], color="black", linestyle=":", linewidth=1.2, label=reference[0])
    _scale(axes, lines, named, reference)
    at_least(axes, SPAN)
    axes.set_xlabel("GMACs, share of dense, policy included", fontsize=9)
    axes.set_ylabel("accuracy, with 95 % intervals", fontsize=9)
    axes.set_title(title, fontsize=10)
    axes.tick_params(labelsize=8)
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
    axes.yaxis.tick_right()
    axes.yaxis.set_label_position("right")
    axes.spines[["top", "left"]].set_visible(False)
    axes.grid(alpha=0.25)
    _name_lines(axes, lines, named, shown, reference, ours, height)
    return figure


def _notes(has_front: bool, methods: Sequence[str], shown: Sequence[str], controls: Sequence[str]) -> str:
    """What the lines without names are."""
    front = "Broad line: the front; no policy beats those on it at the same cost or a lower one."
    parts = [front] if has_front else []
    others = [name for name in methods if name not in shown]
    if others:
        parts.append(f"Grey, the most accurate first: {', '.join(others)}.")
    if controls:
        further = controls[NAMED_CONTROLS:]
        unnamed = f"; without names and intervals {', '.join(further)}" if further else ""
        parts.append(f"Pale: controls{unnamed}.")
    return "\n".join(textwrap.fill(part, LETTERS) for part in parts)


def _style(name: str, shown: Sequence[str], muted: Container[str], is_ours: bool) -> dict[str, Any]:
    """How a line is drawn."""
    if name in shown:
        rank = shown.index(name)
        return {"color": COLOURS[rank], "marker": MARKERS[rank], "markersize": 5 if is_ours else 4.5,
                "linewidth": 2.2 if is_ours else 1.1, "zorder": 4 if is_ours else 3}  # fmt: skip
    if name in muted:
        return {"color": PALE, "marker": ".", "markersize": 3, "linewidth": 0.8, "linestyle": "--", "zorder": 1}
    return {"color": GREY, "marker": ".", "markersize": 3, "linewidth": 0.5, "zorder": 2}


def at_least(axes: Axes, span: float) -> None:
    """Widen the axis of costs: policies at one budget are not to look far apart."""
    low, high = axes.get_xlim()
    missing = max(span - (high - low), 0.0) / 2
    axes.set_xlim(low - missing, high + missing)


def _scale(axes: Axes, lines: Lines, named: Container[str], reference: tuple[str, float] | None) -> None:
    """An axis logarithmic in the error, that holds all points and the intervals drawn, with readable ticks."""
    ends = [] if reference is None else [reference[1]]
    for name, points in lines.items():
        drawn = [end for point in points for end in (point[1:] if name in named else point[1:2])]
        ends += [end for end in drawn if np.isfinite(end)]
    bottom, top = float(_place(min(ends))), float(_place(max(ends)))
    room = 0.04 * max(top - bottom, 0.05)
    axes.set_yscale("function", functions=(_place, _accuracy))
    low, high = float(_accuracy(bottom - room)), float(_accuracy(top + room))
    axes.set_ylim(low, high)
    chosen: list[float] = []
    for tick in (*TICKS, *np.linspace(min(ends), max(ends), 4).round(3)):
        if len(chosen) >= ENOUGH and tick not in TICKS:
            break
        if low <= tick <= high and all(abs(_place(tick) - _place(other)) > 1.7 * room for other in chosen):
            chosen.append(float(tick))
    axes.set_yticks(sorted(chosen), [f"{100 * tick:g}%" for tick in sorted(chosen)])
    axes.minorticks_off()


def _place(accuracy: Any) -> Any:
    """Where an accuracy stands on the axis."""
    return -np.log(np.maximum(1 + ROUGH - np.asarray(accuracy, dtype=float), ROUGH / 2))


def _accuracy(place: Any) -> Any:
    """The accuracy at a place of the axis."""
    return 1 + ROUGH - np.exp(-np.asarray(place, dtype=float))


def _name_lines(
    axes: Axes,
    lines: Lines,
    named: Sequence[str],
    shown: Container[str],
    reference: tuple[str, float] | None,
    ours: Container[str],
    height: float,
) -> None:
    """Write names on the left, each connected to the cheapest point of its line."""
    colours = {name: COLOURS[rank] if name in shown else PALE for rank, name in enumerate(named)}
    left, right = axes.get_xlim()
    axes.set_xlim(left, right)
    first = {name: (min(lines[name]).share, min(lines[name]).accuracy) for name in named}
    texts = {name: name for name in named}
    if reference is not None:
        first[reference[0]], texts[reference[0]] = (left, reference[1]), f"{reference[0]} {reference[1]:.1%}"
        colours[reference[0]] = "black"
    low, high = (float(_place(end)) for end in axes.get_ylim())
    order = sorted(first, key=lambda name: first[name][1])
    wanted = [(float(_place(first[name][1])) - low) / (high - low) for name in order]
    for name, place in zip(order, _apart(wanted, LINE / (0.8 * height)), strict=True):
        axes.annotate(
            texts[name],
            first[name],
            (-0.03, place),
            textcoords="axes fraction",
            ha="right",
            va="center",
            fontsize=8,
            fontweight="bold" if name in ours else "normal",
            color="0.4" if colours[name] == PALE else colours[name],
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
