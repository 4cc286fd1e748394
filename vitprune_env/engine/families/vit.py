"""timm's `VisionTransformer` of plain `Block`s: DeiT, AugReg ViT, DeiT III, DINOv2, CLIP, MAE, LV-ViT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from timm.models.vision_transformer import Attention, Block, VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from vitprune_env.engine.families.adapter import Family, Projections, add_branch, leave_attention, through


class ViTFamily(Family):
    """Pre-norm blocks with one fused projection to queries, keys and values; positions are added once."""

    name = "VisionTransformer"
    pools = ("token", "avg", "map", "token_and_mean")

    def recognises(self, model: nn.Module) -> bool:
        """Any `VisionTransformer`."""
        return isinstance(model, VisionTransformer)

    def refusal(self, model: Any) -> str | None:
        """Blocks or attention of another type, or what no family can be walked with."""
        for block in model.blocks:
            if type(block) is not Block:
                return f"a block of type {type(block).__name__} (only Block is walked)"
            if type(block.attn) is not Attention:
                return f"attention of type {type(block.attn).__name__} (only Attention is walked)"
        return super().refusal(model)

    def fitted(self, model: Any, state: Mapping[str, Any]) -> dict[str, Any]:
        """Through timm's filter, which interpolates position embeddings and patches."""
        return checkpoint_filter_fn(dict(state), model, adapt_layer_scale=True)

    def embed(self, model: Any, images: Tensor) -> Tensor:
        """Patch embedding, prefix tokens, position embedding."""
        return model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))

    def before_attention(self, block: Any, x: Tensor, position: Tensor | None) -> Projections:
        """One projection, split into queries, keys and values."""
        attn = block.attn
        q, k, v = attn.qkv(block.norm1(x)).view(x.shape[0], 3, attn.num_heads, attn.head_dim).unbind(1)
        return Projections(through(attn.q_norm, q), through(attn.k_norm, k), v)

    def after_attention(self, block: Any, x: Tensor, y: Tensor, factor: Tensor | None) -> Tensor:
        """Output projection, gate where there is one, layer scale."""
        attn = block.attn
        normed = block.norm1(x) if getattr(attn, "gate", None) is not None else x  # only a gate reads the input again
        return add_branch(x, through(block.ls1, leave_attention(attn, normed, y)), factor)

    def feed_forward(self, block: Any, x: Tensor, factor: Tensor | None) -> Tensor:
        """Norm, MLP, layer scale."""
        return add_branch(x, through(block.ls2, block.mlp(block.norm2(x))), factor)
