"""Diversity of the tokens of an image: the score r(Z) of decouple and merge (Long et al., 2023, Eq. 4)."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Packed(Protocol):
    """Alive tokens of several images as packed rows, image by image: an `Observation`, or the state of a game."""

    @property
    def tokens(self) -> Tensor:
        """`[sum n_i, D]`."""
        ...

    @property
    def image(self) -> Tensor:
        """`[sum n_i]` int64."""
        ...

    @property
    def batch_size(self) -> int:
        """B."""
        ...


def diversity_score(packed: Packed) -> Tensor:
    """`r(Z) = min_z ||Z - 1 z^T||` of each image, in the l1 norm of all entries (Eq. 4).

    The minimiser z is the median of every channel. The paper calls z "one of the tokens" but writes an argmin over all
    z'; this is the argmin as printed. The paper shows the score "at the final pruning layer": play a game and pass its
    `state` afterwards. The sum is not normalised, so compare only equal numbers of tokens.

    Args:
        packed: the patch tokens.

    Returns:
        `[B]`, 0 for an image with one token or none.
    """
    image, tokens = packed.image, packed.tokens.float()
    counts = torch.zeros(packed.batch_size, dtype=torch.int64, device=image.device)
    counts = counts.index_add(0, image, torch.ones_like(image))
    place = torch.arange(len(image), device=image.device) - (counts.cumsum(0) - counts)[image]
    width = int(counts.max())
    dense = tokens.new_full((packed.batch_size, max(width, 1), tokens.shape[1]), float("nan"))
    dense[image, place] = tokens
    median = dense.nanmedian(dim=1, keepdim=True).values
    return (dense - median).abs().nansum(dim=(1, 2))
