"""Figures for reports: what is left of some images after each site, and how learning went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from vitprune_env.render import Scene, draw_row, panel_size, to_rgb
from vitprune_env.types import Site

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curve = Sequence[float] | Sequence[Sequence[float]]
MAX_IMAGES = 8  # images of a figure that stay readable on a page


def tokens_figure(
    images: Tensor,
    keep: Tensor,
    grid_size: tuple[int, int],
    sites: Sequence[int | str | Site],
    titles: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    columns: int = 1,
) -> Figure:
    """One row per image: the image, then what is left of it after each site (Fig. 5 of paper 000).

    Args:
        images: `[B, C, H, W]`, at most 8 of them.
        keep: `[T, B, N]` bool, tokens alive after each site (an `Episode`'s `keep`).
        grid_size: rows and columns of patches, N in all.
        sites: where the tokens were pruned, T of them.
        titles: one per image, written on its left; None: nothing.
        mean: of the images' normalisation, see `to_rgb`.
        std: likewise.
        columns: how many such rows to set side by side.

    Raises:
        ValueError: for shapes that do not fit together or too many images.
    """
    expected = (len(sites), len(images), grid_size[0] * grid_size[1])
    if tuple(keep.shape) != expected:
        raise ValueError(f"keep: expected shape [T, B, N] = {expected}, got {tuple(keep.shape)}")
    if not 1 <= len(images) <= MAX_IMAGES:
        raise ValueError(f"images: expected 1 to {MAX_IMAGES} images, got {len(images)}")
    if titles is not None and len(titles) != len(images):
        raise ValueError(f"titles: expected one for each of {len(images)} images, got {len(titles)}")
    from matplotlib.figure import Figure

    rows = -(-len(images) // columns)
    width, height = panel_size(rows, len(sites))
    figure = Figure(figsize=(columns * width, height), layout="constrained")
    blocks = [
        block.subplots(rows, len(sites) + 1, squeeze=False)
        for block in figure.subfigures(1, columns, wspace=0.04, squeeze=False)[0]
    ]
    rgb, kept = to_rgb(images, mean, std).permute(0, 2, 3, 1).numpy(), keep.cpu().numpy()
    for index, axes in enumerate(axes for block in blocks for axes in block):
        if index < len(images):
            scene = Scene(rgb[index], kept[:, index], grid_size, tuple(map(str, sites)))
            draw_row(axes, scene, first=index % rows == 0)
            axes[0].set_ylabel(titles[index] if titles else "")
        else:
            for panel in axes:
                panel.set_axis_off()
    return figure


def learning_curve_figure(
    updates: Sequence[float],
    accuracy: Curve,
    macs_share: Curve,
    references: Mapping[str, float] | None = None,
    budget: float | None = None,
    title: str = "",
) -> Figure:
    """Accuracy and cost over training, one above the other.

    Args:
        updates: `[U]`, when it was evaluated.
        accuracy: `[U]` in 0..1, or `[S, U]` for S runs: their mean and range are drawn.
        macs_share: GMACs as a share of the dense model's, of the same shape.
        references: accuracies to compare with, by name, such as the dense model's.
        budget: the share of GMACs to meet.
        title: of the figure.

    Raises:
        ValueError: for curves that do not fit `updates`.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0, 5.0), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    _curve(upper, "accuracy", updates, accuracy)
    for number, (name, value) in enumerate((references or {}).items(), start=1):
        upper.axhline(value, color=f"C{number}", linestyle=":", label=f"{name} {value:.1%}")
    _curve(lower, "macs_share", updates, macs_share)
    if budget is not None:
        lower.axhline(budget, color="black", linestyle="--", label=f"budget {budget:.0%}")
    upper.set(ylabel="accuracy", title=title)
    lower.set(ylabel="GMACs, share of dense", xlabel="updates", ylim=(0, None))
    for axes in (upper, lower):
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
        axes.legend(frameon=False, fontsize="small")
    return figure


def _curve(axes: Axes, name: str, updates: Sequence[float], values: Curve) -> None:
    runs = np.atleast_2d(np.asarray(values, dtype=float))
    if runs.ndim != 2 or runs.shape[1] != len(updates):
        raise ValueError(f"{name}: expected {len(updates)} values per run, one for each update, got {list(runs.shape)}")
    label = "trained" if len(runs) == 1 else f"trained, mean of {len(runs)} runs"
    axes.plot(updates, runs.mean(axis=0), color="C0", label=label)
    axes.fill_between(updates, runs.min(axis=0), runs.max(axis=0), color="C0", alpha=0.2, linewidth=0)
