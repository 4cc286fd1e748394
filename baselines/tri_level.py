"""Tri-Level (Kong et al., 2022), its token level: drop what the class token does not attend to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from ..policy import BasePolicy, check_keep_rate, keep_top
from ..types import Decision, Observation, Site
from .topk import attention_sites


@dataclass
class TriLevel(BasePolicy):
    """Keep the `ceil(keep_rate * n)` of n tokens with the largest class attention: EViT without its fused token.

    Of the three levels of "Peeling the Onion: Hierarchical Reduction of Data Redundancy for Efficient Vision
    Transformer Training" this is the one that a policy can play. The attention level, masks that leave each query a
    fraction of its keys, saves nothing where attention is computed densely (and turns most masks of the second and
    third site into all ones in the public code), so it is left out. The example level says which images to train on,
    and is no part of a policy. The paper trains from scratch with all three; a network as it comes is outside of its
    design.

    Args:
        keep_rate: fraction kept at every site, above 0 and at most 1.
    """

    keep_rate: float
    needs = frozenset({"cls_attention"})

    def __post_init__(self) -> None:
        check_keep_rate(self.keep_rate)

    def default_sites(self, depth: int) -> Sequence[int | str | Site] | None:
        """Blocks 4, 7 and 10 of 12, between attention and MLP."""
        return attention_sites(depth)

    def decide(self, obs: Observation) -> Decision:
        """Rank by class attention."""
        counts = (obs.num_alive.double() * self.keep_rate).ceil()
        count = None if obs.count is None else ceil(obs.count * self.keep_rate)
        return Decision(keep=keep_top(obs, obs.evidence["cls_attention"], counts), count=count)
