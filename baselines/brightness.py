"""Brightness: keep the brightest patches, the control that looks at pixels alone."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from ..policy import check_keep_rate, keep_top
from ..types import Decision, Observation
from .ways_out import Leave, Selection, check_leave


@dataclass
class Brightness(Selection):
    """Keep the `ceil(keep_rate * n)` of n tokens with the brightest patches.

    The brightness of a patch is the mean of its pixels after normalisation, over its area and all channels; of a merged
    token it is the mean over its patches. Where bright patches matter, as ink on a dark canvas does, this rival takes
    no matrix product at all.

    Args:
        keep_rate: fraction kept at every site, above 0 and at most 1.
        leave: way out of the others: "drop", "merge" (into the kept token most like it) or "fuse" (all into one).
    """

    keep_rate: float
    leave: Leave = "drop"
    sees = frozenset({"brightness"})

    def __post_init__(self) -> None:
        check_keep_rate(self.keep_rate)
        check_leave(self.leave)

    def decide(self, obs: Observation) -> Decision:
        """Rank by brightness."""
        keep = keep_top(obs, obs.evidence["brightness"], (obs.num_alive.double() * self.keep_rate).ceil())
        return self.decided(obs, keep, None if obs.count is None else ceil(obs.count * self.keep_rate))
