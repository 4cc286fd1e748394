"""Figures of what a policy does image by image, layer by layer and patch by patch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch import Tensor

from vitprune_env.plots.pareto import COLOURS, MARKERS
from vitprune_env.plots.render import to_rgb

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RIGHT, WRONG = COLOURS[0], COLOURS[1]  # of images that are read correctly, and of the others
REASONS = {"dropped": COLOURS[1], "merged": COLOURS[2], "waiting": COLOURS[5]}  # why a token does not go on
MAX_IMAGES = 8  # more maps would be too small on a page


class Part(NamedTuple):
    """Images whose x lies in the same part of its range."""

    centre: float  # median of x
    mean: float  # of y
    low: float  # of the mean's 95 % interval
    high: float
    images: int


class Mark(NamedTuple):
    """A policy at one budget."""

    share: float  # of the dense GMACs
    score: float  # mean over images
    accuracy: float  # 0 to 1
    low: float  # of the accuracy's 95 % interval
    high: float


def difficulty_figure(
    difficulty: np.ndarray, tokens: np.ndarray, correct: np.ndarray, parts: Sequence[Part], name: str, text: str
) -> Figure:
    """Tokens kept of each image over how hard it is for the dense network.

    Args:
        difficulty: `[M]`.
        tokens: `[M]`, mean number of patch tokens in a block.
        correct: `[M]` bool, whether the pruned network is right.
        parts: means of `tokens` over images of similar difficulty.
        name: what the difficulty is, for the axis.
        text: the rank correlation, for the title.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4.5), layout="constrained")
    axes = figure.subplots()
    for flag, colour, mark, label in ((True, RIGHT, "o", "correct when pruned"), (False, WRONG, "x", "misread")):
        rows = correct == flag
        axes.scatter(difficulty[rows], tokens[rows], s=12, marker=mark, color=colour, alpha=0.45, linewidths=0.9,
                     label=f"{rows.sum()} {label}")  # fmt: skip
    middle, mean, low, high = np.array([part[:4] for part in parts]).T
    axes.errorbar(middle, mean, np.stack([mean - low, high - mean]), color="black", marker="s", markersize=4,
                  linewidth=1.3, capsize=2, label="means of equal parts, 95 %")  # fmt: skip
    axes.set(xlabel=name, ylabel="patch tokens, mean over blocks", ylim=(0, None))
    axes.set_title(f"rank correlation {text}", fontsize="medium")
    _plain(axes)
    figure.legend(frameon=False, fontsize="small", loc="outside lower center", ncols=3)
    return figure


def diversity_figure(lines: Mapping[str, Sequence[Mark]], parts: Sequence[Part], name: str, text: str) -> Figure:
    """Accuracy over the diversity score of policies at several budgets, and of the images of one policy.

    Args:
        lines: for each policy its marks.
        parts: accuracies over images of one policy with similar scores per token.
        name: of this policy.
        text: how score and accuracy of its images go together.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for (label, marks), colour, marker in zip(lines.items(), cycle(COLOURS), cycle(MARKERS), strict=False):
        score, accuracy, low, high = np.array([mark[1:] for mark in sorted(marks)]).T
        left.errorbar(score, accuracy, np.stack([accuracy - low, high - accuracy]), color=colour, marker=marker,
                      markersize=5, linewidth=1.3, elinewidth=0.7, capsize=2, label=label)  # fmt: skip
        for mark in marks:
            left.annotate(f"{mark.share:.0%}", (mark.score, mark.accuracy), (5, -9), textcoords="offset points",
                          fontsize="x-small", color=colour)  # fmt: skip
    left.set(xlabel="diversity score r(Z) after the last site, mean over images", ylabel="accuracy, 95 %")
    left.set_title("policies at several shares of the dense GMACs", fontsize="medium")
    left.margins(0.12)
    left.legend(frameon=False, fontsize="small", loc="lower right")
    middle, mean, low, high = np.array([part[:4] for part in parts]).T
    right.errorbar(middle, mean, np.stack([mean - low, high - mean]), color="black", marker="s", markersize=4,
                   linewidth=1.3, capsize=2)  # fmt: skip
    right.set(xlabel="score per token of an image", ylabel="accuracy of equally many images, 95 %")
    right.set_title(f"images of {name}\n{text}", fontsize="medium")
    for axes in (left, right):
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
        _plain(axes)
    return figure


def layers_figure(
    rows: Sequence[Mapping[str, Any]], thresholds: Mapping[str, Sequence[float]], num_tokens: int, depth: int
) -> Figure:
    """Tokens that go through every layer, why the others left, and the thresholds that decided.

    Args:
        rows: for each site `site`, `block` (where it is), `kept`, `kept_p10`, `kept_p90`, `dropped`, `merged` and
            `waiting`, means over images.
        thresholds: for each kind one value per site; none: the policy has no thresholds.
        num_tokens: N.
        depth: blocks of the network.
    """
    from matplotlib.figure import Figure

    count = 2 + len(thresholds)
    figure = Figure(figsize=(7.0, 2.1 + 1.7 * count), layout="constrained")
    panels = figure.subplots(count, 1, sharex=True, height_ratios=(3, 2, *[2] * len(thresholds)))
    place = np.array([row["block"] for row in rows])
    edges = np.array([0.0, *place, depth])
    kept, low, high = (np.array([num_tokens, *(row[key] for row in rows)]) for key in ("kept", "kept_p10", "kept_p90"))
    panels[0].stairs(kept, edges, color=RIGHT, linewidth=1.8, baseline=None, label="mean over images")
    panels[0].stairs(high, edges, baseline=low, fill=True, color=RIGHT, alpha=0.22, label="80 % of the images")
    panels[0].set(ylabel="patch tokens", ylim=(0, None))
    panels[0].legend(frameon=False, fontsize="small")
    width, below = 0.7 * min(1.0, np.diff(edges)[1:].min()), np.zeros(len(rows))
    for reason, colour in REASONS.items():
        values = np.array([row[reason] for row in rows])
        if values.any():
            panels[1].bar(place, values, width, bottom=below, color=colour, label=reason)
            below = below + values
    panels[1].set(ylabel="tokens that\ndo not go on")
    if below.any():
        panels[1].legend(frameon=False, fontsize="small")
    for panel, (name, values), colour in zip(panels[2:], thresholds.items(), cycle(COLOURS[3:]), strict=False):
        panel.plot(place, values, color=colour, marker="o", markersize=4, linewidth=1.2)
        panel.set(ylabel=f"threshold on\n{name.replace(' (', chr(10) + '(')}")
    panels[-1].set(
        xlabel="block after which, or within which, a decision falls", xlim=(0, depth), xticks=range(depth + 1)
    )
    for panel in panels:
        _plain(panel)
    return figure


def lives_figure(
    images: Tensor,
    lives: np.ndarray,
    shown: np.ndarray,
    grid_size: tuple[int, int],
    depth: int,
    titles: Sequence[str] = (),
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Figure:
    """How many blocks each patch passes: maps of some images, a histogram of all, and the mean at every place.

    Args:
        images: `[B, C, H, W]`, at most 8 of them.
        lives: `[M, N]`, of all images, in blocks.
        shown: `[B, N]`, of the images drawn.
        grid_size: rows and columns of patches, N in all.
        depth: blocks of the network, the longest life.
        titles: one per image; none: no titles.
        mean: of the images' normalisation, see `to_rgb`.
        std: likewise.

    Raises:
        ValueError: for too many images, or lives of other images.
    """
    if not 1 <= len(images) <= MAX_IMAGES or len(images) != len(shown):
        raise ValueError(f"images: expected 1 to {MAX_IMAGES} images with lives, got {len(images)} and {len(shown)}")
    from matplotlib.figure import Figure

    lines = -(-len(images) // 2)
    figure = Figure(figsize=(11.0, max(4.6, 1.75 * lines + 0.6)), layout="constrained")
    maps, sides = figure.subfigures(1, 2, width_ratios=(3, 2), squeeze=False)[0]
    table = maps.subplots(lines, 4, squeeze=False)
    rgb = to_rgb(images, mean, std).permute(0, 2, 3, 1).numpy()
    scale: dict[str, Any] = {"vmin": 0, "vmax": depth, "cmap": "viridis"}
    for panel in table.flat:
        panel.set_axis_off()
    for index, image in enumerate(rgb):
        picture, lived = table[index % lines, 2 * (index // lines) : 2 * (index // lines) + 2]
        picture.imshow(image)
        picture.set_title(titles[index] if titles else "", fontsize="small")
        lived.imshow(shown[index].reshape(grid_size), **scale)
        lived.set_title(f"mean {shown[index].mean():.1f}", fontsize="small")
    upper, lower = sides.subplots(2, 1, height_ratios=(2, 3))
    values, counts = np.unique(lives, return_counts=True)
    upper.bar(values, counts / counts.sum(), width=0.4, color=RIGHT)
    upper.set(xlabel="life of a patch, in blocks", ylabel="patches", xlim=(0, depth + 0.5), xticks=range(depth + 1))
    upper.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
    _plain(upper)
    place = lower.imshow(lives.mean(axis=0).reshape(grid_size), **scale)
    lower.set_title(f"mean over {len(lives)} images", fontsize="medium")
    lower.set(xticks=[], yticks=[])
    sides.colorbar(place, ax=lower, label="blocks, in all maps")
    return figure


def _plain(axes: Axes) -> None:
    """The look of all these figures."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
