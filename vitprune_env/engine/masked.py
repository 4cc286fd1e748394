"""Masked, differentiable execution: every token stays, and a weight scales how much the others attend to it.

The reference that real removal is tested against, and what baselines are fitted with. One half-block at a time:

    state = start_masked(backbone, images)
    state, evidence = run_masked(backbone, state, site.half, needs={"keys"})
    weights = predictor(state.tokens)                                 # [B, N] in 0..1
    state, _ = run_masked(backbone, state, 2 * backbone.depth, weights)
    logits = classify_masked(backbone, state, weights)

`Walk` with a `Masked` medium does the same from site to site.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vitprune_env.engine.attention import Rows
from vitprune_env.engine.evidence import EVIDENCE, MaskedAttention, check_needs, from_attention, image_evidence
from vitprune_env.engine.families.adapter import Projections
from vitprune_env.engine.halves import AttendPacked, Execution, Found, run_halves
from vitprune_env.engine.network import Network


@dataclass(frozen=True)
class MaskedState:
    """All tokens of B images between two half-blocks; no token ever leaves."""

    x: Tensor  # [B, P + N, D], prefix tokens first
    num_prefix: int  # P
    half: int = 0  # half-blocks that have run
    weights: Tensor | None = None  # [B, N] in 0..1, how much each patch token is seen as a key; None: 1
    size: Tensor | None = None  # [B, N], patches that each token stands for; None: 1
    order: Tensor | None = None  # [B, N] int64, rank in the current sequence, -1 for removed tokens; None: token order
    images: Tensor | None = None  # [B, C, H, W], for evidence from pixels; None: unknown

    @property
    def prefix(self) -> Tensor:
        """`[B, P, D]` prefix tokens."""
        return self.x[:, : self.num_prefix]

    @property
    def tokens(self) -> Tensor:
        """`[B, N, D]` patch tokens."""
        return self.x[:, self.num_prefix :]

    def with_tokens(self, tokens: Tensor) -> MaskedState:
        """The same state with other patch tokens `[B, N, D]`, such as merged ones."""
        return replace(self, x=torch.cat([self.prefix, tokens], dim=1))

    def with_weights(self, weights: Tensor) -> MaskedState:
        """The same state with other weights `[B, N]`."""
        return replace(self, weights=weights)


def start_masked(network: Network, images: Tensor) -> MaskedState:
    """The tokens of images `[B, C, H, W]` before the first block.

    Raises:
        ValueError: for images that do not fit the model.
    """
    network.check_images(images)
    x = network.embed(images).x.view(len(images), -1, network.embed_dim)
    return MaskedState(x, network.num_prefix, images=images)


def run_masked(
    network: Network,
    state: MaskedState,
    stop: int,
    key_weights: Tensor | None = None,
    key_bias: Tensor | None = None,
    needs: Collection[str] = frozenset(),
    see_themselves: bool = False,
) -> tuple[MaskedState, Found]:
    """Run on until `stop` half-blocks have run (0-based; even: attention, odd: MLP).

    Differentiable in tokens, weights (also at 0 and 1) and bias.

    Args:
        network: the network.
        state: the tokens, which know how many half-blocks they have been through.
        stop: one past the last half-block to run.
        key_weights: `[B, N]` in 0..1, factor on the softmax numerators of each patch token as a key; None: 1.
        key_bias: `[B, N]` added to all attention logits of each patch token as a key, such as the log of its size.
        needs: evidence to collect, from attention in the last attention half of the range. In `"mean_attention"`
            queries are weighted as they are as keys, so that removed tokens do not count.
        see_themselves: whether every token sees itself in full, whatever its weight (DynamicViT trains like this).

    Returns:
        The tokens afterwards, and the evidence of the patch tokens, `[B, N, ...]` each.

    Raises:
        ValueError: for a stop outside the rest of the network, or weights or a bias of a wrong shape.
        EvidenceError: for evidence that is not known, or that the network cannot give.
    """
    if not state.half <= stop <= 2 * network.depth:
        raise ValueError(f"stop: expected {state.half} to {2 * network.depth} half-blocks, got {stop}")
    check_needs(needs, network)
    factor, bias = _with_prefix(state, key_weights, 1.0, "key_weights"), _with_prefix(state, key_bias, 0.0, "key_bias")
    batch, length, _ = state.x.shape
    rows = Rows(((batch, length),), patches=lambda: _patches(state))
    x, found = run_halves(
        network.model,
        network.family,
        state.x.flatten(0, 1),
        rows,
        range(state.half, stop),
        from_attention(needs),
        None if bias is None else bias.flatten(),
        Execution(AttendMasked(factor, see_themselves)),
    )
    evidence = {name: values.unflatten(0, (batch, length))[:, state.num_prefix :] for name, values in found.items()}
    evidence |= image_evidence(needs, state.images, network.grid_size)
    return replace(state, x=x.view_as(state.x), half=stop), evidence


def classify_masked(network: Network, state: MaskedState, weights: Tensor | None = None) -> Tensor:
    """Logits `[B, classes]` from the tokens that leave the last block.

    Args:
        network: the network.
        state: the tokens after its last block.
        weights: `[B, N]` of the patch tokens in the mean of average-pooling models, or in attention pooling; None: 1.
    """
    model = network.model
    if not network.reads_patches:
        return model.forward_head(model.norm(state.prefix))
    normed = model.norm(state.x)
    patches = normed[:, state.num_prefix :]
    share = torch.ones_like(patches[..., :1]) if weights is None else weights[..., None]
    if model.global_pool == "map":
        return model.head(
            model.head_drop(model.fc_norm(_attention_pooled(model.attn_pool, patches, share.squeeze(-1))))
        )
    mean = (patches * share).sum(1, keepdim=True) / share.sum(1, keepdim=True)
    return model.forward_head(torch.cat([normed[:, : state.num_prefix], mean], dim=1))


def _attention_pooled(pool: Any, x: Tensor, weights: Tensor) -> Tensor:
    """What timm's `AttentionPoolLatent` reads of tokens `[B, N, D]` with weights `[B, N]`, `[B, D]`."""
    q, k, v = (
        part.unflatten(-1, (pool.num_heads, pool.head_dim)).transpose(1, 2)
        for part in (pool.q(pool.latent.expand(len(x), -1, -1)), *pool.kv(x).chunk(2, dim=-1))
    )
    y = soft_attend(pool.q_norm(q), pool.k_norm(k), v, weights, pool.scale)
    y = pool.proj(y.transpose(1, 2).flatten(2))
    return (y + pool.mlp(pool.norm(y)))[:, 0]


@dataclass(frozen=True)
class AttendMasked:
    """Every row attends to all rows of its image, each weighted by a factor."""

    factor: Tensor | None = None  # [B, n], on the softmax numerators of each key; None: 1
    see_themselves: bool = False  # whether every row sees itself with a factor of 1

    def __call__(
        self, parts: Projections, rows: Rows, key_bias: Tensor | None, block: Any, needs: Collection[str]
    ) -> tuple[Tensor, Found]:
        """Mixed values `[rows, width]` and evidence, of equally long images."""
        if self.factor is None and key_bias is None and not needs:
            return AttendPacked()(parts, rows, None, block, needs)  # fused
        (q,), (k,), (v,) = (rows.split(part) for part in parts)
        seen = q.new_ones(q.shape[0], q.shape[2]) if self.factor is None else self.factor
        scale = block.attn.scale
        if key_bias is None and not needs:
            mixed, evidence = soft_attend(q, k, v, seen, scale, self.see_themselves), {}
        else:
            pairs = per_pair(seen) if self.see_themselves else seen
            weights = soft_weights(q, k, pairs, scale, None if key_bias is None else key_bias.view_as(seen))
            shown = MaskedAttention(weights, q, k, v, seen)
            mixed = weights @ v
            evidence = {name: EVIDENCE[name].masked(shown).flatten(0, 1) for name in needs}
        return mixed.transpose(1, 2).reshape(len(parts.q), -1), evidence


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
    # A removed key may exceed the largest remaining one by any amount: clamp, or inf * 0 would become NaN.
    weights = (logits - top).clamp(max=30.0).exp() * factor
    return weights / weights.sum(dim=-1, keepdim=True)


def soft_attend(
    q: Tensor, k: Tensor, v: Tensor, key_factor: Tensor, scale: float, see_themselves: bool = False
) -> Tensor:
    """What `soft_weights(q, k, key_factor, scale) @ v` is, in half the time: the factors multiply the values.

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


def _with_prefix(state: MaskedState, values: Tensor | None, fill: float, name: str) -> Tensor | None:
    """One value per row `[B, P + N]` from one per patch token."""
    if values is None:
        return None
    if values.shape != state.tokens.shape[:2]:
        raise ValueError(f"{name}: expected [B, N] = {list(state.tokens.shape[:2])}, got {list(values.shape)}")
    return torch.cat([values.new_full((len(values), state.num_prefix), fill), values], dim=1)


def _patches(state: MaskedState) -> Tensor:
    """`[B * (P + N)]` int64, the patch number of each row; -1 for prefix rows."""
    batch, length, _ = state.x.shape
    number = torch.arange(length, device=state.x.device) - state.num_prefix
    return number.clamp(min=-1).repeat(batch)
