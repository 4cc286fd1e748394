"""Self-attention over packed rows with a timm `Attention` module's own weights, and the evidence it can give.

Images with equally many rows that lie together attend as one batch, on views: on a CPU that reaches what the MACs
promise (padding, nested tensors and masks do not). Other ways to compute the same are in `kernels`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import cast

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Attention
from torch import Tensor, nn


@dataclass(frozen=True)
class Rows:
    """How packed rows fall into images: rows of one image lie together, prefix tokens first."""

    groups: tuple[tuple[int, int], ...]  # (images, rows of each) of images that lie together and are equally long
    starts: Callable[[], Tensor] | None = None  # gives offsets on the device, where somebody already has them

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
    q, k, v = project_in(attn, x)
    if key_factor is None:
        y = packed(q, k, v, rows, key_bias, dropout_rate(attn))
    else:
        (q_b,), (k_b,), (v_b,) = rows.split(q), rows.split(k), rows.split(v)
        y = soft_attend(q_b, k_b, v_b, key_factor, attn.scale).transpose(1, 2).reshape(x.shape[0], -1)
    return project_out(attn, x, y), evidence_of(needs, q, k, v, rows, key_bias, attn.scale)


def project_in(attn: Attention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values `[rows, heads, head dim]` of normalised rows `[rows, D]`."""
    q, k, v = attn.qkv(x).view(x.shape[0], 3, attn.num_heads, attn.head_dim).unbind(1)
    return through(attn.q_norm, q), through(attn.k_norm, k), v


def project_out(attn: Attention, x: Tensor, y: Tensor) -> Tensor:
    """What the attention module does with the mixed values `y` `[rows, width]` of its input `x` `[rows, D]`."""
    y = through(attn.norm, y)
    gate = getattr(attn, "gate", None)
    if gate is not None:
        y = y * gate(x).sigmoid()
    return attn.proj_drop(attn.proj(y))


def through(module: nn.Module, x: Tensor) -> Tensor:
    """`module(x)`, without the call where nothing would happen: a small image notices twenty of them per block."""
    return x if type(module) is nn.Identity else module(x)


def dropout_rate(attn: Attention) -> float:
    """Rate at which attention weights are dropped now."""
    return cast(nn.Dropout, attn.attn_drop).p if attn.training else 0.0


def evidence_of(
    needs: frozenset[str], q: Tensor, k: Tensor, v: Tensor, rows: Rows, key_bias: Tensor | None, scale: float
) -> dict[str, Tensor]:
    """The evidence asked for, one entry per row: name -> `[rows, ...]`."""
    evidence = {}
    grouped = needs & {"cls_attention", "mean_attention"}
    if "cls_attention" in needs and len(rows.groups) > 1 and q.device.type != "cpu":
        evidence["cls_attention"] = cls_attention_ragged(q, k, rows, key_bias, scale)
        grouped -= {"cls_attention"}
    for name in grouped:
        parts = zip(rows.split(q), rows.split(k), bias_views(key_bias, rows), strict=True)
        evidence[name] = torch.cat([_EVIDENCE[name](q_i, k_i, bias, scale) for q_i, k_i, bias in parts])
    if "keys" in needs:
        evidence["keys"] = k.mean(dim=1)
    if "value_norms" in needs:
        evidence["value_norms"] = v.flatten(1).norm(dim=1)
    return evidence


def bias_views(key_bias: Tensor | None, rows: Rows) -> list[Tensor] | list[None]:
    """Per group, `[images, 1, 1, rows per image]` of `[rows]`, or None each."""
    if key_bias is None:
        return [None] * len(rows.groups)
    parts = key_bias.split(rows.sizes)
    return [part.view(images, 1, 1, length) for (images, length), part in zip(rows.groups, parts, strict=True)]


def soft_weights(q: Tensor, k: Tensor, key_factor: Tensor, scale: float, key_bias: Tensor | None = None) -> Tensor:
    """Softmax over keys, its numerators multiplied by factors; finite gradients also where a factor is 0.

    Args:
        q: `[B, heads, n, head dim]`.
        k: keys, likewise.
        key_factor: `[B, n]`, or `[B, n, n]` for other factors per query (rows) and key (columns).
        scale: of the logits.
        key_bias: `[B, n]` added to every query's logit of that key.

    Returns:
        `[B, heads, n, n]`.
    """
    factor = (key_factor[:, None, None] if key_factor.dim() == 2 else key_factor[:, None]).to(q)
    logits = (q * scale) @ k.transpose(-2, -1)
    if key_bias is not None:
        logits = logits + key_bias[:, None, None].to(q)
    top = logits.masked_fill(factor == 0, float("-inf")).amax(dim=-1, keepdim=True).detach()
    # A removed key may exceed the largest remaining one by any amount: clamp, lest inf * 0 become NaN.
    weights = (logits - top).clamp(max=30.0).exp() * factor
    return weights / weights.sum(dim=-1, keepdim=True)


def soft_attend(
    q: Tensor, k: Tensor, v: Tensor, key_factor: Tensor, scale: float, see_themselves: bool = False
) -> Tensor:
    """What `soft_weights(q, k, key_factor, scale) @ v` is, in half the time: the factors ride on the values.

    Args:
        q: `[B, heads, n, head dim]`.
        k: keys, likewise.
        v: values, likewise.
        key_factor: `[B, n]`.
        scale: of the logits.
        see_themselves: whether every row sees itself with a factor of 1.

    Returns:
        `[B, heads, n, head dim]`.
    """
    factor = key_factor[:, None, :, None].to(v)
    values = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
    weights = ((q * scale) @ k.transpose(-2, -1)).softmax(dim=-1)
    mixed = weights @ (values * factor)
    if see_themselves:
        mixed = mixed + weights.diagonal(dim1=-2, dim2=-1)[..., None] * (values * (1 - factor))
    total = mixed[..., -1:]
    if (total < torch.finfo(total.dtype).tiny ** 0.5).any():  # removed keys exceed all others by far: lost in rounding
        seen = per_pair(key_factor) if see_themselves else key_factor
        return soft_weights(q, k, seen, scale) @ v
    return mixed[..., :-1] / total


def per_pair(key_factor: Tensor) -> Tensor:
    """Factors of keys `[B, n]` as factors per query and key `[B, n, n]`, 1 where a row meets itself."""
    return torch.maximum(key_factor[:, None], torch.eye(key_factor.shape[1]).to(key_factor))


def _cls_attention(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Softmax row of the class token, mean over heads, one entry per row `[images * rows]`."""
    logits = (q[:, :, :1] * scale) @ k.transpose(-2, -1)
    weights = (logits if bias is None else logits + bias).softmax(dim=-1)
    return weights.mean(dim=1).flatten()


def cls_attention_ragged(q: Tensor, k: Tensor, rows: Rows, key_bias: Tensor | None, scale: float) -> Tensor:
    """The same for images of any lengths at once, `[rows]`: a GPU would wait longer for many small calls."""
    image, first = rows.image(q.device), rows.offsets(q.device)[:-1]
    logits = (q[first][image] * k).sum(dim=-1).float() * scale  # [rows, heads]
    logits = logits if key_bias is None else logits + key_bias[:, None]
    top = logits.new_full((rows.num_images, logits.shape[1]), float("-inf"))
    top = top.scatter_reduce(0, image[:, None].expand_as(logits), logits, "amax")
    weights = (logits - top[image]).exp()
    total = torch.zeros_like(top).index_add(0, image, weights)
    return (weights / total[image]).mean(dim=1).to(q.dtype)


def _mean_attention(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Attention that each row receives, mean over heads and all queries `[images * rows]`."""
    logits = (q * scale) @ k.transpose(-2, -1)
    weights = (logits if bias is None else logits + bias).softmax(dim=-1)
    return weights.mean(dim=(1, 2)).flatten()


_EVIDENCE = {"cls_attention": _cls_attention, "mean_attention": _mean_attention}
