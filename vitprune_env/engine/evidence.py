"""Evidence: what a policy can see beside the tokens, from the attention half before its site or from the pixels.

A piece of evidence is one record. `Evidence` says how it is computed on packed rows, how on masked ones, what it costs
and what it requires of the network. `ImageEvidence` says how it is computed for each patch of an image.
`register_evidence` adds one; a policy then names it in `needs`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar, cast

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from vitprune_env.engine.attention import Rows, bias_views
from vitprune_env.errors import EvidenceError


class PackedAttention(NamedTuple):
    """One attention half on packed rows. The fused kernel does not return its weights."""

    q: Tensor  # [rows, heads, head dim]
    k: Tensor  # [rows, heads, head dim]
    v: Tensor  # [rows, heads, head dim]
    rows: Rows  # how the rows fall into images
    key_bias: Tensor | None  # [rows], added to every query's logit of that key
    scale: float  # of the logits


class MaskedAttention(NamedTuple):
    """One attention half in masked execution, where all tokens of all images are present."""

    weights: Tensor  # [B, heads, n, n], each row a softmax over the keys
    q: Tensor  # [B, heads, n, head dim]
    k: Tensor  # [B, heads, n, head dim]
    v: Tensor  # [B, heads, n, head dim]
    seen: Tensor  # [B, n] in 0..1, weight of each token as a key


class Readable(Protocol):
    """The part of a network that a requirement may depend on."""

    name: str
    has_class_token: bool
    num_prefix: int


def no_requirement(_network: Readable) -> str | None:
    """Any network can give it."""
    return None


def no_macs(rows: Tensor, _width: int) -> Tensor:
    """No matrix product beyond those of attention itself, `[B]` zeros."""
    return torch.zeros_like(rows)


@dataclass(frozen=True)
class Evidence:
    """One piece of evidence: how it is computed, what it costs, which networks have it."""

    name: str
    packed: Callable[[PackedAttention], Tensor]  # -> [rows, ...], one entry per row, prefix rows included
    masked: Callable[[MaskedAttention], Tensor]  # -> [B, n, ...], the same in masked execution
    macs: Callable[[Tensor, int], Tensor] = no_macs  # rows of each image [B] float64, width of all heads -> MACs [B]
    refusal: Callable[[Readable], str | None] = no_requirement  # why a network cannot give it; None: it can


@dataclass(frozen=True)
class ImageEvidence:
    """One number for each patch, computed from its pixels; a merged token has the mean over its patches.

    No matrix product, and so no MACs. Masked execution does not know what was merged: every patch has its own number.
    """

    name: str
    patches: Callable[[Tensor, tuple[int, int]], Tensor]  # normalised images [B, C, H, W], rows and columns -> [B, N]


EVIDENCE: dict[str, Evidence] = {}
"""All registered evidence from attention by name."""
IMAGE_EVIDENCE: dict[str, ImageEvidence] = {}
"""All registered evidence from pixels by name."""
E = TypeVar("E", Evidence, ImageEvidence)


def register_evidence(evidence: E) -> E:
    """Make a piece of evidence known by its name.

    Args:
        evidence: its record.

    Returns:
        The same.

    Raises:
        EvidenceError: for a name that stands for other evidence already.
    """
    if {**EVIDENCE, **IMAGE_EVIDENCE}.get(evidence.name, evidence) != evidence:
        raise EvidenceError(f"name: expected one that is not taken, got {evidence.name!r}")
    if isinstance(evidence, ImageEvidence):
        IMAGE_EVIDENCE[evidence.name] = evidence
    else:
        EVIDENCE[evidence.name] = evidence
    return evidence


def from_attention(needs: Collection[str]) -> frozenset[str]:
    """Those of the names that stand for evidence from attention."""
    return frozenset(name for name in needs if name in EVIDENCE)


def from_pixels(needs: Collection[str]) -> frozenset[str]:
    """Those of the names that stand for evidence from pixels."""
    return frozenset(name for name in needs if name in IMAGE_EVIDENCE)


def image_evidence(needs: Collection[str], images: Tensor | None, grid: tuple[int, int]) -> dict[str, Tensor]:
    """The evidence from pixels among `needs`, `[B, N]` each.

    Args:
        needs: names of evidence of both kinds.
        images: normalised, `[B, C, H, W]`; None where the tokens do not know theirs.
        grid: rows and columns of patches.

    Raises:
        EvidenceError: for tokens without images.
    """
    names = from_pixels(needs)
    if names and images is None:
        raise EvidenceError(
            f"needs: {min(names)!r} is computed from pixels, and these tokens were made without their images; "
            "start from images, or from what `TokenGame.prepare` or `Backbone.embed` returns"
        )
    return {name: IMAGE_EVIDENCE[name].patches(cast(Tensor, images), grid) for name in sorted(names)}


def names_of_evidence(needs: Collection[str]) -> frozenset[str]:
    """What a caller asks for, as a set.

    Raises:
        TypeError: for a single string, whose letters are no names.
    """
    if isinstance(needs, str):
        raise TypeError(f"needs: expected a set of names of evidence, got {needs!r}")
    return frozenset(needs)


def check_needs(needs: Collection[str], network: Readable) -> None:
    """Refuse evidence that is not registered or that this network cannot give.

    Raises:
        EvidenceError: naming the evidence.
    """
    for name in sorted(needs):
        if name in IMAGE_EVIDENCE:
            continue
        if name not in EVIDENCE:
            raise EvidenceError(f"needs: unknown evidence {name!r}; known: {', '.join((*EVIDENCE, *IMAGE_EVIDENCE))}")
        if (why := EVIDENCE[name].refusal(network)) is not None:
            raise EvidenceError(f"needs: {name!r} {why}")


def evidence_macs(needs: Collection[str], rows: Tensor, width: int) -> Tensor:
    """MACs `[B]` float64 of computing evidence where attention ran on `rows` `[B]` rows, prefix included."""
    total = torch.zeros_like(rows)
    for name in sorted(from_attention(needs)):
        total = total + EVIDENCE[name].macs(rows, width)
    return total


def _class_attention(attention: PackedAttention) -> Tensor:
    """Softmax row of the class token, mean over heads, `[rows]`."""
    q, k, _, rows, key_bias, scale = attention
    if len(rows.groups) > 1 and q.device.type != "cpu":
        return class_attention_ragged(q, k, rows, key_bias, scale)
    parts = []
    for q_i, k_i, bias in zip(rows.split(q), rows.split(k), bias_views(key_bias, rows), strict=True):
        logits = (q_i[:, :, :1] * scale) @ k_i.transpose(-2, -1)
        weights = (logits if bias is None else logits + bias).softmax(dim=-1)
        parts.append(weights.mean(dim=1).flatten())
    return torch.cat(parts)


def class_attention_ragged(q: Tensor, k: Tensor, rows: Rows, key_bias: Tensor | None, scale: float) -> Tensor:
    """Class attention of images of any lengths in a few large calls, `[rows]`: faster on a GPU than one per length."""
    image, first = rows.image(q.device), rows.offsets(q.device)[:-1]
    logits = (q[first][image] * k).sum(dim=-1).float() * scale  # [rows, heads]
    logits = logits if key_bias is None else logits + key_bias[:, None]
    top = logits.new_full((rows.num_images, logits.shape[1]), float("-inf"))
    top = top.scatter_reduce(0, image[:, None].expand_as(logits), logits, "amax")
    weights = (logits - top[image]).exp()
    total = torch.zeros_like(top).index_add(0, image, weights)
    return (weights / total[image]).mean(dim=1).to(q.dtype)


def _mean_attention(attention: PackedAttention) -> Tensor:
    """Attention that each row receives, mean over heads and all queries, `[rows]`."""
    q, k, _, rows, key_bias, scale = attention
    parts = []
    for q_i, k_i, bias in zip(rows.split(q), rows.split(k), bias_views(key_bias, rows), strict=True):
        logits = (q_i * scale) @ k_i.transpose(-2, -1)
        weights = (logits if bias is None else logits + bias).softmax(dim=-1)
        parts.append(weights.mean(dim=(1, 2)).flatten())
    return torch.cat(parts)


def _masked_mean_attention(attention: MaskedAttention) -> Tensor:
    """The same, queries weighted as they are as keys, so that removed tokens do not count, `[B, n]`."""
    seen = attention.seen
    return torch.einsum("bq,bqk->bk", seen, attention.weights.mean(dim=1)) / seen.sum(dim=1, keepdim=True)


def _brightness(images: Tensor, grid: tuple[int, int]) -> Tensor:
    """Mean of the normalised pixels of each patch over its area and all channels, `[B, N]`."""
    return adaptive_avg_pool2d(images.float().mean(dim=1), grid).flatten(1)


def _needs_class_token(network: Readable) -> str | None:
    return None if network.has_class_token else f"asks for a class token, and {network.name} has none"


register_evidence(
    Evidence(
        "cls_attention",
        packed=_class_attention,
        masked=lambda attention: attention.weights[:, :, 0].mean(dim=1),
        macs=lambda rows, width: rows * width,
        refusal=_needs_class_token,
    )
)
register_evidence(
    Evidence(
        "mean_attention",
        packed=_mean_attention,
        masked=_masked_mean_attention,
        macs=lambda rows, width: rows * rows * width,
    )
)
register_evidence(
    Evidence(
        "keys",  # mean over heads, [rows, head dim]
        packed=lambda attention: attention.k.mean(dim=1),
        masked=lambda attention: attention.k.mean(dim=1),
    )
)
register_evidence(
    Evidence(
        "value_norms",  # Euclidean norm over all heads, [rows]
        packed=lambda attention: attention.v.flatten(1).norm(dim=1),
        masked=lambda attention: attention.v.transpose(1, 2).flatten(2).norm(dim=2),
    )
)
register_evidence(ImageEvidence("brightness", _brightness))
