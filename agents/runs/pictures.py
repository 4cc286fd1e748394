"""What a policy prunes, as one picture for a run's log."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from ...game.rollout import play
from ...game.token_game import TokenGame
from ...plots.render import Scene, to_rgb
from ...policy import Policy

PICTURES = 4  # images in a log


def tokens_picture(game: TokenGame, policy: Policy, images: Tensor) -> np.ndarray:
    """Images below one another, each beside what is left of it after every site.

    Args:
        game: what is played.
        policy: decides what is pruned.
        images: `[B, C, H, W]`, stretched from their minimum to their maximum for display.

    Returns:
        `[height, width, 3]` uint8.
    """
    keep = play(game, policy, images).keep.cpu().numpy()
    sites = tuple(site.label for site in game.sites)
    rgb = to_rgb(images).permute(0, 2, 3, 1).numpy()
    grid = game.backbone.grid_size
    return np.concatenate([Scene(rgb[row], keep[:, row], grid, sites).rgb_array() for row in range(len(rgb))])
