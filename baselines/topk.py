"""TopK: the tokens that the class token attends to most, a fixed number of the original ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..policy import BasePolicy, check_keep_rate, keep_top
from ..types import Decision, Observation, Site


def attention_sites(depth: int) -> Sequence[str]:
    """Inside the block that follows each quarter of the network: 4, 7 and 10 of 12 blocks."""
    blocks = sorted({min(depth, round(depth * part / 4) + 1) for part in (1, 2, 3)})
    return [f"{block}.attn" for block in blocks]


@dataclass
class TopK(BasePolicy):
    """Keep the `int(keep_rate ** s * N)` best tokens at site s by class attention (mean over heads).

    Counts refer to the original number N of tokens (the top-k baseline of the token-reduction survey of Haurum et
    al., 2023), where EViT's refer to the current one.

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
        count = int(self.keep_rate ** (obs.step + 1) * obs.num_agents)
        counts = torch.full_like(obs.num_alive, count)
        keep = keep_top(obs, obs.evidence["cls_attention"], counts)
        return Decision(keep=keep, count=None if obs.count is None else min(count, obs.count))
