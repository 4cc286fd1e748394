"""Decouple and merge (Long et al., 2023): attentive and inattentive tokens are separated and merged differently.

The part that all mergers of the paper's Table 4 share; `DPCMerge`, `PoolMerge`, `KMeansMerge` and `SubSampleMerge` add
how the inattentive tokens are merged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor

from ...policy import BasePolicy, check_keep_rate, keep_top, mean_weights
from ...types import Decision, Observation, Site, quarter_sites
from ..argument_checks import per_site, whole_numbers
from .pair_matching import merge_pairs
from .token_lists import TokenLists


@dataclass(frozen=True)
class Merged:
    """How the listed inattentive tokens are merged, at most M per image."""

    target: Tensor  # [B, M] int64, place in the list of the token that each token merges into
    importance: Tensor | None = None  # [B, M], weights of the mean before they are normalised; None: class attention
    features: Tensor | None = None  # [B, M, D], replace the tokens' own features before they merge; None: no change
    macs: Tensor | float = 0.0  # [B] float64, MACs of the merger


class Plan(NamedTuple):
    """How many tokens of an image are merged, and into how many."""

    attentive: int
    inattentive: int
    clusters: int  # tokens that the inattentive ones are merged into; 0: they are dropped
    pairs: int  # pairs of attentive tokens that are merged into one token each

    @property
    def clustered(self) -> int:
        """Tokens that are merged into clusters."""
        return self.inattentive if self.clusters else 0

    @property
    def compared(self) -> int:
        """Tokens that are matched in pairs."""
        return self.attentive if self.pairs else 0

    @property
    def remaining(self) -> int:
        """Tokens that stay."""
        return self.attentive + self.clusters - self.pairs


@dataclass(eq=False)  # mergers with weights are modules, which compare by identity
class DecoupleAndMerge(BasePolicy):
    """What the mergers of the paper's Table 4 share; a subclass adds `merge` for the inattentive tokens.

    Of n tokens the `ceil(keep_rate * n)` with the largest class attention (mean over heads, Eq. 5) are attentive. The
    others, the inattentive tokens, are merged into a few tokens. As many pairs of similar attentive tokens (cosine
    similarity) are merged into one token each, at the place of the more attentive one, so that `ceil(keep_rate * n)`
    tokens remain.

    Choices where the paper leaves it open: by default the inattentive tokens are merged into a quarter as many, at
    least one, and at most as many as there can be pairs. There are as many pairs, taken greedily from the most similar
    one on, no token in two of them. Similarity is that of the features after the attention residual. Eq. 8 sums with
    the raw attention s, which would shrink a merged token to a few per cent of its norm; here the weights are s divided
    by their sum over the group.

    Args:
        keep_rate: fraction that is attentive at every site, above 0 and at most 1.
        clusters: tokens that the inattentive ones are merged into, one number or one per site; None: a quarter; at most
            the number of inattentive tokens is used.
        pairs: pairs of attentive tokens to merge, likewise; None: as many as `clusters`; at most half of the attentive
            tokens is used.
    """

    keep_rate: float
    clusters: int | Sequence[int] | None = None
    pairs: int | Sequence[int] | None = None
    needs = frozenset({"cls_attention"})

    def __post_init__(self) -> None:
        check_keep_rate(self.keep_rate)
        self.clusters = None if self.clusters is None else whole_numbers("clusters", self.clusters)
        self.pairs = None if self.pairs is None else whole_numbers("pairs", self.pairs)

    def published_sites(self, depth: int) -> Sequence[int | str | Site] | None:
        """Blocks 4, 7 and 10 of 12, between attention and MLP."""
        return quarter_sites(depth, later=1, inside=True)

    def plan(self, tokens: int, obs: Observation) -> Plan:
        """The numbers for an image with `tokens` tokens at this site."""
        attentive = ceil(self.keep_rate * tokens)
        inattentive = tokens - attentive
        clusters = per_site("clusters", self.clusters, obs)
        if clusters is None:
            clusters = min(max(1, inattentive // 4), attentive // 2)
        clusters = min(clusters, inattentive)
        pairs = per_site("pairs", self.pairs, obs)
        return Plan(attentive, inattentive, clusters, min(clusters if pairs is None else pairs, attentive // 2))

    def merge(self, lists: TokenLists, count: Tensor, obs: Observation) -> Merged:
        """Merge the listed inattentive tokens of each image into `count` `[B]` groups, 0 for an empty list."""
        raise TypeError(f"{type(self).__name__} does not define merge")

    def decide(self, obs: Observation) -> Decision:
        """Separate the tokens by class attention, then merge each part."""
        plan = None if obs.count is None else self.plan(obs.count, obs)
        attentives, _, clusters, pairs = self._plans(obs, plan)
        attention = obs.scatter(obs.evidence["cls_attention"])
        attentive = keep_top(obs, obs.evidence["cls_attention"], attentives)
        itself = torch.arange(obs.num_agents, device=obs.alive.device)
        merge_into, importance = torch.where(attentive, itself, -1), attention
        features = None
        macs = torch.zeros(obs.batch_size, dtype=torch.float64, device=obs.alive.device)

        inattentive = obs.alive & ~attentive & (clusters > 0)[:, None]
        lists = TokenLists.of(obs, inattentive, plan.clustered if plan else None)
        if lists.width:
            merged = self.merge(lists, clusters, obs)
            merge_into = lists.scatter(lists.token.gather(1, merged.target), merge_into)
            if merged.importance is not None:
                importance = lists.scatter(merged.importance.to(importance), importance)
            if merged.features is not None:
                features = lists.rows(merged.features, obs)
            macs = macs + merged.macs
        lists = TokenLists.of(obs, attentive & (pairs > 0)[:, None], plan.compared if plan else None)
        if lists.width:
            most = plan.pairs if plan else int(pairs.max())
            target = merge_pairs(lists, lists.gather(attention), pairs, most)
            merge_into = lists.scatter(lists.token.gather(1, target), merge_into)
            macs = macs + lists.inner_product_macs()
        return Decision(
            keep=obs.alive & (merge_into == itself),
            merge_into=merge_into,
            weight=mean_weights(merge_into, importance),
            macs=macs,
            count=plan.remaining if plan else None,
            features=features,
        )

    def _plans(self, obs: Observation, plan: Plan | None) -> tuple[Tensor, ...]:
        """Each number of the plan for every image, `[B]` int64 each."""
        table = [plan] if plan else [self.plan(tokens, obs) for tokens in range(obs.num_agents + 1)]
        row = torch.zeros_like(obs.num_alive) if plan else obs.num_alive
        return torch.tensor(table, device=row.device)[row].unbind(1)
