"""A policy that merges at every site what a learnt score says can be merged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...game.bipartite_matching import merge_senders
from ...policy import BasePolicy, check_precision, register_policy
from ...types import Decision, Observation, Site
from ..policies import checked_threshold, full_precision
from .pairs import FEATURES, Pairs


class PairActor(nn.Module):
    """A linear score for every site: how much speaks for staying, from what is seen of a pair.

    The parameters are in logits per standard deviation of a feature, so that equal steps matter about equally.

    Args:
        num_sites: T.
        embed_dim: D.
        num_features: F, all of `pairs.FEATURES`, or all but the last.

    Raises:
        ValueError: for another number of features.

    Attributes:
        look: `[T, D + 1]`, weights and bias with which importance is read off a token; fitted, not learnt by playing.
        mean: `[T, F]`, of the features.
        deviation: `[T, F]`, standard deviation of the features.
        weight: `[T, F]`, parameter.
        bias: `[T]`, parameter.
    """

    num_actions = 2
    look: Tensor
    mean: Tensor
    deviation: Tensor

    def __init__(self, num_sites: int, embed_dim: int, num_features: int = len(FEATURES)) -> None:
        super().__init__()
        if num_features not in (len(FEATURES) - 1, len(FEATURES)):
            raise ValueError(f"num_features: expected {len(FEATURES) - 1} or {len(FEATURES)}, got {num_features!r}")
        self.embed_dim = embed_dim
        self.register_buffer("look", torch.zeros(num_sites, embed_dim + 1))
        self.register_buffer("mean", torch.zeros(num_sites, num_features))
        self.register_buffer("deviation", torch.ones(num_sites, num_features))
        self.weight = nn.Parameter(torch.zeros(num_sites, num_features))
        self.bias = nn.Parameter(torch.zeros(num_sites))

    @property
    def num_sites(self) -> int:
        """T."""
        return self.weight.shape[0]

    @property
    def num_features(self) -> int:
        """F."""
        return self.weight.shape[1]

    @property
    def sees_class_attention(self) -> bool:
        """Whether the last feature is among those that it sees."""
        return self.num_features == len(FEATURES)

    @property
    def macs_per_token(self) -> int:
        """What the score of one token costs, in MACs; the similarities come on top."""
        return self.embed_dim + self.num_features

    def pairs(self, obs: Observation) -> Pairs:
        """What is to be seen at the site of an observation.

        Raises:
            ValueError: for a game with another number of sites.
        """
        if obs.num_steps != self.num_sites:
            raise ValueError(f"sites: expected {self.num_sites}, those of the policy, got {obs.num_steps}")
        return Pairs.of(obs, self.look[obs.step], self.sees_class_attention)

    def extra_repr(self) -> str:
        """Its sizes."""
        return f"num_sites={self.num_sites}, embed_dim={self.embed_dim}, num_features={self.num_features}"

    def forward(self, features: Tensor, step: int, noise: Tensor | None = None) -> Tensor:
        """Log-odds of staying, `[P]`.

        Args:
            features: `[P, F]`.
            step: which site this is, 0 to T - 1.
            noise: `[P, F + 1]`, added to the weights and the bias for each row; None: nothing.
        """
        seen = (features - self.mean[step]) / self.deviation[step]
        logits = seen @ self.weight[step] + self.bias[step]
        return logits if noise is None else logits + (seen * noise[:, :-1]).sum(dim=1) + noise[:, -1]


@register_policy("merge_policy")
class MergePolicy(BasePolicy, nn.Module):
    """Merges every second token into the most similar of the others, where its score lies below a threshold.

    Pairs are those of ToMe (Bolya et al., 2023): tokens alternate between senders and receivers, and merged tokens
    become means weighted by size, which count by their size in later attention. How many merge, and which, is decided
    pair by pair, so that images keep different numbers of tokens.

    Args:
        actor: gives the score.
        threshold: in logits; a higher one merges more.
        sites: where it acts.
        info: notes on its origin; JSON values.
    """

    def __init__(
        self,
        actor: PairActor,
        threshold: float = 0.0,
        sites: Sequence[int | str | Site] | None = None,
        info: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.actor = actor
        self.threshold = checked_threshold(threshold)
        self.sites = None if sites is None else tuple(Site.parse(site) for site in sites)
        self.info = dict(info or {})
        self.needs = frozenset({"keys", "cls_attention"} if actor.sees_class_attention else {"keys"})
        self.attention_bias: Literal["log_size"] | None = "log_size"

    def default_sites(self, depth: int) -> Sequence[int | str | Site] | None:
        """Where it was fitted to act."""
        return self.sites

    @torch.no_grad()
    def decide(self, obs: Observation) -> Decision:
        """Merge the senders whose score is not above the threshold."""
        with full_precision(obs.tokens.device.type):
            check_precision(self.actor, obs.tokens)
            pairs = self.actor.pairs(obs)
            stays = self.actor(pairs.features, obs.step) > self.threshold
        return merged(obs, pairs, stays, self.actor)

    def with_threshold(self, threshold: float) -> MergePolicy:
        """The same policy, sharing its weights, with another threshold."""
        return MergePolicy(self.actor, threshold, self.sites, self.info)

    def starting_actor(self) -> PairActor:
        """A copy of the actor with the threshold in its biases: what training goes on from."""
        actor = deepcopy(self.actor)
        with torch.no_grad():
            actor.bias -= self.threshold
        return actor

    @property
    def width(self) -> int:
        """Embedding width of the networks that it can prune."""
        return self.actor.embed_dim

    def config(self) -> dict[str, Any]:
        """All that `from_config` needs beside the actor's weights, as JSON values."""
        return {
            "num_sites": self.actor.num_sites,
            "embed_dim": self.actor.embed_dim,
            "num_features": self.actor.num_features,
            "threshold": self.threshold,
            "sites": None if self.sites is None else [site.label for site in self.sites],
            "info": self.info,
        }

    @classmethod
    def from_config(cls, num_sites: int, embed_dim: int, num_features: int, **settings: Any) -> MergePolicy:
        """The policy that gave this `config()`, without its weights."""
        return cls(PairActor(num_sites, embed_dim, num_features), **settings)

    def extra_repr(self) -> str:
        """Threshold and sites."""
        sites = None if self.sites is None else [site.label for site in self.sites]
        return f"threshold={self.threshold:.4g}, sites={sites}"


def merged(obs: Observation, pairs: Pairs, stays: Tensor, actor: PairActor) -> Decision:
    """The decision in which the senders merge that do not stay, with the MACs of similarities and scores.

    Args:
        obs: what was seen.
        pairs: the senders.
        stays: `[P]` bool.
        actor: gave the scores.
    """
    merges = torch.zeros_like(obs.alive)
    merges[pairs.image, pairs.token] = ~stays
    merge_into, weight, order = merge_senders(obs, pairs.matching, merges)
    macs = pairs.matching.macs + pairs.matching.sends.sum(dim=1).double() * actor.macs_per_token
    return Decision(obs.alive & ~merges, merge_into, weight, order, macs)
