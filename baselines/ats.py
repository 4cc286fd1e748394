"""ATS, adaptive token sampling (Fayyaz et al., 2022): tokens are sampled from the distribution of their scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..policy import BasePolicy
from ..types import Decision, Observation, Site, every_block
from .argument_checks import per_site, whole_numbers

HEIGHTS = 1024  # placed at once; large budgets need many, which would take much memory


@dataclass
class ATS(BasePolicy):
    """Sample tokens by inverse transform of the cumulated scores; the fewer tokens have large scores, the fewer stay.

    The score of a token is its class attention times the norm of its value vector over all heads (Eq. 2). Scores are
    sorted from the smallest, cumulated, and scaled to 0..1; heights spread evenly from the smallest positive value to
    1 each take the token whose cumulated score is nearest (section 3.3), and several may take the same one.

    The published code prunes the rows of the attention matrix. This equals a drop between attention and MLP, because
    keys and values of the block are complete. It pads images to the longest of the batch, and a padded image loses the
    scaling of its scores; here the result of an image does not depend on its batch, and equals that of the published
    code for a batch of one image. The published code fails if there are fewer heights than tokens; here any number of
    heights is placed on the cumulated scores.

    Args:
        samples: heights, one number or one per site, at least 1: the most tokens that can stay. None: as many as the
            network has patches, as published. A single height is 1 and takes the token with the largest score.
    """

    samples: int | Sequence[int] | None = None
    needs = frozenset({"cls_attention", "value_norms"})

    def __post_init__(self) -> None:
        self.samples = None if self.samples is None else whole_numbers("samples", self.samples, least=1)

    def default_sites(self, depth: int) -> Sequence[int | str | Site] | None:
        """Inside every block, between attention and MLP."""
        return every_block(depth)

    def published_sites(self, depth: int) -> Sequence[int | str | Site] | None:
        """Every block from the fourth of 12 on, between attention and MLP."""
        return every_block(depth)[min(depth - 1, round(depth / 4)) :]

    def decide(self, obs: Observation) -> Decision:
        """Keep every token that at least one height takes."""
        samples = per_site("samples", self.samples, obs)
        scores = obs.scatter(obs.evidence["cls_attention"] * obs.evidence["value_norms"])
        return Decision(keep=sample_tokens(scores, obs.alive, obs.num_agents if samples is None else samples))


def sample_tokens(scores: Tensor, alive: Tensor, samples: int) -> Tensor:
    """Tokens that evenly spaced heights take from the cumulated scores.

    Args:
        scores: `[B, N]`, not negative.
        alive: `[B, N]` bool, tokens that can be taken.
        samples: number of heights.

    Returns:
        `[B, N]` bool.
    """
    ascending, token = scores.masked_fill(~alive, -1).sort(dim=1)  # the dead come first
    cumulated = ascending.clamp(min=0).cumsum(dim=1)
    dead = (~alive).sum(dim=1, keepdim=True).clamp(max=scores.shape[1] - 1)
    lowest, total = cumulated.gather(1, dead), cumulated[:, -1:]
    cdf = (cumulated - lowest) / (total - lowest)
    # The largest score ends at 1 by definition, also where it is the only one and there is nothing to divide by.
    cdf = torch.cat([cdf[:, :-1].nan_to_num(0), torch.ones_like(total)], dim=1)
    start = cdf.masked_fill(cdf <= 0, 1).amin(dim=1, keepdim=True)
    taken = torch.zeros_like(alive)
    for part in torch.linspace(1, 0, samples, device=scores.device).split(HEIGHTS):
        heights = start + part * (1 - start)
        above = torch.searchsorted(cdf, heights).clamp(max=scores.shape[1] - 1)
        below = (above - 1).clamp(min=0)
        nearest = torch.where(heights - cdf.gather(1, below) <= cdf.gather(1, above) - heights, below, above)
        taken = taken.scatter(1, token.gather(1, nearest), True)
    return taken & alive
