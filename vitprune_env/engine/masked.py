"""Masked, differentiable execution, one half-block at a time: every token stays, weights say how much it is seen.

The reference that real removal is tested against, and what baselines are fitted with: whoever decides at a site may
look at the tokens there (`SoftState.tokens`), turn what it sees into weights, and go on.

    state = start_soft(backbone, images)
    state, evidence = run_soft(backbone, state, site.half, needs={"keys"})
    weights = predictor(state.tokens)                                 # [B, N] in 0..1
    state, _ = run_soft(backbone, state, 2 * backbone.depth, weights)
    logits = classify_soft(backbone, state, weights)
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import torch
from timm.models.vision_transformer import Attention, Block
from torch import Tensor

from vitprune_env.engine.attention import (
    Rows,
    attend_packed,
    per_pair,
    project_in,
    project_out,
    soft_attend,
    soft_weights,
)
from vitprune_env.engine.execution import add_branch, drop_factor, feed_forward

if TYPE_CHECKING:
    from vitprune_env.engine.backbone import Backbone


@dataclass(frozen=True)
class SoftState:
    """All tokens of B images between two half-blocks; nobody ever leaves."""

    x: Tensor  # [B, P + N, D], prefix tokens first
    num_prefix: int  # P
    half: int = 0  # half-blocks that have run

    @property
    def prefix(self) -> Tensor:
        """`[B, P, D]` prefix tokens."""
        return self.x[:, : self.num_prefix]

    @property
    def tokens(self) -> Tensor:
        """`[B, N, D]` patch tokens."""
        return self.x[:, self.num_prefix :]

    def with_tokens(self, tokens: Tensor) -> SoftState:
        """The same state with other patch tokens `[B, N, D]`, such as merged ones."""
        return replace(self, x=torch.cat([self.prefix, tokens], dim=1))


def start_soft(backbone: Backbone, images: Tensor) -> SoftState:
    """The tokens of images `[B, C, H, W]` before the first block.

    Raises:
        ValueError: for images that do not fit the model.
    """
    backbone.check_images(images)
    return SoftState(backbone.embed(images).x.view(len(images), -1, backbone.embed_dim), backbone.num_prefix)


def run_soft(
    backbone: Backbone,
    state: SoftState,
    stop: int,
    key_weights: Tensor | None = None,
    key_bias: Tensor | None = None,
    needs: Set[str] = frozenset(),
    see_themselves: bool = False,
) -> tuple[SoftState, dict[str, Tensor]]:
    """Run on until `stop` half-blocks have run (0-based; even: attention, odd: MLP).

    Differentiable in tokens, weights (also at 0 and 1) and bias.

    Args:
        backbone: the network.
        state: the tokens, which know how many half-blocks they have been through.
        stop: one past the last half-block to run.
        key_weights: `[B, N]` in 0..1, factor on the softmax numerators of each patch token as a key; None: 1.
        key_bias: `[B, N]` added to all attention logits of each patch token as a key, such as the log of its size.
        needs: evidence to collect in the last attention half of the range. `"mean_attention"` is the mean over the
            queries weighted as they are as keys, so that removed tokens have no vote.
        see_themselves: whether every token sees itself in full, whatever its weight (DynamicViT trains like this).

    Returns:
        The tokens afterwards, and the evidence of the patch tokens, `[B, N, ...]` each.

    Raises:
        ValueError: for a stop outside the rest of the network, or weights or a bias of a wrong shape.
    """
    if not state.half <= stop <= 2 * backbone.depth:
        raise ValueError(f"stop: expected {state.half} to {2 * backbone.depth} half-blocks, got {stop}")
    factor, bias = _with_prefix(state, key_weights, 1.0, "key_weights"), _with_prefix(state, key_bias, 0.0, "key_bias")
    x, evidence, last_attention = state.x, {}, (stop - 1) // 2 * 2
    rows = Rows(((len(x), x.shape[1]),))
    for half in range(state.half, stop):
        block, flat = backbone.block(half // 2 + 1), x.flatten(0, 1)
        if half % 2:
            x = feed_forward(block, flat, drop_factor(block.drop_path2, flat, rows)).view_as(x)
            continue
        wanted = needs if half == last_attention else frozenset()
        y, found = _attend(block, flat, rows, factor, bias, wanted, see_themselves)
        x = add_branch(flat, block.ls1(y), drop_factor(block.drop_path1, flat, rows)).view_as(x)
        evidence = {name: value[:, state.num_prefix :] for name, value in found.items()}
    return SoftState(x, state.num_prefix, stop), evidence


def classify_soft(backbone: Backbone, state: SoftState, weights: Tensor | None = None) -> Tensor:
    """Logits `[B, classes]` from the tokens that leave the last block.

    Args:
        backbone: the network.
        state: the tokens after its last block.
        weights: `[B, N]` of the patch tokens in the mean of average-pooling models; None: 1.
    """
    model = backbone.model
    if not backbone.reads_patches:
        return model.forward_head(model.norm(state.prefix))
    normed = model.norm(state.x)
    patches = normed[:, state.num_prefix :]
    share = torch.ones_like(patches[..., :1]) if weights is None else weights[..., None]
    mean = (patches * share).sum(1, keepdim=True) / share.sum(1, keepdim=True)
    return model.forward_head(torch.cat([normed[:, : state.num_prefix], mean], dim=1))


def _with_prefix(state: SoftState, values: Tensor | None, fill: float, name: str) -> Tensor | None:
    """One value per row `[B, P + N]` from one per patch token."""
    if values is None:
        return None
    if values.shape != state.tokens.shape[:2]:
        raise ValueError(f"{name}: expected [B, N] = {list(state.tokens.shape[:2])}, got {list(values.shape)}")
    return torch.cat([values.new_full((len(values), state.num_prefix), fill), values], dim=1)


def _attend(
    block: Block,
    flat: Tensor,
    rows: Rows,
    factor: Tensor | None,
    bias: Tensor | None,
    needs: Set[str],
    see_themselves: bool,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Attention branch of a block on rows `[B * n, D]` with the evidence of all rows, `[B, n, ...]` each."""
    attn, normed = cast(Attention, block.attn), block.norm1(flat)
    if factor is None and bias is None and not needs:
        return attend_packed(attn, normed, rows)[0], {}  # fused
    q, k, v = project_in(attn, normed)
    (q_b,), (k_b,), (v_b,) = rows.split(q), rows.split(k), rows.split(v)
    seen = q_b.new_ones(q_b.shape[0], q_b.shape[2]) if factor is None else factor
    if bias is None and not needs:
        mixed, evidence = soft_attend(q_b, k_b, v_b, seen, attn.scale, see_themselves), {}
    else:
        weights = soft_weights(q_b, k_b, per_pair(seen) if see_themselves else seen, attn.scale, bias)
        mixed, evidence = weights @ v_b, {name: _evidence(name, weights, k_b, v_b, seen) for name in needs}
    return project_out(attn, normed, mixed.transpose(1, 2).reshape(flat.shape[0], -1)), evidence


def _evidence(name: str, weights: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Evidence `[B, n, ...]` from attention `[B, heads, n, n]`, keys and values `[B, heads, n, head dim]`."""
    if name == "cls_attention":
        return weights[:, :, 0].mean(dim=1)
    if name == "mean_attention":
        return torch.einsum("bq,bqk->bk", seen, weights.mean(dim=1)) / seen.sum(dim=1, keepdim=True)
    if name == "keys":
        return k.mean(dim=1)
    return v.transpose(1, 2).flatten(2).norm(dim=2)
