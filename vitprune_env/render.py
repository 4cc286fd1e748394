"""Pictures of the game: which tokens are left after each site, as text, pixels, window or figure; learning curves.

As in Fig. 5 of RL4EViT (paper 000) there is one panel per site, and tokens that were pruned earlier are white; those
that leave at the panel's own site are orange. matplotlib is imported only by what needs it.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from gymnasium import logger
from torch import Tensor

from vitprune_env.game import TokenGame
from vitprune_env.types import Site

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

Curve = Sequence[float] | Sequence[Sequence[float]]

RENDER_MODES = ("human", "rgb_array", "ansi")
MAX_IMAGES = 8  # rows of a figure that stay readable on a page
PANEL_PIXELS = 240  # smallest height of a panel of mode rgb_array
ALIVE, MARKS = "#", "123456789abcdefghijklmnopqrstuvwxyz"
GONE_EARLIER, GONE_HERE, BACKGROUND = (1.0, 1.0, 1.0), (0.94, 0.55, 0.13), (0.45, 0.45, 0.45)
COVER = 0.88  # how much of a pruned patch its colour hides


def to_rgb(images: Tensor, mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> Tensor:
    """Undo the normalisation of images, for display.

    Args:
        images: `[B, C, H, W]`; a single channel becomes grey, of other than 3 channels the mean is shown.
        mean: of each channel, as subtracted; None (or no `std`): stretch each image to its own minimum and maximum.
        std: of each channel, as divided by.

    Returns:
        `[B, 3, H, W]` float32 in 0..1.
    """
    images = images.detach().float().cpu()
    if images.shape[1] != 3:
        images = images.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1)
    if mean is not None and std is not None:
        images = images * torch.tensor(std).view(-1, 1, 1) + torch.tensor(mean).view(-1, 1, 1)
    else:
        low, high = images.amin(dim=(1, 2, 3), keepdim=True), images.amax(dim=(1, 2, 3), keepdim=True)
        images = (images - low) / (high - low).clamp(min=1e-6)
    return images.clamp(0, 1)


def site_title(site: int | str | Site) -> str:
    """What to write over the panel of a site."""
    site = Site.parse(site)
    return f"in block {site.block}" if site.inside else f"after block {site.block}"


def shade(image: np.ndarray, before: np.ndarray, after: np.ndarray, grid_size: tuple[int, int]) -> np.ndarray:
    """Cover the pruned patches of an image.

    Args:
        image: `[H, W, 3]` in 0..1.
        before: `[N]` bool, tokens alive before the site; the others are covered with white.
        after: `[N]` bool, tokens alive after it; those that leave are covered with orange.
        grid_size: rows and columns of patches, N in all.

    Returns:
        `[H, W, 3]` in 0..1.
    """
    (height, width, _), (rows, columns) = image.shape, grid_size
    pixels = np.ix_(np.arange(height) * rows // height, np.arange(width) * columns // width)
    out = image.copy()
    for gone, colour in ((~before, GONE_EARLIER), (before & ~after, GONE_HERE)):
        where = gone.reshape(grid_size)[pixels]
        out[where] = (1 - COVER) * out[where] + COVER * np.array(colour)
    return out


@dataclass(frozen=True)
class Scene:
    """What there is to see of one image's game so far."""

    image: np.ndarray  # [H, W, 3] in 0..1
    keep: np.ndarray  # [t, N] bool, tokens left after each of the t steps played
    grid_size: tuple[int, int]  # rows and columns of patches, N in all
    sites: tuple[str, ...]  # T of them
    label: int | None = None  # the true class
    prediction: int | None = None  # the predicted class, once the game is over

    @classmethod
    def of(cls, game: TokenGame, rgb: Tensor, label: int | None = None) -> Scene:
        """The first image of a game that is being played or over.

        Args:
            game: the game.
            rgb: the image `[3, H, W]` in 0..1.
            label: its true class.
        """
        played = [step.kept[0].cpu().numpy() for step in game.steps]
        return cls(
            image=rgb.permute(1, 2, 0).cpu().numpy(),
            keep=np.array(played, dtype=bool).reshape(-1, game.num_agents),
            grid_size=game.backbone.grid_size,
            sites=tuple(site.label for site in game.sites),
            label=label,
            prediction=int(game.outcome().logits[0].argmax()) if len(played) == game.num_steps else None,
        )

    @property
    def title(self) -> str:
        """True and predicted class, as far as known."""
        true = "" if self.label is None else f"class {self.label}, "
        if self.prediction is None:
            return f"{true}not classified yet"
        return f"{true}predicted {self.prediction}"

    @property
    def alive(self) -> np.ndarray:
        """`[t + 1, N]` bool, tokens alive at the start and after each step."""
        return np.concatenate([np.ones((1, int(np.prod(self.grid_size))), dtype=bool), self.keep])

    def ansi(self) -> str:
        """A grid of characters, each telling at which step its token was pruned, a legend and the classes."""
        steps_survived = self.keep.sum(axis=0)
        symbols = (MARKS + "+" * len(self.keep))[: len(self.keep)] + ALIVE
        grid = np.array(list(symbols))[steps_survived].reshape(self.grid_size)
        legend = [f"{ALIVE} alive: {int(self.alive[-1].sum())}"]
        left = self.alive[:-1].sum(axis=1) - self.keep.sum(axis=1)
        legend += [f"{symbols[i]} pruned {site_title(self.sites[i])}: {count}" for i, count in enumerate(left)]
        return "\n".join([*(" ".join(row) for row in grid), *legend, self.title])

    def rgb_array(self) -> np.ndarray:
        """The image, then one panel per site (grey until it is reached), side by side; `[H', W', 3]` uint8."""
        alive = self.alive
        panels = [self.image]
        panels += [shade(self.image, alive[i], alive[i + 1], self.grid_size) for i in range(len(self.keep))]
        panels += [np.broadcast_to(BACKGROUND, self.image.shape)] * (len(self.sites) - len(self.keep))
        factor = max(1, -(-PANEL_PIXELS // len(self.image)))
        gap = np.broadcast_to(BACKGROUND, (factor * len(self.image), max(2, PANEL_PIXELS // 24), 3))
        parts = [part for panel in panels for part in (panel.repeat(factor, 0).repeat(factor, 1), gap)]
        return (np.concatenate(parts[:-1], axis=1) * 255).round().astype(np.uint8)


class Viewer:
    """Shows scenes in one of the render modes of a PettingZoo environment.

    Args:
        mode: None, `"human"`, `"rgb_array"` or `"ansi"`.
        title: of the window of mode human.

    Raises:
        ValueError: for an unknown mode.
    """

    def __init__(self, mode: str | None, title: str) -> None:
        if mode not in (None, *RENDER_MODES):
            raise ValueError(f"render_mode: expected None or one of {RENDER_MODES}, got {mode!r}")
        self.mode, self.title = mode, title
        self._figure: Figure | None = None
        self._blind = False  # there is no display

    def draw(self, scene: Scene) -> np.ndarray | str | None:
        """The scene as a string (ansi) or as `[H', W', 3]` uint8 (rgb_array); nothing for a window (human)."""
        if self.mode == "ansi":
            return scene.ansi()
        if self.mode == "rgb_array":
            return scene.rgb_array()
        if self.mode == "human":
            self._show(scene)
        else:
            logger.warn("render: nothing is drawn without a render_mode; expected 'human', 'rgb_array' or 'ansi'")
        return None

    def close(self) -> None:
        """Close the window, if there is one."""
        if self._figure is not None:
            from matplotlib import pyplot

            pyplot.close(self._figure)
            self._figure = None

    def _show(self, scene: Scene) -> None:
        if self._blind:
            return
        if self._figure is None:
            self._figure = self._open(scene)
        if self._figure is not None:
            self._figure.clear()
            _draw_row(_panels(self._figure, 1, len(scene.sites))[0], scene)
            self._figure.suptitle(scene.title)
            self._figure.canvas.draw_idle()
            self._figure.canvas.flush_events()

    def _open(self, scene: Scene) -> Figure | None:
        """A window; None, with a warning, where there is no display."""
        # Only pyplot knows which toolkit is there and can run its event loop.
        from matplotlib import pyplot

        try:
            figure = pyplot.figure(self.title, figsize=_size(1, len(scene.sites)), layout="constrained")
            if getattr(figure.canvas, "required_interactive_framework", None) is not None:
                figure.show()
                return figure
            pyplot.close(figure)
            reason = f"matplotlib's backend {pyplot.get_backend()} opens no windows"
        except Exception as error:  # each toolkit raises errors of its own when it finds no display
            reason = str(error)
        self._blind = True
        warnings.warn(f"render_mode 'human' shows nothing: {reason}; use 'rgb_array' or 'ansi'", stacklevel=5)
        return None


def tokens_figure(
    images: Tensor,
    keep: Tensor,
    grid_size: tuple[int, int],
    sites: Sequence[int | str | Site],
    titles: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Figure:
    """One row per image: the image, then what is left of it after each site (Fig. 5 of paper 000).

    Args:
        images: `[B, C, H, W]`, at most 8 of them.
        keep: `[T, B, N]` bool, tokens alive after each site (an `Episode`'s `keep`).
        grid_size: rows and columns of patches, N in all.
        sites: where the tokens were pruned, T of them.
        titles: one per image, written on its left; None: nothing.
        mean: of the normalisation, see `to_rgb`.
        std: of the normalisation, see `to_rgb`.

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

    figure = Figure(figsize=_size(len(images), len(sites)), layout="constrained")
    labels = tuple(Site.parse(site).label for site in sites)
    rgb, kept = to_rgb(images, mean, std).permute(0, 2, 3, 1).numpy(), keep.cpu().numpy()
    for row, axes in enumerate(_panels(figure, len(images), len(sites))):
        _draw_row(axes, Scene(rgb[row], kept[:, row], grid_size, labels), first=row == 0)
        axes[0].set_ylabel(titles[row] if titles else "")
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
        accuracy: `[U]` in 0..1, or `[S, U]` for S seeds: their mean and range are drawn.
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
    for number, (name, value) in enumerate((references or {}).items()):
        style = ("--", ":", "-.")[number % 3]
        upper.axhline(value, color=f"C{number + 1}", linestyle=style, label=f"{name} {value:.1%}")
    _curve(lower, "macs_share", updates, macs_share)
    if budget is not None:
        lower.axhline(budget, color="black", linestyle="--", label=f"budget {budget:.0%}")
    upper.set(ylabel="accuracy", title=title)
    lower.set(ylabel="GMACs, share of dense", xlabel="updates", ylim=(0, None))
    for axes in (upper, lower):
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
        axes.legend(frameon=False, fontsize="small")
    return figure


def _curve(axes: Axes, name: str, updates: Sequence[float], values: Curve, colour: str = "tab:blue") -> None:
    runs = np.atleast_2d(np.asarray(values, dtype=float))
    if runs.ndim != 2 or runs.shape[1] != len(updates):
        raise ValueError(f"{name}: expected {len(updates)} values per run, one for each update, got {list(runs.shape)}")
    label = "trained" if len(runs) == 1 else f"trained, mean of {len(runs)} runs"
    axes.plot(updates, runs.mean(axis=0), color=colour, label=label)
    if len(runs) > 1:
        axes.fill_between(updates, runs.min(axis=0), runs.max(axis=0), color=colour, alpha=0.2, linewidth=0)


def _size(rows: int, sites: int) -> tuple[float, float]:
    """Inches of a figure of panels."""
    return 1.7 * (sites + 1), 1.75 * rows + 0.35


def _panels(figure: Figure | SubFigure, rows: int, sites: int) -> np.ndarray:
    """`[rows, sites + 1]` axes without ticks."""
    axes = figure.subplots(rows, sites + 1, squeeze=False)
    for panel in axes.flat:
        panel.set(xticks=[], yticks=[])
    return axes


def _draw_row(axes: Sequence[Axes], scene: Scene, first: bool = True) -> None:
    """The image and one panel per site, empty until it is reached; titles over the `first` row only."""
    alive = scene.alive
    axes[0].imshow(scene.image)
    for index, (panel, site) in enumerate(zip(axes[1:], scene.sites, strict=True)):
        if first:
            panel.set_title(site_title(site), fontsize="medium")
        if index < len(scene.keep):
            panel.imshow(shade(scene.image, alive[index], alive[index + 1], scene.grid_size))
            panel.set_xlabel(f"{alive[index + 1].mean():.0%} left", fontsize="small")
        else:
            panel.set_box_aspect(scene.image.shape[0] / scene.image.shape[1])
