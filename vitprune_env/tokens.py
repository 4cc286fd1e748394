"""The ragged token state: packed rows of the tokens that are still there, and who they are.

Rows of one image lie together, prefix tokens first, then its alive patch tokens in token order. Linear layers, norms
and MLPs then run on one `[rows, D]` tensor and pruned tokens cost nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenState:
    """The tokens of B images between two half-blocks."""

    x: Tensor  # [rows, D] packed: per image P prefix rows, then n_i alive patch tokens
    alive: Tensor  # [B, N] bool
    size: Tensor  # [B, N] float, patches that each alive token stands for; 0 for the dead
    source: Tensor  # [B, N] int64, token that each original patch is in now; -1 = pruned
    lengths: tuple[int, ...]  # rows of each image, P + n_i
    num_prefix: int  # P
    half: int = 0  # half-blocks that have run
    rank: Tensor | None = None  # [B, N] sort key of the current sequence; None: token order

    @property
    def batch_size(self) -> int:
        """B, the number of images."""
        return self.alive.shape[0]

    @cached_property
    def image(self) -> Tensor:
        """`[sum n_i]` int64, the image of each alive token."""
        return self.alive.nonzero()[:, 0]

    @cached_property
    def token(self) -> Tensor:
        """`[sum n_i]` int64, the patch number of each alive token."""
        return self.alive.nonzero()[:, 1]

    @cached_property
    def patch_rows(self) -> Tensor:
        """`[sum n_i]` int64, rows of `x` that hold the alive patch tokens."""
        return torch.arange(len(self.image), device=self.image.device) + self.num_prefix * (self.image + 1)

    @cached_property
    def offsets(self) -> Tensor:
        """`[B + 1]` int64, where each image's tokens begin among the alive ones."""
        counts = self.alive.sum(dim=1)
        return torch.cat([counts.new_zeros(1), counts.cumsum(0)])

    @cached_property
    def prefix_rows(self) -> Tensor:
        """`[B, P]` int64, rows of `x` that hold the prefix tokens."""
        starts = self.offsets[:-1] + self.num_prefix * torch.arange(self.batch_size, device=self.offsets.device)
        return starts[:, None] + torch.arange(self.num_prefix, device=starts.device)

    @property
    def is_uniform(self) -> bool:
        """Whether all images have the same number of rows, so that `x` views as `[B, n, D]`."""
        return len(set(self.lengths)) == 1

    @property
    def tokens(self) -> Tensor:
        """`[sum n_i, D]` alive patch tokens."""
        if self.is_uniform:
            return self.x.view(self.batch_size, self.lengths[0], -1)[:, self.num_prefix :].flatten(0, 1)
        return self.x[self.patch_rows]

    @property
    def prefix(self) -> Tensor:
        """`[B, P, D]` prefix tokens."""
        if self.is_uniform:
            return self.x.view(self.batch_size, self.lengths[0], -1)[:, : self.num_prefix]
        return self.x[self.prefix_rows]

    @cached_property
    def order(self) -> Tensor:
        """`[B, N]` int64, rank of each alive token in the current sequence; -1 for the dead."""
        if self.rank is None:
            ranks = self.alive.cumsum(1) - 1
        else:
            key = self.rank.masked_fill(~self.alive, self.rank.max() + 1)
            ranks = key.argsort(dim=1, stable=True).argsort(dim=1)
        return ranks.masked_fill(~self.alive, -1)

    def with_rows(self, x: Tensor, half: int | None = None) -> TokenState:
        """The same tokens with new features, `x` of the same shape, after `half` half-blocks (None: as before)."""
        return replace(self, x=x, half=self.half if half is None else half)


def start_state(x: Tensor, num_prefix: int, half: int = 0) -> TokenState:
    """The state before the first decision: every patch token alive, alone and its own source.

    Args:
        x: embedded tokens `[B, P + N, D]`.
        num_prefix: P.
        half: half-blocks that have run.
    """
    batch, rows, _ = x.shape
    num_tokens = rows - num_prefix
    ones = torch.ones(batch, num_tokens, device=x.device)
    return TokenState(
        x=x.flatten(0, 1),
        alive=ones.bool(),
        size=ones,
        source=torch.arange(num_tokens, device=x.device).expand(batch, num_tokens),
        lengths=(rows,) * batch,
        num_prefix=num_prefix,
        half=half,
    )


def segment_mean(values: Tensor, image: Tensor, batch_size: int) -> Tensor:
    """Mean of the packed rows `[sum n_i, D]` of each image, `[B, D]`; zeros for an image without rows."""
    dtype = torch.promote_types(values.dtype, torch.float32)  # half precision would lose the sum of many rows
    total = torch.zeros(batch_size, values.shape[1], dtype=dtype, device=values.device)
    total = total.index_add(0, image, values.to(dtype))
    return (total / image.bincount(minlength=batch_size).clamp(min=1)[:, None]).to(values.dtype)
