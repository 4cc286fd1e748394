"""TopK: keep a fixed number of the original tokens, those with the largest class attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..policy import check_keep_rate, keep_top
from ..types import Decision, Observation, Site, quarter_sites
from .ways_out import Leave, Selection, check_leave


@dataclass
class TopK(Selection):
    """Keep the `int(keep_rate ** s * N)` tokens with the largest class attention (mean over heads) at site s.

    The top-k baseline of the token-reduction survey (Haurum et al., 2023). N is the original number of tokens; EViT
    takes its share of the current number.

    Args:
        keep_rate: fraction kept at every site, above 0 and at most 1.
        leave: way out of the others: "drop", "merge" (into the kept token most like it) or "fuse" (all into one).
    """

    keep_rate: float
    leave: Leave = "drop"
    sees = frozenset({"cls_attention"})

    def __post_init__(self) -> None:
        check_keep_rate(self.keep_rate)
        check_leave(self.leave)

    def published_sites(self, depth: int) -> Sequence[int | str | Site] | None:
        """Blocks 4, 7 and 10 of 12, between attention and MLP."""
        return quarter_sites(depth, later=1, inside=True)

    def decide(self, obs: Observation) -> Decision:
        """Rank by class attention."""
        count = int(self.keep_rate ** (obs.step + 1) * obs.num_agents)
        counts = torch.full_like(obs.num_alive, count)
        keep = keep_top(obs, obs.evidence["cls_attention"], counts)
        return self.decided(obs, keep, None if obs.count is None else min(count, obs.count))
