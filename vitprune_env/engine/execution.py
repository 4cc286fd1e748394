"""The two halves of a block on packed rows, and how they are computed: which attention, plain or compiled.

Attention alone needs to know where an image begins. What comes before and after it is the same for every raggedness,
so that `torch.compile` makes one graph of each for all blocks and all batches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from timm.models.vision_transformer import Attention, Block
from torch import Tensor, nn

from vitprune_env.engine.attention import (
    Kernel,
    Rows,
    dropout_rate,
    evidence_of,
    packed,
    project_in,
    project_out,
    through,
)


def before_attention(block: Block, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Norm and projection of rows `[rows, D]` to queries, keys and values `[rows, heads, head dim]`."""
    return project_in(cast(Attention, block.attn), block.norm1(x))


def after_attention(block: Block, x: Tensor, y: Tensor, factor: Tensor | None = None) -> Tensor:
    """Projection of the mixed values `y` `[rows, width]` and the residual, `[rows, D]`."""
    attn = cast(Attention, block.attn)
    normed = block.norm1(x) if getattr(attn, "gate", None) is not None else x  # only a gate looks at the input again
    return add_branch(x, through(block.ls1, project_out(attn, normed, y)), factor)


def feed_forward(block: Block, x: Tensor, factor: Tensor | None = None) -> Tensor:
    """MLP half of a block on rows `[rows, D]`."""
    return add_branch(x, through(block.ls2, block.mlp(block.norm2(x))), factor)


def add_branch(x: Tensor, y: Tensor, factor: Tensor | None) -> Tensor:
    """The residual sum, `factor` `[rows, 1]` times the branch `y`."""
    return x + (y if factor is None else y * factor)


def drop_factor(module: nn.Module, x: Tensor, rows: Rows) -> Tensor | None:
    """timm's stochastic depth on packed rows `x`, `[rows, 1]`: a whole image keeps or drops the branch; None: keep."""
    if not (module.training and getattr(module, "drop_prob", 0.0)):
        return None
    return module(x.new_ones(rows.num_images, 1))[rows.image(x.device)]


@dataclass(frozen=True)
class Execution:
    """How the half-blocks are computed; the results are the same."""

    kernel: Kernel = packed
    before: Callable[[Block, Tensor], tuple[Tensor, Tensor, Tensor]] = before_attention
    after: Callable[[Block, Tensor, Tensor, Tensor | None], Tensor] = after_attention
    feed_forward: Callable[[Block, Tensor, Tensor | None], Tensor] = feed_forward

    @classmethod
    def compiled(cls, kernel: Kernel = packed, **options: Any) -> Execution:
        """With `torch.compile` around everything but attention.

        Args:
            kernel: how to attend.
            **options: passed to `torch.compile`; sizes are dynamic unless told otherwise.
        """
        options = {"dynamic": True, **options}
        return cls(
            kernel,
            torch.compile(before_attention, **options),
            torch.compile(after_attention, **options),
            torch.compile(feed_forward, **options),
        )

    def attend(
        self, block: Block, x: Tensor, rows: Rows, needs: frozenset[str] = frozenset(), key_bias: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Attention half of a block on packed rows.

        Args:
            block: the block.
            x: `[rows, D]`.
            rows: how the rows fall into images.
            needs: evidence to compute on the way.
            key_bias: `[rows]`, added to the attention logits of each key.

        Returns:
            The rows after the residual, and the evidence asked for, one entry per row.
        """
        attn = cast(Attention, block.attn)
        q, k, v = self.before(block, x)
        y = self.kernel(q, k, v, rows, key_bias, dropout_rate(attn))
        evidence = evidence_of(needs, q, k, v, rows, key_bias, attn.scale)
        return self.after(block, x, y, drop_factor(block.drop_path1, x, rows)), evidence


PLAIN = Execution()
