"""EViT (Liang et al., 2022): keep what the class token attends to, fuse the rest into one token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from ..policy import BasePolicy, check_keep_rate, keep_top
from ..types import Decision, Observation, Site
from .argument_checks import check_flag
from .topk import attention_sites


@dataclass
class EViT(BasePolicy):
    """Keep the `ceil(keep_rate * n)` of n tokens with the largest class attention (mean over heads).

    With `fuse`, the others become one extra token: the sum of their features weighted with their raw, unnormalised
    attention, as the authors' code has it (the paper's section 3.2 leaves the normalisation open). It takes the place
    of one dropped token and competes like any other at the next site.

    Args:
        keep_rate: fraction kept at every site, above 0 and at most 1.
        fuse: whether to fuse the dropped tokens.
    """

    keep_rate: float
    fuse: bool = True
    needs = frozenset({"cls_attention"})

    def __post_init__(self) -> None:
        check_keep_rate(self.keep_rate)
        check_flag("fuse", self.fuse)

    def default_sites(self, depth: int) -> Sequence[int | str | Site] | None:
        """Blocks 4, 7 and 10 of 12, between attention and MLP."""
        return attention_sites(depth)

    def decide(self, obs: Observation) -> Decision:
        """Rank by class attention."""
        scores = obs.evidence["cls_attention"]
        keep = keep_top(obs, scores, (obs.num_alive.double() * self.keep_rate).ceil())
        count = None if obs.count is None else ceil(obs.count * self.keep_rate)
        return self._fused(obs, scores, keep, count) if self.fuse else Decision(keep=keep, count=count)

    def _fused(self, obs: Observation, scores: Tensor, keep: Tensor, count: int | None) -> Decision:
        """Send every dropped token of an image into the slot of its first one."""
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
