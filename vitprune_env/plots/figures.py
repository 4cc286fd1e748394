"""Figures for reports: the tokens left of images after each site, learning curves, and what methods leave."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from vitprune_env.files import PathLike, replace_file
from vitprune_env.plots.render import Scene, class_name, draw_row, label_text, panel_size, tint, to_rgb
from vitprune_env.types import Site

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curve = Sequence[float] | Sequence[Sequence[float]]
HELD_OUT = "as deployed, held-out images"
PALE = "#a9bfd6"  # of what is less important than the line in front of it
LINE = 20  # characters of a line of text beside or above a panel
MAX_IMAGES = 8  # more images in a figure would be too small on a page
DPI = 200  # of figures in PNG files
PAGE, NAMES, OVER, UNDER = 7.0, 1.0, 0.3, 0.12  # inches: width, names beside panels, classes above and below them
NOTE = 0.2  # inches for the line below the panels that says what is what
MAX_PANEL = 1.4  # inches
NAME_LETTERS, PANEL_LETTERS = 17, 16  # in a line beside or above a panel
WRONG = "#D55E00"


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
    """One row per image: the image, then the tokens left of it after each site (as in RL4EViT, Fig. 5).

    Args:
        images: `[B, C, H, W]`, at most 8 of them.
        keep: `[T, B, N]` bool, tokens alive after each site (an `Episode`'s `keep`).
        grid_size: rows and columns of patches, N in all.
        sites: the T sites at which tokens were pruned.
        titles: one per image, written on its left, long lines broken; None: no titles.
        mean: of the images' normalisation, see `to_rgb`.
        std: likewise.
        columns: number of images per row of the figure.

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
            axes[0].set_ylabel(_lines(titles[index]) if titles else "", fontsize="small")
        else:
            for panel in axes:
                panel.set_axis_off()
    return figure


def _lines(text: str) -> str:
    """Text in lines that fit a panel."""
    return "\n".join(textwrap.fill(line, LINE) for line in text.splitlines())


def learning_curve_figure(
    updates: Sequence[float],
    accuracy: Curve,
    macs_share: Curve,
    references: Mapping[str, float] | None = None,
    budget: float | None = None,
    title: str = "",
    *,
    label: str = "trained",
    target: Sequence[float] | None = None,
    held_out: Sequence[tuple[float, float, float]] = (),
) -> Figure:
    """Accuracy over training, and below it the cost.

    Args:
        updates: `[U]`, the updates after which the policy was evaluated.
        accuracy: `[U]` in 0..1, or `[S, U]` for S runs, whose mean and range are drawn.
        macs_share: GMACs as a share of the dense model's; of the same shape as `accuracy`.
        references: accuracies to compare with, by name, such as that of the dense model.
        budget: the final target for `macs_share`.
        title: of the figure.
        label: what `accuracy` and `macs_share` are of.
        target: `[U]`, the target of every update, where it is approached; drawn in place of `budget`.
        held_out: for each validation the update, accuracy and `macs_share` of the greedy policy on held-out images;
            drawn as a line with markers in front of the others.

    Raises:
        ValueError: for curves that do not fit `updates`.
    """
    if target is not None and len(target) != len(updates):
        raise ValueError(f"target: expected {len(updates)} values, one for each update, got {len(target)}")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0, 5.0), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    for axes, name, values, column in ((upper, "accuracy", accuracy, 1), (lower, "macs_share", macs_share, 2)):
        if held_out:
            points = [row[column] for row in held_out]
            axes.plot([row[0] for row in held_out], points, "o-", color="C0", markersize=5, zorder=3, label=HELD_OUT)
        _curve(axes, name, updates, values, label, PALE if held_out else "C0", 1.1 if held_out else 1.5)
    for number, (name, value) in enumerate((references or {}).items(), start=1):
        upper.axhline(value, color=f"C{number}", linestyle=":", label=f"{name} {value:.1%}")
    if target is not None:
        label = f"target, {target[-1]:.0%} in the end"
        lower.plot(updates, target, color="black", linestyle="--", linewidth=1.2, zorder=4, label=label)
    elif budget is not None:
        lower.axhline(budget, color="black", linestyle="--", label=f"budget {budget:.0%}")
    upper.set(ylabel="accuracy", title=title, ylim=(None, min(upper.get_ylim()[1], 1.005)))  # 100 % is the most
    lower.set(ylabel="GMACs, share of dense", xlabel="updates", ylim=(0, None))
    for axes in (upper, lower):
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
        axes.legend(frameon=False, fontsize="small")
    return figure


def _curve(
    axes: Axes, name: str, updates: Sequence[float], values: Curve, label: str, colour: str, width: float
) -> None:
    """Draw one run, or the mean and the range of several."""
    runs = np.atleast_2d(np.asarray(values, dtype=float))
    if runs.ndim != 2 or runs.shape[1] != len(updates):
        raise ValueError(f"{name}: expected {len(updates)} values per run, one for each update, got {list(runs.shape)}")
    label = label if len(runs) == 1 else f"{label}, mean of {len(runs)} runs"
    axes.plot(updates, runs.mean(axis=0), color=colour, linewidth=width, label=label)
    axes.fill_between(updates, runs.min(axis=0), runs.max(axis=0), color=colour, alpha=0.2, linewidth=0)


def fates_figure(
    images: Tensor,
    sources: Mapping[str, Tensor],
    grid_size: tuple[int, int],
    labels: Sequence[int] | None = None,
    predicted: Mapping[str, Sequence[int]] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    class_names: Sequence[str] | None = None,
) -> Figure:
    """The tokens that several methods leave of the same images: the images, then one row per method.

    Pruned patches are white. Patches that were merged into one token have the same tint. Images that are read as
    another class have a red frame, and that class below them. The figure is as wide as the text of a page.

    Args:
        images: `[B, C, H, W]`, at most 8 of them.
        sources: for each method `[B, N]` int64, the token that every patch ended up in, -1 where it was pruned (an
            `Outcome`'s `source`).
        grid_size: rows and columns of patches, N in all.
        labels: true classes, written above the images.
        predicted: for each method the predicted classes; wrong ones are written below the panels.
        mean: of the images' normalisation, see `to_rgb`.
        std: likewise.
        class_names: of the classes, to write in place of their numbers.

    Raises:
        ValueError: for shapes that do not fit together, no methods or too many images.
    """
    if not 1 <= len(images) <= MAX_IMAGES:
        raise ValueError(f"images: expected 1 to {MAX_IMAGES} images, got {len(images)}")
    if not sources:
        raise ValueError("sources: expected at least one method, got none")
    for name, source in sources.items():
        if tuple(source.shape) != (expected := (len(images), grid_size[0] * grid_size[1])):
            raise ValueError(f"sources: expected shape [B, N] = {expected} of {name!r}, got {tuple(source.shape)}")
    from matplotlib.figure import Figure

    rgb = to_rgb(images, mean, std).permute(0, 2, 3, 1).numpy()
    rows, columns = len(sources) + 1, len(images)
    panel = min(MAX_PANEL, (PAGE - NAMES) / columns)
    width, height = NAMES + columns * panel, rows * (panel * rgb.shape[1] / rgb.shape[2] + UNDER) + OVER + NOTE
    figure = Figure(figsize=(width, height))
    bottom = (NOTE + UNDER) / height
    edges = {"left": NAMES / width, "right": 1 - 0.02 / width, "top": 1 - OVER / height, "bottom": bottom}
    table = figure.subplots(
        rows, columns, squeeze=False, gridspec_kw={**edges, "wspace": 0.05, "hspace": UNDER / panel}
    )
    for axes in table.flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    for name, row in zip(("image", *sources), table, strict=True):
        words = textwrap.fill(name.replace("_", " "), NAME_LETTERS)
        row[0].set_ylabel(words, rotation=0, ha="right", va="center", fontsize=7)
    for column, image in enumerate(rgb):
        label = None if labels is None else labels[column]
        table[0, column].imshow(image)
        text = "" if label is None else textwrap.fill(label_text(label, class_names), PANEL_LETTERS)
        table[0, column].set_title(text, fontsize=6, pad=2)
        for axes, (name, source) in zip(table[1:, column], sources.items(), strict=True):
            axes.imshow(tint(image, source[column].cpu().numpy(), grid_size))
            guess = None if predicted is None else predicted[name][column]
            if label is not None and guess is not None and guess != label:
                text = textwrap.shorten(class_name(guess, class_names), PANEL_LETTERS, placeholder="...")
                axes.set_xlabel(text, fontsize=6, color=WRONG, labelpad=1)
                axes.spines[:].set(visible=True, color=WRONG, linewidth=1.2)
    mistakes = "" if predicted is None else " A frame: read as the class below it."
    note = f"White: pruned. A tint: merged into one token.{mistakes}"
    figure.text(NAMES / width, 0.03 / height, note, fontsize=6, color="0.35")
    return figure


def save_figure(figure: Figure, path: PathLike) -> None:
    """Write a figure as PNG, for screens, and as PDF, for papers, beside each other; fonts are embedded in the PDF.

    Args:
        figure: to be written.
        path: without a suffix.

    Raises:
        StorageError: if the folder cannot be written.
    """
    import matplotlib as mpl

    with mpl.rc_context({"pdf.fonttype": 42}):
        kinds: dict[str, Any] = {".png": {}, ".pdf": {"metadata": {"CreationDate": None}}}  # the same bytes every time
        for suffix, options in kinds.items():
            content = io.BytesIO()
            figure.savefig(content, format=suffix[1:], dpi=DPI, **options)
            replace_file(Path(f"{path}{suffix}"), content.getvalue())
