"""What the engine needs to know of a family of timm models; a family is one file with one subclass of `Family`.

A family says how images become tokens and how one block computes its two halves, attention and MLP, on packed rows
`[rows, D]`. Everything else (which rows there are, how they attend, what evidence is collected, what it costs) is the
same for all families. The base class has what the timm ViTs have in common.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vitprune_env.engine.attention import Rows

Positions = Callable[[int], Tensor]
"""Block number (0-based) to the positions of the rows, in whatever form the family's attention takes them."""


class Projections(NamedTuple):
    """What attention computes with: queries, keys and values of packed rows."""

    q: Tensor  # [rows, heads, head dim]
    k: Tensor  # [rows, heads, head dim]
    v: Tensor  # [rows, heads, head dim]


class Family:
    """One family of timm models; subclasses fill in what is particular to it."""

    name: str
    """Class of the models, for error messages."""
    mlp_parts: tuple[str, ...] = ("norm2.", "mlp.", "ls2.")
    """What the names of the parameters of a block's MLP half begin with."""
    end_parts: tuple[str, ...] = ("norm.", "fc_norm.", "head.", "head_dist.", "attn_pool.")
    """What the names of the parameters behind the last block begin with."""
    pools: tuple[str, ...] = ("token", "avg")
    """Ways of reading the tokens in the end (timm's `global_pool`) that ragged tokens can be read in."""

    def recognises(self, model: nn.Module) -> bool:
        """Whether the model belongs to this family."""
        raise TypeError(f"{type(self).__name__} does not say which models it recognises")

    def refusal(self, model: Any) -> str | None:
        """Why this model of the family cannot be walked, as the end of a sentence; None: it can."""
        return common_refusal(model, self.pools)

    def fitted(self, model: Any, state: Mapping[str, Any]) -> dict[str, Any]:
        """The tensors of a weight file, by the names and in the sizes of the model."""
        raise TypeError(f"{type(self).__name__} does not say how weight files fit its models")

    def embed(self, model: Any, images: Tensor) -> Tensor:
        """Images `[B, C, H, W]` to tokens before the first block, `[B, P + N, D]`."""
        raise TypeError(f"{type(self).__name__} does not say how it embeds images")

    def positions(self, model: Any, rows: Rows) -> Positions | None:
        """Positions that attention needs in every block, for these rows; None: positions are added once, in `embed`."""
        return None

    def before_attention(self, block: Any, x: Tensor, position: Tensor | None) -> Projections:
        """Norm and projection of rows `[rows, D]` to queries, keys and values."""
        raise TypeError(f"{type(self).__name__} does not say how it projects rows")

    def after_attention(self, block: Any, x: Tensor, y: Tensor, factor: Tensor | None) -> Tensor:
        """Projection of the mixed values `y` `[rows, width]` and the residual sum with `x`, `[rows, D]`.

        `factor` `[rows, 1]` multiplies the branch (stochastic depth); None: 1.
        """
        raise TypeError(f"{type(self).__name__} does not say what follows attention")

    def feed_forward(self, block: Any, x: Tensor, factor: Tensor | None) -> Tensor:
        """MLP half of a block on rows `[rows, D]`, with the residual sum; `factor` as in `after_attention`."""
        raise TypeError(f"{type(self).__name__} does not say how its MLP half computes")

    def attention_macs(self, block: Any) -> int:
        """MACs per row of the linear layers of the attention half."""
        return linear_macs(block.attn)

    def attention_width(self, block: Any) -> int:
        """Width of all heads together; scores and mixing cost this per pair of rows, each."""
        return block.attn.num_heads * block.attn.head_dim

    def mlp_macs(self, block: Any) -> int:
        """MACs per row of the MLP half."""
        return linear_macs(block.mlp)


def common_refusal(model: Any, pools: tuple[str, ...] = Family.pools) -> str | None:
    """Why a model cannot be run whatever its family, as the end of a sentence; None: it can.

    Args:
        model: the timm model.
        pools: values of `global_pool` that the family can be read with.
    """
    if model.global_pool not in pools or (getattr(model, "attn_pool", None) is not None) != (
        model.global_pool == "map"
    ):
        return f"global_pool={model.global_pool!r} (only {', '.join(map(repr, pools))} read ragged tokens)"
    if getattr(model, "pool_include_prefix", False):
        return "pooling over the prefix tokens (pool_include_prefix)"
    if getattr(model, "dynamic_img_size", False):
        return "dynamic_img_size=True (the number of agents must be fixed; pass dynamic_img_size=False)"
    if not isinstance(getattr(model, "patch_drop", None) or nn.Identity(), nn.Identity):
        return "patch_drop_rate > 0 (the number of agents must be fixed)"
    if model.num_classes <= 0:
        return "no classifier (num_classes=0); num_classes=<how many> gives it one"
    return None


def linear_macs(module: nn.Module) -> int:
    """MACs per row of every linear layer in a module."""
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


def through(module: nn.Module, x: Tensor) -> Tensor:
    """`module(x)`, without the call for an identity; on small images the calls cost noticeable time."""
    return x if type(module) is nn.Identity else module(x)


def add_branch(x: Tensor, y: Tensor, factor: Tensor | None) -> Tensor:
    """The residual sum, `factor` `[rows, 1]` times the branch `y`."""
    return x + (y if factor is None else y * factor)


def leave_attention(attn: Any, x: Tensor, y: Tensor) -> Tensor:
    """Norm, gate and output projection of the mixed values `y` `[rows, width]`; `x` is the half's normalised input."""
    y = through(attn.norm, y)
    gate = getattr(attn, "gate", None)
    if gate is not None:
        y = y * torch.sigmoid(gate(x))
    return attn.proj_drop(attn.proj(y))
