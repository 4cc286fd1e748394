"""LTMP's training form: the decisions of the inference form on masked tokens, differentiable in the thresholds.

In the authors' code the training form differs from the inference form: removed tokens keep their place among senders
and receivers and still count in the importance, so that the same thresholds give other decisions. Here both agree: only
the remaining tokens are matched, in their current order, and only they count in the importance. `LTMP` with the same
thresholds gives the same decisions and logits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...engine.backbone import Backbone
from ...engine.cost import CostModel
from ...engine.masked import MaskedState, classify_masked
from ...engine.walk import Arrival, Masked, Walk
from ...game.bipartite_matching import match_bipartite, merge_senders
from ...types import Site

EVIDENCE = {"merge": "keys", "prune": "mean_attention"}  # what the thresholds of each kind are compared with


@dataclass(frozen=True)
class TrainingPass:
    """Result of a training pass."""

    logits: Tensor  # [B, C]
    keep: Tensor  # [T, B, N] 0 or 1, tokens alive after each site
    macs: Tensor  # [B] float64, evidence and matching included


def run_training_pass(
    backbone: Backbone,
    sites: Sequence[Site],
    state: MaskedState,
    thresholds: Mapping[str, Tensor],
    temperature: Mapping[str, float],
) -> TrainingPass:
    """Run a network with thresholds to the end.

    Args:
        backbone: the network.
        sites: where the thresholds act.
        state: all tokens of B images, before the attention of the first site.
        thresholds: `"merge"` and `"prune"`, either or both, `[T]` each.
        temperature: of the sigmoid that replaces each comparison in the backward pass, under the same names.

    Returns:
        Logits, masks and MACs, all differentiable in the thresholds.
    """
    needs = frozenset(EVIDENCE[name] for name in thresholds)
    walk = Walk(Masked(backbone, log_size=True), sites, needs)
    cost, keep = CostModel.of(backbone), []
    ones = torch.ones(state.tokens.shape[:2], device=state.x.device)
    ranks = torch.arange(ones.shape[1], device=ones.device).expand(ones.shape)
    own = torch.zeros(len(ones), dtype=torch.float64, device=ones.device)  # MACs of evidence and matching
    rows = ones.sum(dim=1).double() + state.num_prefix  # that the next attention runs on

    def decide(arrival: Arrival[MaskedState]) -> MaskedState:
        nonlocal own, rows
        before = arrival.state
        if arrival.is_fresh:
            own = own + cost.evidence(arrival.site, rows, needs)
        after = before
        into = torch.arange(ones.shape[1], device=ones.device).expand(ones.shape)
        alive = _mask(before).detach() > 0
        if "merge" in thresholds:
            obs = walk.medium.observe(arrival, len(sites))
            matching = match_bipartite(obs)
            score = matching.score.masked_fill(~matching.sends, -1)
            joins = _step(score - thresholds["merge"][arrival.step], temperature["merge"]) * matching.sends
            into, _, order = merge_senders(obs, matching, joins.detach() > 0)
            after, into = _merged(before, joins, matching.partner, order), into.clamp(min=0)
            own = own + _matching_macs(_mask(before), obs.evidence["keys"].shape[1])
        if "prune" in thresholds:
            importance = arrival.evidence["mean_attention"] * alive
            importance = importance.scatter_reduce(1, into, importance, "amax")
            stays = _step(importance - thresholds["prune"][arrival.step], temperature["prune"])
            after = replace(after, weights=_mask(after) * stays)
        if backbone.needs_patches:
            after = _rescued(before, after, alive)
        keep.append(_mask(after))
        rows = keep[-1].sum(dim=1).double() + state.num_prefix
        return _ranked(after)

    last = walk.through(replace(state, weights=ones, size=ones, order=ranks), decide)
    masks = torch.stack(keep)
    macs = cost.forward(masks.sum(dim=2).T, sites) + own
    return TrainingPass(classify_masked(backbone, last, last.weights), masks, macs)


def _mask(state: MaskedState) -> Tensor:
    """`[B, N]`, 1 for remaining tokens, 0 for removed ones."""
    assert state.weights is not None
    return state.weights


def _sizes(state: MaskedState) -> Tensor:
    """`[B, N]`, patches that each token stands for; undefined for removed tokens."""
    assert state.size is not None
    return state.size


def _step(margin: Tensor, temperature: float) -> Tensor:
    """1 where the margin is above 0, else 0, with the gradient of a sigmoid (the paper's threshold masking module)."""
    soft = (margin / temperature).sigmoid()
    return (margin > 0).to(soft) + (soft - soft.detach())


def _merged(state: MaskedState, joins: Tensor, partner: Tensor, order: Tensor) -> MaskedState:
    """Receivers become the means of their groups, weighted by size; the senders that join them are removed."""
    size, x = _sizes(state), state.tokens
    share = joins * size
    total = size.scatter_add(1, partner, share)
    index = partner[..., None].expand(x.shape)
    x = (x * size[..., None]).scatter_add(1, index, x * share[..., None]) / total[..., None]
    return replace(state.with_tokens(x), weights=_mask(state) * (1 - joins), size=total, order=order)


def _rescued(before: MaskedState, after: MaskedState, alive: Tensor) -> MaskedState:
    """In an image that has lost its last token the one with the largest norm stays unchanged, as in the game."""
    empty = ~(_mask(after).detach() > 0).any(dim=1)
    norms = before.tokens.detach().norm(dim=2).masked_fill(~alive, -1)
    stays = torch.zeros_like(alive).scatter(1, norms.argmax(dim=1, keepdim=True), True) & empty[:, None]
    after = after.with_tokens(torch.where(stays[..., None], before.tokens, after.tokens))
    mask, size = torch.where(stays, 1.0, _mask(after)), torch.where(stays, _sizes(before), _sizes(after))
    return replace(after, weights=mask, size=size)


def _ranked(state: MaskedState) -> MaskedState:
    """The remaining tokens numbered in their order, -1 for removed ones."""
    assert state.order is not None
    gone = _mask(state).detach() == 0
    ranks = state.order.masked_fill(gone, state.order.max() + 1).argsort(dim=1).argsort(dim=1)
    return replace(state, order=ranks.masked_fill(gone, -1))


def _matching_macs(mask: Tensor, width: int) -> Tensor:
    """MACs of the matching `[B]`: senders times receivers times the width of a key, differentiable in the mask."""
    alive = mask.sum(dim=1).double()
    return (alive * alive - alive.detach() % 2) / 4 * width
