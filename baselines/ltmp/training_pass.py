"""LTMP's training form: the same decisions as its inference form, but nobody leaves and thresholds have gradients.

The authors' code trains on another model than it runs: there, removed tokens keep their place in the even/odd split
and their vote in the importance, so that with the same thresholds counts and logits drift apart. Here the split is
over the tokens that are left, in their current order, and who is removed has no vote; `LTMP` with the same thresholds
then gives the same decisions and logits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...engine.backbone import Backbone
from ...engine.cost import CostModel
from ...engine.masked import MaskedState, classify_masked, run_masked
from ...types import Observation, Site
from ..bipartite_matching import match, merge


@dataclass(frozen=True)
class SoftPass:
    """How a batch left the network."""

    logits: Tensor  # [B, C]
    keep: Tensor  # [T, B, N] 0 or 1, tokens alive after each site
    macs: Tensor  # [B] float64, evidence and matching included


@dataclass(frozen=True)
class _Tokens:
    """All tokens of a batch, and what became of them."""

    state: MaskedState
    mask: Tensor  # [B, N], 1 for who is there and 0 for who is not
    size: Tensor  # [B, N], patches that each token stands for; of no meaning for those who left
    order: Tensor  # [B, N] int64, rank in the current sequence; -1 for those who left


@dataclass(frozen=True)
class ThresholdWalk:
    """Walks a backbone with thresholds at some sites.

    Args:
        backbone: the network.
        sites: where the thresholds act.
        temperature: of the sigmoid that stands in for each comparison in the backward pass, by name of the thresholds:
            `"merge"` and `"prune"`.
    """

    backbone: Backbone
    sites: Sequence[Site]
    temperature: Mapping[str, float]

    def __call__(self, state: MaskedState, thresholds: Mapping[str, Tensor]) -> SoftPass:
        """Run to the end.

        Args:
            state: all tokens of B images, before the attention of the first site.
            thresholds: `"merge"` and `"prune"`, either or both, `[T]` each.

        Returns:
            Logits, masks and MACs, all differentiable in the thresholds.
        """
        ones = torch.ones(state.tokens.shape[:2], device=state.x.device)
        ranks = torch.arange(ones.shape[1], device=ones.device).expand(ones.shape)
        tokens, evidence = _Tokens(state, ones, ones, ranks), {}
        names = {"merge": "keys", "prune": "mean_attention"}
        needs = frozenset(names[name] for name in thresholds)
        cost, keep = CostModel.of(self.backbone), []
        own = torch.zeros(len(ones), dtype=torch.float64, device=ones.device)
        for step, site in enumerate(self.sites):
            rows = tokens.mask.sum(dim=1).double() + state.num_prefix
            tokens, found = self._run(tokens, site.half, needs)
            if found:  # two sites in one block share its attention
                evidence, own = found, own + cost.evidence(site, rows, needs)
            limits = {name: values[step] for name, values in thresholds.items()}
            tokens, macs = self._decide(tokens, evidence, limits, site, step)
            own = own + macs
            keep.append(tokens.mask)
        tokens, _ = self._run(tokens, 2 * self.backbone.depth, frozenset())
        masks = torch.stack(keep)
        macs = cost.forward(masks.sum(dim=2).T, self.sites) + own
        return SoftPass(classify_masked(self.backbone, tokens.state, tokens.mask), masks, macs)

    def _run(self, tokens: _Tokens, stop: int, needs: frozenset[str]) -> tuple[_Tokens, dict[str, Tensor]]:
        state, found = run_masked(self.backbone, tokens.state, stop, tokens.mask, tokens.size.log(), needs)
        return replace(tokens, state=state), found

    def _decide(
        self, before: _Tokens, evidence: Mapping[str, Tensor], limits: Mapping[str, Tensor], site: Site, step: int
    ) -> tuple[_Tokens, Tensor]:
        """Merge, then prune; the tokens afterwards, and what the matching cost `[B]`."""
        alive = before.mask.detach() > 0
        obs, tokens = self._observe(before, evidence, alive, site, step), before
        into = torch.arange(obs.num_agents, device=alive.device).expand(alive.shape)
        macs = torch.zeros(len(alive), dtype=torch.float64, device=alive.device)
        if "merge" in limits:
            matching = match(obs)
            score = matching.score.masked_fill(~matching.sends, -1)
            joins = _step(score - limits["merge"], self.temperature["merge"]) * matching.sends
            into, _, order = merge(obs, matching, joins.detach() > 0)
            tokens = _merged(tokens, joins, matching.partner, order)
            into, macs = into.clamp(min=0), _matching_macs(before.mask, obs.evidence["keys"].shape[1])
        if "prune" in limits:
            importance = evidence["mean_attention"] * alive
            importance = importance.scatter_reduce(1, into, importance, "amax")
            tokens = replace(tokens, mask=tokens.mask * _step(importance - limits["prune"], self.temperature["prune"]))
        if self.backbone.needs_patches:
            tokens = _rescued(before, tokens, alive)
        ranks = (
            tokens.order.masked_fill(tokens.mask.detach() == 0, tokens.order.max() + 1).argsort(dim=1).argsort(dim=1)
        )
        return replace(tokens, order=ranks.masked_fill(tokens.mask.detach() == 0, -1)), macs

    def _observe(
        self, tokens: _Tokens, evidence: Mapping[str, Tensor], alive: Tensor, site: Site, step: int
    ) -> Observation:
        """What the inference form would see."""
        image, token = alive.nonzero(as_tuple=True)
        counts = alive.sum(dim=1)
        return Observation(
            tokens=tokens.state.tokens[image, token],
            image=image,
            token=token,
            offsets=torch.cat([counts.new_zeros(1), counts.cumsum(0)]),
            cls=tokens.state.x[:, 0],
            alive=alive,
            size=tokens.size.detach() * alive,
            order=tokens.order,
            position=self.backbone.position,
            site=site,
            step=step,
            num_steps=len(self.sites),
            depth=self.backbone.depth,
            evidence={name: values[image, token] for name, values in evidence.items()},
            num_prefix=tokens.state.num_prefix,
        )


def _step(margin: Tensor, temperature: float) -> Tensor:
    """1 where the margin is above 0, else 0; backwards a sigmoid (the paper's threshold masking module)."""
    soft = (margin / temperature).sigmoid()
    return (margin > 0).to(soft) + (soft - soft.detach())


def _merged(tokens: _Tokens, joins: Tensor, partner: Tensor, order: Tensor) -> _Tokens:
    """Every receiver becomes the mean, weighted by size, of itself and of who joins it; those leave their place."""
    share = joins * tokens.size
    total = tokens.size.scatter_add(1, partner, share)
    x = tokens.state.tokens
    index = partner[..., None].expand(x.shape)
    x = (x * tokens.size[..., None]).scatter_add(1, index, x * share[..., None]) / total[..., None]
    return _Tokens(tokens.state.with_tokens(x), tokens.mask * (1 - joins), total, order)


def _rescued(before: _Tokens, after: _Tokens, alive: Tensor) -> _Tokens:
    """Where an image has lost its last token, the one of the largest norm stays as it was, as in the game."""
    empty = ~(after.mask.detach() > 0).any(dim=1)
    norms = before.state.tokens.detach().norm(dim=2).masked_fill(~alive, -1)
    stays = torch.zeros_like(alive).scatter(1, norms.argmax(dim=1, keepdim=True), True) & empty[:, None]
    x = torch.where(stays[..., None], before.state.tokens, after.state.tokens)
    mask, size = torch.where(stays, 1.0, after.mask), torch.where(stays, before.size, after.size)
    return replace(after, state=after.state.with_tokens(x), mask=mask, size=size)


def _matching_macs(mask: Tensor, width: int) -> Tensor:
    """Senders times receivers times the width of a key `[B]`: half the tokens times the other half, or nearly so."""
    alive = mask.sum(dim=1).double()
    return (alive * alive - alive.detach() % 2) / 4 * width
