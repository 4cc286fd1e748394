"""Self-attention within each image of packed rows.

Images with equally many rows that lie together attend as one batch, on views: on a CPU that reaches what the MACs
promise (padding, nested tensors and masks do not). Other ways to compute the same are in `kernels`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """How packed rows fall into images: rows of one image lie together, prefix tokens first."""

    groups: tuple[tuple[int, int], ...]  # (images, rows of each) of images that lie together and are equally long
    starts: Callable[[], Tensor] | None = None  # gives the offsets on the device, where they are known already
    patches: Callable[[], Tensor] | None = None  # gives the patch number of each row, [rows] int64; -1: prefix

    @classmethod
    def of(cls, *lengths: int) -> Rows:
        """Images with these numbers of rows, in this order."""
        return cls(tuple((len(list(run)), rows) for rows, run in groupby(lengths)))

    @property
    def lengths(self) -> tuple[int, ...]:
        """Rows of each image, as they lie."""
        return tuple(rows for images, rows in self.groups for _ in range(images))

    @property
    def longest(self) -> int:
        """Rows of the largest image."""
        return max(length for _, length in self.groups)

    @property
    def num_images(self) -> int:
        """B."""
        return sum(images for images, _ in self.groups)

    @cached_property
    def sizes(self) -> list[int]:
        """Rows of each group."""
        return [images * length for images, length in self.groups]

    def offsets(self, device: torch.device) -> Tensor:
        """`[B + 1]` int64, where the images begin."""
        if self.starts is not None:
            return self.starts()
        return torch.tensor((0, *self.lengths), device=device).cumsum(0)

    def image(self, device: torch.device) -> Tensor:
        """`[rows]` int64, the image of each row."""
        lengths = self.offsets(device).diff()
        return torch.arange(len(lengths), device=device).repeat_interleave(lengths, output_size=sum(self.sizes))

    def patch(self, device: torch.device) -> Tensor:
        """`[rows]` int64, the patch number of each row; -1 for prefix rows.

        Raises:
            ValueError: for rows that were made without their patch numbers.
        """
        if self.patches is None:
            raise ValueError("rows: expected rows that know their patch numbers; this family of models needs them")
        return self.patches().to(device)

    def split(self, values: Tensor) -> Iterator[Tensor]:
        """Per group, the heads-first view `[images, heads, rows per image, head dim]` of `[rows, heads, head dim]`."""
        parts = (values,) if len(self.groups) == 1 else values.split(self.sizes)
        for (images, length), part in zip(self.groups, parts, strict=True):
            yield part.view(images, length, *values.shape[1:]).transpose(1, 2)


Kernel = Callable[[Tensor, Tensor, Tensor, Rows, Tensor | None, float], Tensor]
"""Attention itself: q, k, v `[rows, heads, head dim]`, rows, a bias per key `[rows]`, dropout -> `[rows, width]`."""


def packed(q: Tensor, k: Tensor, v: Tensor, rows: Rows, key_bias: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """Fused attention group by group, on views; `cat` rather than writes into a buffer, so that autograd follows.

    Args:
        q: `[rows, heads, head dim]`, as are `k` and `v`.
        k: keys.
        v: values.
        rows: how the rows fall into images.
        key_bias: `[rows]`, added to every query's logit of that key.
        dropout: rate of dropped weights.

    Returns:
        `[rows, heads * head dim]`.
    """
    width = q.shape[1] * q.shape[2]
    if len(rows.groups) == 1:  # equally long images: no bookkeeping that a single small one would notice
        q, k, v = (part.view(*rows.groups[0], *part.shape[1:]).transpose(1, 2) for part in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias_views(key_bias, rows)[0], dropout_p=dropout)
        return y.transpose(1, 2).reshape(-1, width)
    parts = []
    biases = bias_views(key_bias, rows)
    for q_i, k_i, v_i, bias in zip(rows.split(q), rows.split(k), rows.split(v), biases, strict=True):
        y = F.scaled_dot_product_attention(q_i, k_i, v_i, attn_mask=bias, dropout_p=dropout)
        parts.append(y.transpose(1, 2).reshape(-1, width))
    return torch.cat(parts)


def bias_views(key_bias: Tensor | None, rows: Rows) -> list[Tensor] | list[None]:
    """Per group, `[images, 1, 1, rows per image]` of `[rows]`, or None each."""
    if key_bias is None:
        return [None] * len(rows.groups)
    parts = key_bias.split(rows.sizes)
    return [part.view(images, 1, 1, length) for (images, length), part in zip(rows.groups, parts, strict=True)]
