"""Brightness: keep the brightest patches, the control that looks at pixels alone."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from ..policy import BasePolicy, check_keep_rate, keep_top
from ..types import Decision, Observation


@dataclass
class Brightness(BasePolicy):
    """Keep the `ceil(keep_rate * n)` of n tokens with the brightest patches.

    The brightness of a patch is the mean of its pixels after normalisation, over its area and all channels; of a merged
    token it is the mean over its patches. Where bright patches matter, as ink on a dark canvas does, this rival takes
    no matrix product at all.

    Args:
        keep_rate: fraction kept at every site, above 0 and at most 1.
    """

    keep_rate: float
    needs = frozenset({"brightness"})

    def __post_init__(self) -> None:
        check_keep_rate(self.keep_rate)

    def decide(self, obs: Observation) -> Decision:
        """Rank by brightness."""
        keep = keep_top(obs, obs.evidence["brightness"], (obs.num_alive.double() * self.keep_rate).ceil())
        return Decision(keep=keep, count=None if obs.count is None else ceil(obs.count * self.keep_rate))
