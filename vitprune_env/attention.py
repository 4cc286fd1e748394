"""Self-attention over packed rows with a timm `Attention` module's own weights, and the evidence it can give.

Images with equal row counts attend as one batch; ragged ones attend image by image on views, which on a CPU reaches
what the MACs promise (padding, nested tensors and masks do not).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Attention
from torch import Tensor, nn


@dataclass(frozen=True)
class Rows:
    """How packed rows fall into images: rows of one image lie together, prefix tokens first."""

    lengths: tuple[int, ...]  # rows of each image
    num_prefix: int  # P

    @property
    def groups(self) -> list[tuple[int, int]]:
        """`(images, rows per image)` batches: one if all images are equally long, else one per image."""
        if len(set(self.lengths)) == 1:
            return [(len(self.lengths), self.lengths[0])]
        return [(1, length) for length in self.lengths]

    def image(self, device: torch.device) -> Tensor:
        """`[rows]` int64, the image of each row."""
        lengths = torch.tensor(self.lengths, device=device)
        return torch.arange(len(self.lengths), device=device).repeat_interleave(lengths)

    def split(self, values: Tensor) -> Iterator[Tensor]:
        """Per group, the heads-first view `[images, heads, rows per image, head dim]` of `[rows, heads, head dim]`."""
        sizes = [images * length for images, length in self.groups]
        for (images, length), part in zip(self.groups, values.split(sizes), strict=True):
            yield part.view(images, length, *values.shape[1:]).transpose(1, 2)


def attend_packed(
    attn: Attention,
    x: Tensor,
    rows: Rows,
    needs: frozenset[str] = frozenset(),
    key_bias: Tensor | None = None,
    key_factor: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """What `attn(x)` computes, on packed rows.

    Args:
        attn: timm attention module.
        x: normalised rows `[rows, D]`.
        rows: how they fall into images.
        needs: evidence to compute beside the fused attention, which does not hand out its weights.
        key_bias: `[rows]` added to every query's logit of that key.
        key_factor: `[B, n]` multiplies the softmax numerators (soft masks); needs equally long images.

    Returns:
        `[rows, D]` and the evidence, one entry per row.
    """
    qkv = attn.qkv(x).view(x.shape[0], 3, attn.num_heads, attn.head_dim)
    q, k, v = qkv.unbind(1)
    q, k = attn.q_norm(q), attn.k_norm(k)
    biases = [None] * len(rows.groups) if key_bias is None else _bias_views(key_bias, rows)
    parts, found = [], {name: [] for name in needs}
    for q_i, k_i, v_i, bias in zip(rows.split(q), rows.split(k), rows.split(v), biases, strict=True):
        if key_factor is None:
            dropout = cast(nn.Dropout, attn.attn_drop).p if attn.training else 0.0
            y = F.scaled_dot_product_attention(q_i, k_i, v_i, attn_mask=bias, dropout_p=dropout)
        else:
            y = _soft_masked(q_i, k_i, v_i, key_factor, attn.scale)
        parts.append(y.transpose(1, 2).reshape(-1, attn.num_heads * attn.head_dim))
        for name in needs & {"cls_attention", "mean_attention"}:
            found[name].append(_EVIDENCE[name](q_i, k_i, bias, attn.scale))
    y = attn.norm(parts[0] if len(parts) == 1 else torch.cat(parts))
    gate = getattr(attn, "gate", None)
    if gate is not None:
        y = y * gate(x).sigmoid()
    evidence = {name: torch.cat(values) for name, values in found.items() if values}
    if "keys" in needs:
        evidence["keys"] = k.mean(dim=1)
    if "value_norms" in needs:
        evidence["value_norms"] = v.flatten(1).norm(dim=1)
    return attn.proj_drop(attn.proj(y)), evidence


def _bias_views(key_bias: Tensor, rows: Rows) -> list[Tensor]:
    sizes = [images * length for images, length in rows.groups]
    parts = key_bias.split(sizes)
    return [part.view(images, 1, 1, length) for (images, length), part in zip(rows.groups, parts, strict=True)]


def _soft_masked(q: Tensor, k: Tensor, v: Tensor, key_factor: Tensor, scale: float) -> Tensor:
    """Attention with softmax numerators multiplied by `key_factor` `[B, n]`; finite gradients also where it is 0."""
    factor = key_factor[:, None, None, :].to(q)
    logits = (q * scale) @ k.transpose(-2, -1)
    top = logits.masked_fill(factor == 0, float("-inf")).amax(dim=-1, keepdim=True).detach()
    # A removed key may exceed the largest remaining one by any amount: clamp, lest inf * 0 become NaN.
    weights = (logits - top).clamp(max=30.0).exp() * factor
    return (weights / weights.sum(dim=-1, keepdim=True)) @ v


def _cls_attention(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Softmax row of the class token, mean over heads, one entry per row `[images * rows]`."""
    logits = (q[:, :, :1] * scale) @ k.transpose(-2, -1)
    weights = (logits if bias is None else logits + bias).softmax(dim=-1)
    return weights.mean(dim=1).flatten()


def _mean_attention(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Attention that each row receives, mean over heads and all queries `[images * rows]`."""
    logits = (q * scale) @ k.transpose(-2, -1)
    weights = (logits if bias is None else logits + bias).softmax(dim=-1)
    return weights.mean(dim=(1, 2)).flatten()


_EVIDENCE = {"cls_attention": _cls_attention, "mean_attention": _mean_attention}
