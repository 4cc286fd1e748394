"""The frame of decouple and merge (Long et al., 2023): attentive and inattentive tokens, each merged in a way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor

from ...policy import BasePolicy, check_keep_rate, keep_top
from ...types import Decision, Observation, Site
from ..argument_checks import per_site, whole_numbers
from ..topk import attention_sites
from .pairs import match_pairs
from .token_lists import TokenLists, mean_weights


@dataclass(frozen=True)
class Merged:
    """What became of the inattentive tokens, M of them at most, as they are listed."""

    target: Tensor  # [B, M] int64, place in the list of the token that each one merges into
    importance: Tensor | None = None  # [B, M], weights of the mean before they are normalised; None: class attention
    features: Tensor | None = None  # [B, M, D], what the tokens are before they merge; None: as they are
    macs: Tensor | float = 0.0  # [B] float64, what it cost


class Plan(NamedTuple):
    """What is to become of an image's tokens."""

    attentive: int
    inattentive: int
    clusters: int  # tokens that the inattentive ones become; 0: they are dropped
    pairs: int  # pairs of attentive tokens that become one token each

    @property
    def clustered(self) -> int:
        """Tokens that are merged into clusters."""
        return self.inattentive if self.clusters else 0

    @property
    def compared(self) -> int:
        """Tokens among which pairs are looked for."""
        return self.attentive if self.pairs else 0

    @property
    def remaining(self) -> int:
        """Tokens that stay."""
        return self.attentive + self.clusters - self.pairs


@dataclass(eq=False)  # mergers with weights are modules, which are hashed and equal to themselves only
class DecoupleAndMerge(BasePolicy):
    """The frame that the method shares with the other mergers of its Table 4; a subclass says how to `merge`.

    Of n tokens the `ceil(keep_rate * n)` with the largest class attention (mean over heads, Eq. 5) are attentive. The
    others become a few tokens, and as many pairs of attentive tokens that resemble each other (cosine similarity)
    become one token each, in the place of the more attentive one, so that `ceil(keep_rate * n)` tokens remain.

    Where the paper leaves it open: by default the inattentive tokens become a quarter as many, at least one, and not
    more than there can be pairs; pairs are as many, taken greedily, the most similar first, no token in two of them;
    similarity is that of the features after the attention residual. Eq. 8 sums with the raw attention s, which would
    shrink a merged token to a few per cent of its norm; here the weights are s over their sum in the group.

    Args:
        keep_rate: fraction that is attentive at every site, above 0 and at most 1.
        clusters: tokens that the inattentive ones become, one number or one per site; never more than there are.
        pairs: pairs of attentive tokens to merge, likewise; None: as many as `clusters`; never more than there can be.
    """

    keep_rate: float
    clusters: int | Sequence[int] | None = None
    pairs: int | Sequence[int] | None = None
    needs = frozenset({"cls_attention"})

    def __post_init__(self) -> None:
        check_keep_rate(self.keep_rate)
        self.clusters = None if self.clusters is None else whole_numbers("clusters", self.clusters)
        self.pairs = None if self.pairs is None else whole_numbers("pairs", self.pairs)

    def default_sites(self, depth: int) -> Sequence[int | str | Site] | None:
        """Blocks 4, 7 and 10 of 12, between attention and MLP."""
        return attention_sites(depth)

    def plan(self, tokens: int, obs: Observation) -> Plan:
        """What is to become of an image with so many tokens at this site."""
        attentive = ceil(self.keep_rate * tokens)
        inattentive = tokens - attentive
        clusters = per_site("clusters", self.clusters, obs)
        if clusters is None:
            clusters = min(max(1, inattentive // 4), attentive // 2)
        clusters = min(clusters, inattentive)
        pairs = per_site("pairs", self.pairs, obs)
        return Plan(attentive, inattentive, clusters, min(clusters if pairs is None else pairs, attentive // 2))

    def merge(self, lists: TokenLists, count: Tensor, obs: Observation) -> Merged:
        """Merge the listed inattentive tokens of each image into `count` `[B]` groups; an empty list wants none."""
        raise TypeError(f"{type(self).__name__} does not say how to merge")

    def decide(self, obs: Observation) -> Decision:
        """Decouple by class attention, then merge either part in its own way."""
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
            target = match(lists, lists.gather(attention), pairs, most)
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


def match(lists: TokenLists, attention: Tensor, pairs: Tensor, most: int) -> Tensor:
    """Where the listed attentive tokens go: the less attentive one of a pair to its partner.

    Args:
        lists: the tokens.
        attention: `[B, M]`, their class attention.
        pairs: `[B]`, pairs wanted.
        most: the largest of `pairs`.

    Returns:
        `[B, M]` int64, places in the list.
    """
    partner = match_pairs(lists.cosines(), lists.valid, pairs, most)
    itself = torch.arange(lists.width, device=partner.device).expand(partner.shape)
    of_partner = attention.gather(1, partner)
    goes = (of_partner > attention) | ((of_partner == attention) & (partner < itself))
    return torch.where(goes, partner, itself)
