"""The method of Long et al., 2023 ("Beyond Attentive Tokens"): decouple and merge with density peak clustering."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ...types import Observation
from ..argument_checks import whole_number
from .decouple import DecoupleAndMerge, Merged, Plan
from .peak_clustering import density_peaks
from .token_lists import TokenLists

STRATEGIES = ("preserve", "pack", "cluster", "match")


@dataclass
class DPCMerge(DecoupleAndMerge):
    """Cluster the inattentive tokens by density peaks, match the attentive ones in pairs, merge both by attention.

    See `DecoupleAndMerge` for what all mergers of the paper share. Here the inattentive tokens are clustered (Eqs. 6
    and 7), each assigned to the nearest centre. Eq. 6 as printed, `exp(+sum d^2)`, would give outliers a high density,
    and its sum over all tokens overflows; here the density is `exp(-mean d^2 / C)` over the 5 nearest tokens, the token
    itself included.

    Args:
        keep_rate: fraction that is attentive at every site, above 0 and at most 1.
        clusters: tokens that the inattentive ones are merged into, one number or one per site; None: a quarter of them.
        pairs: pairs of attentive tokens to merge, likewise; None: as many as `clusters`.
        strategy: row of the ablation in the paper's Table 3. `"preserve"` keeps the attentive tokens and drops the
            others, `"pack"` merges the others into one token, `"cluster"` clusters them, `"match"` (the full method)
            also merges attentive tokens in pairs. `ceil(keep_rate * n)` tokens are left by `"preserve"` and `"match"`,
            1 more by `"pack"` and `clusters` more by `"cluster"`.
        neighbours: nearest tokens that the density is computed from, at least 1.
    """

    strategy: Literal["preserve", "pack", "cluster", "match"] = "match"
    neighbours: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        self.neighbours = whole_number("neighbours", self.neighbours, least=1)
        if self.strategy not in STRATEGIES:
            raise ValueError(f"strategy: expected one of {', '.join(STRATEGIES)}, got {self.strategy!r}")

    def plan(self, tokens: int, obs: Observation) -> Plan:
        """The numbers for an image with `tokens` tokens at this site."""
        plan = super().plan(tokens, obs)
        if self.strategy == "match":
            return plan
        most = {"preserve": 0, "pack": 1, "cluster": plan.inattentive}[self.strategy]
        least = min(1, plan.inattentive) if self.strategy == "pack" else 0
        return plan._replace(clusters=max(least, min(plan.clusters, most)), pairs=0)

    def merge(self, lists: TokenLists, count: Tensor, obs: Observation) -> Merged:
        """Cluster the inattentive tokens; one cluster needs no distances."""
        if self.strategy == "pack":
            attention = lists.gather(obs.scatter(obs.evidence["cls_attention"])).masked_fill(~lists.valid, -1)
            return Merged(attention.argmax(dim=1, keepdim=True).expand_as(lists.token))
        distances = lists.squared_distances()
        _, centre = density_peaks(distances, count, lists.features.shape[2], self.neighbours)
        return Merged(centre, macs=lists.inner_product_macs())
