"""The ragged token state: packed rows of the tokens that are still there, and which patches they are.

Rows of one image lie together, prefix tokens first, then its alive patch tokens in token order. Linear layers, norms
and MLPs then run on one `[rows, D]` tensor and pruned tokens cost nothing. On a CPU, images with equally many rows are
moved together, so that they can attend in one call; `layout` records it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from vitprune_env.lazy_fields import lazily, on_demand


@lazily("size", "source")
@dataclass(frozen=True)
class TokenState:
    """The tokens of B images between two half-blocks."""

    x: Tensor  # [rows, D] packed: per image P prefix rows, then n_i alive patch tokens
    alive: Tensor  # [B, N] bool
    size: Tensor  # [B, N] float, patches that each alive or waiting token stands for; 0 for the dead
    source: Tensor  # [B, N] int64, token that each original patch is in now, alive or waiting; -1 = pruned
    groups: tuple[tuple[int, int], ...]  # (images, rows of each) of images with equally many rows, as they lie in `x`
    num_prefix: int  # P
    half: int = 0  # half-blocks that have run
    rank: Tensor | None = None  # [B, N] sort key of the current sequence; None: token order
    layout: tuple[int, ...] | None = None  # images in the order in which they lie in `x`; None: 0, 1, 2, ...
    parked: TokenState | None = None  # the tokens that wait, in rows of their own and without prefix; None: none wait
    images: Tensor | None = None  # [B, C, H, W] that the tokens were made from, for evidence from pixels; None: unknown

    @property
    def batch_size(self) -> int:
        """B, the number of images."""
        return self.alive.shape[0]

    @property
    def waiting(self) -> Tensor | None:
        """`[B, N]` bool, the tokens that wait; None: none do."""
        return None if self.parked is None else self.parked.alive

    @property
    def present(self) -> Tensor:
        """`[B, N]` bool, the tokens in the game, alive or waiting."""
        return self.alive if self.parked is None else self.alive | self.parked.alive

    @property
    def lengths(self) -> tuple[int, ...]:
        """Rows of each image, P + n_i."""
        lying = [rows for images, rows in self.groups for _ in range(images)]
        if self.layout is None:
            return tuple(lying)
        return tuple(rows for _, rows in sorted(zip(self.layout, lying, strict=True)))

    @property
    def is_uniform(self) -> bool:
        """Whether all images have the same number of rows, so that `x` views as `[B, n, D]`."""
        return len(self.groups) == 1

    @property
    def count(self) -> int | None:
        """Alive patch tokens of every image if all have equally many, else None."""
        return self.groups[0][1] - self.num_prefix if self.is_uniform else None

    @cached_property
    def _alive_index(self) -> tuple[Tensor, Tensor]:
        """Image and patch number of each alive token, without waiting for the device."""
        batch, num_tokens = self.alive.shape
        all_alive = surely(self.count == num_tokens)
        if self.count is None or not (all_alive or torch.compiler.is_compiling()):
            total = sum(images * (rows - self.num_prefix) for images, rows in self.groups)
            image, token = torch.nonzero_static(self.alive, size=total).unbind(1)
            return image, token
        number = torch.arange(num_tokens, device=self.alive.device)
        if not all_alive:  # ONNX knows sorting; its result has a known shape, or a size that lies between known bounds
            torch._check(self.count >= 0)
            torch._check(self.count <= num_tokens)
            token = torch.where(self.alive, number, number + num_tokens).sort(dim=1).values[:, : self.count]
        else:
            token = number.expand(batch, num_tokens)
        image = torch.arange(batch, device=token.device)[:, None].expand(batch, self.count)
        return image.reshape(-1), token.reshape(-1)

    @property
    def image(self) -> Tensor:
        """`[sum n_i]` int64, the image of each alive token."""
        return self._alive_index[0]

    @property
    def token(self) -> Tensor:
        """`[sum n_i]` int64, the patch number of each alive token."""
        return self._alive_index[1]

    @cached_property
    def offsets(self) -> Tensor:
        """`[B + 1]` int64, where each image's tokens begin among the alive ones."""
        if self.count is not None:
            return torch.arange(self.batch_size + 1, device=self.alive.device) * self.count
        counts = self.alive.sum(dim=1)
        return torch.cat([counts.new_zeros(1), counts.cumsum(0)])

    @cached_property
    def row_offsets(self) -> Tensor:
        """`[B + 1]` int64, where the images begin in `x`, in the order in which they lie there."""
        if self.count is not None:
            return torch.arange(self.batch_size + 1, device=self.alive.device) * self.groups[0][1]
        rows = self.offsets.diff() + self.num_prefix
        rows = rows if self.layout is None else rows[self._layout]
        return torch.cat([rows.new_zeros(1), rows.cumsum(0)])

    @cached_property
    def _layout(self) -> Tensor:
        return torch.tensor(self.layout, device=self.alive.device)

    @cached_property
    def first_row(self) -> Tensor:
        """`[B]` int64, the row of `x` where each image begins."""
        return self.in_order(self.row_offsets[:-1])

    def in_order(self, values: Tensor) -> Tensor:
        """One entry per image as they lie in `x`, `[B, ...]`, in the order of the batch."""
        return values if self.layout is None else torch.empty_like(values).index_copy(0, self._layout, values)

    @cached_property
    def patch_rows(self) -> Tensor:
        """`[sum n_i]` int64, rows of `x` that hold the alive patch tokens."""
        shift = self.first_row + self.num_prefix - self.offsets[:-1]
        return shift[self.image] + torch.arange(self.image.shape[0], device=shift.device)

    @cached_property
    def row_patches(self) -> Tensor:
        """`[rows]` int64, the patch number of each row of `x`; -1 for prefix rows."""
        return self.token.new_full((self.x.shape[0],), -1).index_copy(0, self.patch_rows, self.token)

    @cached_property
    def row_of(self) -> Tensor:
        """`[B, N]` int64, the row of `x` that holds each alive token; of no meaning for the dead."""
        return (self.first_row + self.num_prefix)[:, None] + self._place

    @cached_property
    def _place(self) -> Tensor:
        """`[B, N]` int64, which of its image's alive tokens each alive one is; of no meaning for the dead."""
        batch, num_tokens = self.alive.shape
        return self.token.view(batch, num_tokens) if surely(self.count == num_tokens) else self.alive.cumsum(dim=1) - 1

    @cached_property
    def prefix_rows(self) -> Tensor:
        """`[B, P]` int64, rows of `x` that hold the prefix tokens."""
        return self.first_row[:, None] + torch.arange(self.num_prefix, device=self.first_row.device)

    @property
    def tokens(self) -> Tensor:
        """`[sum n_i, D]` alive patch tokens, a copy."""
        if self.is_uniform:
            rows = self.x.view(self.batch_size, self.groups[0][1], -1)[:, self.num_prefix :]
            return rows.clone(memory_format=torch.contiguous_format).flatten(0, 1)
        return self.x[self.patch_rows]

    @property
    def prefix(self) -> Tensor:
        """`[B, P, D]` prefix tokens."""
        if self.is_uniform:
            return self.x.view(self.batch_size, self.groups[0][1], -1)[:, : self.num_prefix]
        return self.x[self.prefix_rows]

    @cached_property
    def order(self) -> Tensor:
        """`[B, N]` int64, rank of each alive token in the current sequence; -1 for the dead."""
        if self.rank is None:
            ranks = self._place
        else:
            key = self.rank.masked_fill(~self.alive, self.rank.max() + 1)
            ranks = key.argsort(dim=1, stable=True).argsort(dim=1)
        return ranks.masked_fill(~self.alive, -1)

    def with_rows(self, x: Tensor, half: int | None = None) -> TokenState:
        """The same tokens with new features, `x` of the same shape, after `half` half-blocks (None: as before)."""
        new = object.__new__(TokenState)  # unlike `replace` this takes along what has been worked out about the tokens
        vars(new).update(vars(self), x=x, half=self.half if half is None else half)
        return new


def start_state(x: Tensor, num_prefix: int, half: int = 0, images: Tensor | None = None) -> TokenState:
    """The state before the first decision: every patch token alive, alone and its own source.

    Args:
        x: embedded tokens `[B, P + N, D]`.
        num_prefix: P.
        half: half-blocks that have run.
        images: `[B, C, H, W]`, what the tokens were made from; None: unknown.
    """
    batch, rows, _ = x.shape
    num_tokens = rows - num_prefix
    return TokenState(
        x=x.flatten(0, 1),
        alive=torch.ones(batch, num_tokens, dtype=torch.bool, device=x.device),
        size=on_demand(torch.ones, batch, num_tokens, device=x.device),
        source=on_demand(_own_numbers, batch, num_tokens, x.device),
        groups=((batch, rows),),
        num_prefix=num_prefix,
        half=half,
        images=images,
    )


def _own_numbers(batch: int, num_tokens: int, device: torch.device) -> Tensor:
    """`[B, N]` int64, every token its own source."""
    return torch.arange(num_tokens, device=device).expand(batch, num_tokens)


def repack(old: TokenState, new: TokenState, x: Tensor, rows: Tensor) -> TokenState:
    """Put the prefix rows of `old` and the given rows of `x`, those of the tokens of `new`, in their new places.

    Args:
        old: the state whose rows come first in `x`.
        new: which tokens are there now, and how the images should lie.
        x: rows to choose from.
        rows: `[sum n_i]` int64, for each alive token of `new` its row in `x`.
    """
    if new.is_uniform:
        rows = rows.view(new.batch_size, new.groups[0][1] - new.num_prefix)
        index = torch.cat([old.prefix_rows, rows], dim=1).flatten()
    else:
        index = rows.new_empty(sum(images * length for images, length in new.groups))
        index = index.index_copy(0, new.prefix_rows.flatten(), old.prefix_rows.flatten())
        index = index.index_copy(0, new.patch_rows, rows)
    return new.with_rows(x.index_select(0, index))


def drop_rows(old: TokenState, new: TokenState) -> TokenState:
    """Leave out the rows of the tokens that are not alive in `new`, where the images lie in the same order in both."""
    if old.is_uniform:
        stays = new.alive if old.count == new.alive.shape[1] else new.alive[old.image, old.token]
        stays = F.pad(stays.view(new.batch_size, -1), (old.num_prefix, 0), value=True).flatten()
    else:
        stays = new.alive.new_ones(old.x.shape[0])
        stays = stays.index_copy(0, old.patch_rows, new.alive[old.image, old.token])
    index = torch.nonzero_static(stays, size=sum(images * rows for images, rows in new.groups))
    return new.with_rows(old.x.index_select(0, index.view(-1)))


def follow(values: Tensor, before: TokenState, after: TokenState) -> Tensor:
    """Values of the tokens alive before a decision, `[sum n_i, ...]`, as values of those alive after it.

    Zero for a token that waited before and so has no value.
    """
    table = values.new_zeros(*before.alive.shape, *values.shape[1:])
    table[before.image, before.token] = values
    return table[after.image, after.token]


def of_patches(values: Tensor, state: TokenState) -> Tensor:
    """Values of the original patches `[B, N]` as values of the alive tokens, means over their patches, `[sum n_i]`."""
    token, joined = state.source.clamp(min=0), (state.source >= 0).to(values)
    total = torch.zeros_like(values).scatter_add(1, token, values * joined)
    count = torch.zeros_like(values).scatter_add(1, token, joined)
    return (total / count.clamp(min=1))[state.image, state.token]


def segment_mean(values: Tensor, image: Tensor, batch_size: int) -> Tensor:
    """Mean of the packed rows `[sum n_i, D]` of each image, `[B, D]`; zeros for an image without rows."""
    dtype = torch.promote_types(values.dtype, torch.float32)  # half precision would lose the sum of many rows
    total = torch.zeros(batch_size, values.shape[1], dtype=dtype, device=values.device)
    total = total.index_add(0, image, values.to(dtype))
    ones = torch.ones(image.shape[0], dtype=dtype, device=values.device)  # bincount would ask the device for its length
    count = torch.zeros(batch_size, dtype=dtype, device=values.device).index_add(0, image, ones)
    return (total / count.clamp(min=1)[:, None]).to(values.dtype)


def arrange(lengths: Sequence[int], sort: bool) -> tuple[tuple[tuple[int, int], ...], tuple[int, ...] | None]:
    """How images with these numbers of rows should lie in memory: `groups` and `layout` of a `TokenState`.

    Args:
        lengths: rows of each image.
        sort: whether images may change places, so that equally long ones lie together.
    """
    if len(lengths) == 1:  # also a length that is only traced
        return ((1, lengths[0]),), None
    layout = tuple(sorted(range(len(lengths)), key=lengths.__getitem__))
    moved = sort and len(set(lengths)) > 1 and layout != tuple(range(len(lengths)))
    lying = [lengths[image] for image in layout] if moved else lengths
    groups = tuple((len(list(run)), rows) for rows, run in groupby(lying))
    return groups, layout if moved else None


def surely(condition: bool | torch.SymBool) -> bool:
    """Whether a comparison of sizes holds; of sizes that are only traced, whether it holds whatever they will be."""
    return condition is True or (condition is not False and statically_known_true(condition))
