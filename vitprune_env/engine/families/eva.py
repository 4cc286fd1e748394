"""timm's `Eva`: EVA, EVA-02, DINOv3, ViTs with rotary positions, Perception Encoder.

Rotary positions turn queries and keys in every block by angles that depend on the patch. Each packed row takes the
angles of its own patch; prefix rows are not turned. A merged token keeps the patch, and so the angles, of the token
that the others merged into.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.attention import AttentionRope
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models.eva import Eva, EvaAttention, EvaBlock, checkpoint_filter_fn
from torch import Tensor, nn

from vitprune_env.engine.attention import Rows
from vitprune_env.engine.families.adapter import Family, Positions, Projections, add_branch, leave_attention, through


class EvaFamily(Family):
    """Pre-norm blocks with rotary positions, separate or fused projections, and layer scales as plain parameters."""

    name = "Eva"
    mlp_parts = ("norm2.", "mlp.", "gamma_2")

    def recognises(self, model: nn.Module) -> bool:
        """Any `Eva`."""
        return isinstance(model, Eva)

    def refusal(self, model: Any) -> str | None:
        """Post-norm blocks, grouped keys, augmented positions, or what no family can be walked with."""
        for block in model.blocks:
            if type(block) is not EvaBlock:
                return f"a block of type {type(block).__name__} (only EvaBlock is walked)"
            attn = block.attn
            if type(attn) not in (EvaAttention, AttentionRope):
                return f"attention of type {type(attn).__name__} (only EvaAttention and AttentionRope are walked)"
            if getattr(attn, "num_kv_heads", attn.num_heads) != attn.num_heads:
                return f"num_kv_heads={attn.num_kv_heads} (every head needs keys of its own)"
        if getattr(model.rope, "aug_active", False):
            return "rotary positions that are augmented in training (the two halves of a pass would disagree)"
        return super().refusal(model)

    def fitted(self, model: Any, state: Mapping[str, Any]) -> dict[str, Any]:
        """Through timm's filter, which interpolates position embeddings and patches."""
        return checkpoint_filter_fn(dict(state), model)

    def embed(self, model: Any, images: Tensor) -> Tensor:
        """Patch embedding, prefix tokens, absolute positions where there are some."""
        return model.norm_pre(model._pos_embed(model.patch_embed(images))[0])

    def positions(self, model: Any, rows: Rows) -> Positions | None:
        """Sine and cosine of each row's angles, `[rows, 1 or heads, 2 * head dim]`."""
        if model.rope is None:
            return None
        has_shape = hasattr(model.rope, "feat_shape")
        table = model.rope.get_embed() if has_shape else model.rope.get_embed(shape=model.patch_embed.grid_size)
        if not model.rope_mixed:  # [N, 2 * head dim], the same for all blocks and heads
            angles = _of_rows(table[:, None], rows)
            return lambda _block: angles
        return lambda block: _of_rows(table[block].transpose(0, 1), rows)  # [blocks, heads, N, 2 * head dim]

    def before_attention(self, block: Any, x: Tensor, position: Tensor | None) -> Projections:
        """Queries, keys and values, the first two turned by their rows' angles."""
        attn = block.attn
        q, k, v = (part.unflatten(1, (attn.num_heads, -1)) for part in _project(attn, block.norm1(x)))
        q, k = through(attn.q_norm, q), through(attn.k_norm, k)
        if position is not None:
            q, k = (apply_rot_embed_cat(part, position, half=attn.rotate_half).type_as(v) for part in (q, k))
        return Projections(q, k, v)

    def after_attention(self, block: Any, x: Tensor, y: Tensor, factor: Tensor | None) -> Tensor:
        """Output projection, gate where there is one, layer scale."""
        attn = block.attn
        normed = block.norm1(x) if getattr(attn, "gate", None) is not None else x  # only a gate reads the input again
        branch = leave_attention(attn, normed, y)
        return add_branch(x, branch if block.gamma_1 is None else block.gamma_1 * branch, factor)

    def feed_forward(self, block: Any, x: Tensor, factor: Tensor | None) -> Tensor:
        """Norm, MLP, layer scale."""
        branch = block.mlp(block.norm2(x))
        return add_branch(x, branch if block.gamma_2 is None else block.gamma_2 * branch, factor)


def _project(attn: Any, x: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values `[rows, width]` of normalised rows."""
    if attn.qkv is None:
        return attn.q_proj(x), attn.k_proj(x), attn.v_proj(x)
    if getattr(attn, "q_bias", None) is None:
        return attn.qkv(x).chunk(3, dim=1)
    bias = torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
    if attn.qkv_bias_separate:
        return (attn.qkv(x) + bias).chunk(3, dim=1)
    return F.linear(x, attn.qkv.weight, bias).chunk(3, dim=1)


def _of_rows(table: Tensor, rows: Rows) -> Tensor:
    """Each row's entry of `table` `[N, heads, 2 * head dim]`; angle 0 (sine 0, cosine 1) for prefix rows."""
    half = table.shape[-1] // 2
    still = torch.cat([table.new_zeros(half), table.new_ones(half)]).expand_as(table[:1])
    return torch.cat([still, table]).index_select(0, rows.patch(table.device) + 1)
