"""How diverse the tokens of an image are: the score r(Z) of decouple and merge (Long et al., 2023, Eq. 4)."""

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
    """`r(Z) = ||Z - 1 z^T||` of each image, z minimising it, in the l1 norm of all entries (Eq. 4).

    The paper calls z "one of the tokens", and writes an argmin over all z'; this is the argmin as printed, without that
    restriction: the median of every channel. The paper shows the score "at the final pruning layer": play a game, and
    give its `state` afterwards. The sum is not divided by anything, so that it compares tokens of equal number.

    Args:
        packed: the tokens; prefix tokens are not among them.

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
