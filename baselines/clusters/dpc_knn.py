"""DPC-KNN over all tokens: the clustering baseline of the token-reduction survey (Haurum et al., 2023)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...policy import BasePolicy, check_keep_rate, mean_weights
from ...types import Decision, Observation
from ..argument_checks import whole_number
from .peak_clustering import density_peaks
from .token_lists import TokenLists


@dataclass
class DPCKNN(BasePolicy):
    """Cluster all alive tokens by density peaks and keep one token per cluster, the plain mean of its members.

    At site s there are `int(keep_rate ** s * N)` clusters, N being the original number of tokens; at least 1 and at
    most the current number of tokens. The density is computed from the 5 nearest tokens, the token itself included. The
    merged token takes the place of the centre. The public code breaks ties of density with random noise of 1e-6; here
    tied tokens have equal density.

    Acts after whole blocks, by default at the backbone's own sites (3, 6, 9 of 12).

    Args:
        keep_rate: fraction kept at every site, above 0 and at most 1.
        neighbours: nearest tokens that the density is computed from, at least 1.
    """

    keep_rate: float
    neighbours: int = 5

    def __post_init__(self) -> None:
        check_keep_rate(self.keep_rate)
        self.neighbours = whole_number("neighbours", self.neighbours, least=1)

    def decide(self, obs: Observation) -> Decision:
        """Cluster all alive tokens."""
        wanted = max(1, int(self.keep_rate ** (obs.step + 1) * obs.num_agents))
        count = None if obs.count is None else min(wanted, obs.count)
        crowded = obs.alive & (obs.num_alive > wanted)[:, None]  # images with no more tokens than that keep them all
        lists = TokenLists.of(obs, crowded, None if obs.count is None else obs.count * (obs.count > wanted))
        if not lists.width:
            return Decision(keep=obs.alive, count=count)
        clusters = lists.length.clamp(max=wanted)
        _, centre = density_peaks(lists.squared_distances(), clusters, obs.tokens.shape[1], self.neighbours)
        itself = torch.arange(obs.num_agents, device=obs.alive.device)
        alone = torch.where(obs.alive, itself, -1)
        merge_into = lists.scatter(lists.token.gather(1, centre), alone)
        return Decision(
            keep=obs.alive & (merge_into == itself),
            merge_into=merge_into,
            weight=mean_weights(merge_into, torch.ones_like(obs.size)),
            macs=lists.inner_product_macs(),
            count=count,
        )
