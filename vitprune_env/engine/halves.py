"""The two halves of a block, attention and MLP, on packed rows.

Only attention needs to know where an image begins. What comes before and after it works row by row, so that
`torch.compile` makes one graph of each for all blocks and all batches.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vitprune_env.engine.attention import Kernel, Rows, packed
from vitprune_env.engine.evidence import EVIDENCE, PackedAttention
from vitprune_env.engine.families import Family
from vitprune_env.engine.families.adapter import Projections

Found = dict[str, Tensor]
"""Evidence by name, one entry per row."""


class Attend(Protocol):
    """How projected rows attend: the mixed values `[rows, width]` and the evidence asked for."""

    def __call__(
        self, parts: Projections, rows: Rows, key_bias: Tensor | None, block: Any, needs: Collection[str]
    ) -> tuple[Tensor, Found]:
        """Attend; `key_bias` `[rows]` is added to every query's logit of that key."""
        ...


@dataclass(frozen=True)
class AttendPacked:
    """Every row attends to the rows of its own image, with one of the `kernels`."""

    kernel: Kernel = packed

    def __call__(
        self, parts: Projections, rows: Rows, key_bias: Tensor | None, block: Any, needs: Collection[str]
    ) -> tuple[Tensor, Found]:
        """Mixed values `[rows, width]`, and evidence, for which the fused kernel returns no weights."""
        q, k, v = parts
        attn = block.attn
        y = self.kernel(q, k, v, rows, key_bias, attn.attn_drop.p if attn.training else 0.0)
        if not needs:
            return y, {}
        seen = PackedAttention(q, k, v, rows, key_bias, attn.scale)
        return y, {name: EVIDENCE[name].packed(seen) for name in needs}


@dataclass(frozen=True)
class Compiled:
    """The parts of a family's blocks beside attention, through `torch.compile`."""

    before_attention: Callable[[Any, Tensor, Tensor | None], Projections]
    after_attention: Callable[[Any, Tensor, Tensor, Tensor | None], Tensor]
    feed_forward: Callable[[Any, Tensor, Tensor | None], Tensor]

    @classmethod
    def of(cls, family: Family, **options: Any) -> Compiled:
        """Compile the parts of a family; `options` go to `torch.compile`, sizes are dynamic unless set otherwise."""
        options = {"dynamic": True, **options}
        return cls(
            torch.compile(family.before_attention, **options),
            torch.compile(family.after_attention, **options),
            torch.compile(family.feed_forward, **options),
        )


@dataclass(frozen=True)
class Execution:
    """How half-blocks are computed; it does not change the results."""

    attend: Attend = AttendPacked()
    compiled: Compiled | None = None  # parts beside attention; None: the family's own, as they are


PLAIN = Execution()


def run_halves(
    model: Any,
    family: Family,
    x: Tensor,
    rows: Rows,
    halves: range,
    needs: Collection[str] = frozenset(),
    key_bias: Tensor | None = None,
    execution: Execution = PLAIN,
) -> tuple[Tensor, Found]:
    """Run packed rows through a range of half-blocks (0-based; even: attention, odd: MLP).

    Args:
        model: the timm model.
        family: its adapter.
        x: `[rows, D]`.
        rows: how they fall into images.
        halves: half-blocks to run, in order.
        needs: evidence to compute in the last attention half of the range.
        key_bias: `[rows]`, added to the attention logits of each key.
        execution: how to compute them.

    Returns:
        The rows afterwards, and the evidence asked for, one entry per row; empty if the range has no attention half.
    """
    evidence: Found = {}
    parts = execution.compiled or family
    positions = family.positions(model, rows) if halves else None
    last_attention = (halves.stop - 1) // 2 * 2
    blocks = tuple(model.blocks)  # looking one up in a ModuleList is slow
    for half in halves:
        block = blocks[half // 2]
        if half % 2:
            x = parts.feed_forward(block, x, drop_factor(block.drop_path2, x, rows))
            continue
        projected = parts.before_attention(block, x, None if positions is None else positions(half // 2))
        y, found = execution.attend(projected, rows, key_bias, block, needs if half == last_attention else ())
        x = parts.after_attention(block, x, y, drop_factor(block.drop_path1, x, rows))
        evidence = found or evidence
    return x, evidence


def drop_factor(module: nn.Module, x: Tensor, rows: Rows) -> Tensor | None:
    """timm's stochastic depth on packed rows `x`, `[rows, 1]`: a whole image keeps or drops the branch; None: keep."""
    if not (module.training and getattr(module, "drop_prob", 0.0)):
        return None
    return module(x.new_ones(rows.num_images, 1))[rows.image(x.device)]
