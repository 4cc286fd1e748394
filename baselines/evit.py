"""EViT (Liang et al., 2022): keep the tokens with the largest class attention, fuse the others into one token.

`TriLevel` (Kong et al., 2022) is the same without the fused token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil

import torch
from torch import Tensor

from ..policy import check_keep_rate, keep_top
from ..types import Decision, Observation, Site, quarter_sites
from .argument_checks import check_flag
from .ways_out import Leave, Selection, check_leave


@dataclass
class EViT(Selection):
    """Keep the `ceil(keep_rate * n)` of n tokens with the largest class attention (mean over heads).

    With `fuse`, the others become one extra token: the sum of their features weighted with their raw, unnormalised
    attention, as the authors' code has it (the paper's section 3.2 leaves the normalisation open). It takes the place
    of the dropped token with the lowest patch number, and is ranked like any other token at the next site.

    Args:
        keep_rate: fraction kept at every site, above 0 and at most 1.
        fuse: whether to fuse the dropped tokens by their attention, if they have no other way out.
        leave: another way out: "merge" (into the kept token most like it) or "fuse" (all into the mean of their
            patches); "drop": as `fuse` says.
    """

    keep_rate: float
    fuse: bool = True
    leave: Leave = "drop"
    sees = frozenset({"cls_attention"})

    def __post_init__(self) -> None:
        check_keep_rate(self.keep_rate)
        check_flag("fuse", self.fuse)
        check_leave(self.leave)

    def published_sites(self, depth: int) -> Sequence[int | str | Site] | None:
        """Blocks 4, 7 and 10 of 12, between attention and MLP."""
        return quarter_sites(depth, later=1, inside=True)

    def decide(self, obs: Observation) -> Decision:
        """Rank by class attention."""
        scores = obs.evidence["cls_attention"]
        keep = keep_top(obs, scores, (obs.num_alive.double() * self.keep_rate).ceil())
        count = None if obs.count is None else ceil(obs.count * self.keep_rate)
        by_attention = self.fuse and self.leave == "drop"
        return self._fused(obs, scores, keep, count) if by_attention else self.decided(obs, keep, count)

    def _fused(self, obs: Observation, scores: Tensor, keep: Tensor, count: int | None) -> Decision:
        """Merge all dropped tokens of an image into the one with the lowest patch number."""
        dropped = obs.alive & ~keep
        itself = torch.arange(obs.num_agents, device=keep.device).expand(keep.shape)
        slot = dropped.int().argmax(dim=1, keepdim=True)
        attention = obs.scatter(scores)
        return Decision(
            keep=keep | (dropped & (itself == slot)),
            merge_into=torch.where(dropped, slot, itself).masked_fill(~obs.alive, -1),
            weight=torch.where(dropped, attention, torch.ones_like(attention)),
            count=None if count is None or obs.count is None else min(count + 1, obs.count),
        )


@dataclass
class TriLevel(EViT):
    """Keep the `ceil(keep_rate * n)` of n tokens with the largest class attention: EViT without its fused token.

    The token level of Tri-Level (Kong et al., 2022, "Peeling the Onion: Hierarchical Reduction of Data Redundancy for
    Efficient Vision Transformer Training"). The paper has two more levels, which are left out here. Its attention level
    masks all but a fraction of each query's keys, which saves nothing where attention is computed densely (in the
    public code most masks of the second and third site are all ones). Its example level selects training images. The
    paper trains networks from scratch with all three levels; here the network is used as it comes.

    Args:
        keep_rate: fraction kept at every site, above 0 and at most 1.
        leave: way out of the others: "drop", "merge" (into the kept token most like it) or "fuse" (all into one).
    """

    fuse: bool = field(default=False, init=False, repr=False)
