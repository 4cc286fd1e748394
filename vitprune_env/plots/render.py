"""Renderings of the game: which tokens are left after each site, as text, as pixels or in a window.

As in Fig. 5 of RL4EViT there is one panel per site, and tokens that were pruned earlier are white. Tokens that are
pruned at the panel's own site are orange. matplotlib is imported only by the functions that need it.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from colorsys import hsv_to_rgb
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from gymnasium import logger
from torch import Tensor

from vitprune_env.game.token_game import TokenGame
from vitprune_env.types import Site

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RENDER_MODES = ("human", "rgb_array", "ansi")
PANEL_PIXELS = 240  # smallest height of a panel of mode rgb_array
ALIVE, MARKS = "#", "123456789abcdefghijklmnopqrstuvwxyz"
GONE_EARLIER, GONE_HERE, BACKGROUND = (1.0, 1.0, 1.0), (0.98, 0.74, 0.42), (0.45, 0.45, 0.45)
COVER = 0.88  # weight of the colour in a pruned patch, 0 to 1
TINT = 0.55  # weight of the colour in a merged patch, 0 to 1
GOLDEN = (5**0.5 - 1) / 2  # its multiples modulo 1 are hues that are far apart


def to_rgb(images: Tensor, mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> Tensor:
    """Undo the normalisation of images, for display.

    Args:
        images: `[B, C, H, W]`; if C is not 3, the mean of the channels is shown in grey.
        mean: the mean of each channel that was subtracted; None: each image is scaled from its minimum to its maximum.
        std: the standard deviation of each channel by which it was divided.

    Returns:
        `[B, 3, H, W]` float32 in 0..1.
    """
    images = images.detach().float().cpu()
    if mean is not None and std is not None:
        images = images * torch.tensor(std).view(-1, 1, 1) + torch.tensor(mean).view(-1, 1, 1)
    else:
        low, high = images.amin(dim=(1, 2, 3), keepdim=True), images.amax(dim=(1, 2, 3), keepdim=True)
        images = (images - low) / (high - low).clamp(min=1e-6)
    if images.shape[1] != 3:
        images = images.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1)
    return images.clamp(0, 1)


def site_title(site: int | str | Site) -> str:
    """Title of the panel of a site."""
    site = Site.parse(site)
    return f"in block {site.block}" if site.inside else f"after block {site.block}"


def class_name(number: int, names: Sequence[str] | None = None) -> str:
    """A class by its name, with blanks for underscores; by its number where names are unknown."""
    return str(number) if names is None else names[number].replace("_", " ")


def label_text(label: int, names: Sequence[str] | None = None) -> str:
    """What is written of the true class of an image: its name, or "class 3"."""
    return class_name(label, names) if names is not None else f"class {label}"


def shade(image: np.ndarray, before: np.ndarray, after: np.ndarray, grid_size: tuple[int, int]) -> np.ndarray:
    """Cover the pruned patches of an image `[H, W, 3]` in 0..1.

    Args:
        image: the image; a covered copy is returned.
        before: `[N]` bool, tokens alive before the site; the other ones are covered with white.
        after: `[N]` bool, tokens alive after it; those pruned at the site are covered with orange.
        grid_size: rows and columns of patches, N in all.
    """
    (height, width, _), (rows, columns) = image.shape, grid_size
    pixels = np.ix_(np.arange(height) * rows // height, np.arange(width) * columns // width)
    out = image.copy()
    for gone, colour in ((~before, GONE_EARLIER), (before & ~after, GONE_HERE)):
        where = gone.reshape(grid_size)[pixels]
        out[where] = (1 - COVER) * out[where] + COVER * np.array(colour)
    return out


def tint(image: np.ndarray, source: np.ndarray, grid_size: tuple[int, int]) -> np.ndarray:
    """Tint patches of an image `[H, W, 3]` in 0..1 that became one token, and cover the pruned ones.

    Args:
        image: the image; a changed copy is returned.
        source: `[N]` int, the token that every patch ended up in; -1 where it was pruned, which is covered with white.
            Patches that share a token share a tint.
        grid_size: rows and columns of patches, N in all.
    """
    (height, width, _), (rows, columns) = image.shape, grid_size
    pixels = np.ix_(np.arange(height) * rows // height, np.arange(width) * columns // width)
    token, out = source.reshape(grid_size)[pixels], image.copy()
    shared = 0
    for number, count in zip(*np.unique(source, return_counts=True), strict=True):
        if number >= 0 and count == 1:
            continue
        cover, colour = (COVER, GONE_EARLIER) if number < 0 else (TINT, hsv_to_rgb(shared * GOLDEN % 1, 0.6, 0.9))
        shared += number >= 0
        where = token == number
        out[where] = (1 - cover) * out[where] + cover * np.array(colour)
    return out


@dataclass(frozen=True)
class Scene:
    """All that a rendering of one image's game needs."""

    image: np.ndarray  # [H, W, 3] in 0..1
    keep: np.ndarray  # [t, N] bool, tokens left after each of the t steps played
    grid_size: tuple[int, int]  # rows and columns of patches, N in all
    sites: tuple[str, ...]  # T of them
    label: int | None = None  # the true class
    prediction: int | None = None  # the predicted class, once the game is over
    class_names: tuple[str, ...] | None = None  # None: unknown

    @classmethod
    def of(cls, game: TokenGame, rgb: Tensor, label: int | None = None) -> Scene:
        """The scene of a game's first image so far.

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
            class_names=game.backbone.class_names,
        )

    @property
    def title(self) -> str:
        """The true and the predicted class, as far as they are known."""
        read = "not classified yet"
        if self.prediction is not None:
            read = f"predicted {class_name(self.prediction, self.class_names)}"
        return read if self.label is None else f"{label_text(self.label, self.class_names)}, {read}"

    @property
    def alive(self) -> np.ndarray:
        """`[t + 1, N]` bool, tokens alive at the start and after each step."""
        return np.concatenate([np.ones((1, int(np.prod(self.grid_size))), dtype=bool), self.keep])

    def ansi(self) -> str:
        """A grid with one character per token, for the step at which it was pruned; a legend; and the classes."""
        symbols = (MARKS + "+" * len(self.keep))[: len(self.keep)] + ALIVE
        grid = np.array(list(symbols))[self.keep.sum(axis=0)].reshape(self.grid_size)
        legend = [f"{ALIVE} alive: {int(self.alive[-1].sum())}"]
        left = self.alive[:-1].sum(axis=1) - self.keep.sum(axis=1)
        legend += [f"{symbols[i]} pruned {site_title(self.sites[i])}: {count}" for i, count in enumerate(left)]
        return "\n".join([*(" ".join(row) for row in grid), *legend, self.title])

    def panels(self) -> list[np.ndarray]:
        """The image and one panel per site with the tokens left after it; faded for sites not reached yet."""
        played = [shade(self.image, before, after, self.grid_size) for before, after in pairwise(self.alive)]
        faded = (1 - COVER) * self.image + COVER * np.array(BACKGROUND)
        return [self.image, *played, *[faded] * (len(self.sites) - len(played))]

    def rgb_array(self) -> np.ndarray:
        """The panels side by side, `[H', W', 3]` uint8, enlarged to a readable size."""
        factor = max(1, -(-PANEL_PIXELS // len(self.image)))
        gap = np.broadcast_to(BACKGROUND, (factor * len(self.image), PANEL_PIXELS // 24, 3))
        parts = [part for panel in self.panels() for part in (gap, panel.repeat(factor, 0).repeat(factor, 1))]
        return (np.concatenate(parts[1:], axis=1) * 255).round().astype(np.uint8)


class Viewer:
    """Shows scenes in one of the render modes of a PettingZoo environment; with mode None it only warns.

    Args:
        mode: one of `RENDER_MODES`, or None.
        title: of the window.

    Raises:
        ValueError: for an unknown mode.
    """

    def __init__(self, mode: str | None, title: str) -> None:
        if mode not in (None, *RENDER_MODES):
            raise ValueError(f"render_mode: expected None or one of {RENDER_MODES}, got {mode!r}")
        self.mode, self.title = mode, title
        self._window: Figure | None = None
        self._blind = False  # whether opening a window has failed

    def draw(self, scene: Scene) -> np.ndarray | str | None:
        """Show a scene.

        Returns:
            A string in mode ansi; `[H', W', 3]` uint8 in mode rgb_array; None in mode human, which draws in a window.
        """
        if self.mode == "ansi":
            return scene.ansi()
        if self.mode == "rgb_array":
            return scene.rgb_array()
        if self.mode is None:
            logger.warn(f"render: nothing is drawn without a render_mode; expected one of {RENDER_MODES}")
        elif self._window is None and not self._blind:
            self._open(scene)
        if self._window is not None:
            self._window.clear()
            draw_row(self._window.subplots(1, len(scene.sites) + 1), scene)
            self._window.suptitle(scene.title)
            self._window.canvas.draw()
            self._window.canvas.flush_events()
        return None

    def close(self) -> None:
        """Close the window, if there is one."""
        if self._window is not None:
            from matplotlib import pyplot

            pyplot.close(self._window)
            self._window = None

    def _open(self, scene: Scene) -> None:
        from matplotlib import pyplot  # pyplot chooses the GUI toolkit and runs its event loop

        try:
            window = pyplot.figure(self.title, figsize=panel_size(1, len(scene.sites)), layout="constrained")
            if window.canvas.required_interactive_framework is not None:
                window.show()
                self._window = window
                return
            pyplot.close(window)
            reason = f"matplotlib's backend {pyplot.get_backend()} opens no windows"
        except Exception as error:  # every toolkit raises an error of its own if there is no display
            reason = str(error)
        self._blind = True
        warnings.warn(f"render_mode 'human' shows nothing: {reason}; use 'rgb_array' or 'ansi'", stacklevel=4)


def panel_size(rows: int, sites: int) -> tuple[float, float]:
    """Width and height, in inches, of a figure with this many rows and sites."""
    return 1.7 * (sites + 1), 1.75 * rows + 0.35


def draw_row(axes: Sequence[Axes], scene: Scene, first: bool = True) -> None:
    """Draw the panels of one image.

    Args:
        axes: T + 1 of them.
        scene: the image and its tokens.
        first: whether this is the first row of a figure, whose panels get titles.
    """
    titles = ("image", *map(site_title, scene.sites))
    for panel, pixels, title in zip(axes, scene.panels(), titles, strict=True):
        panel.imshow(pixels)
        panel.set(xticks=[], yticks=[])
        panel.set_title(title if first else "", fontsize="medium")
    for panel, kept in zip(axes[1:], scene.keep, strict=False):
        panel.set_xlabel(f"{kept.mean():.0%} left", fontsize="small")
