"""What a budget amounts to in MACs, and how the target approaches it during training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...engine.cost import CostModel, bisect
from ...errors import BudgetError
from ...types import Site


@dataclass(frozen=True)
class PolicyCost:
    """MACs of a pass whose tokens are chosen by a policy that looks at every alive token of every site."""

    model: CostModel
    sites: Sequence[Site]
    macs_per_token: int  # of the policy

    def of(self, n_kept: Tensor) -> Tensor:
        """`[B, T]` tokens kept after each site to MACs per image, `[B]` float64."""
        seen = n_kept[:, :-1].double().sum(dim=1) + self.model.num_patches
        return self.model.forward(n_kept, self.sites) + seen * self.macs_per_token

    def at_keep_rate(self, rate: float) -> float:
        """MACs if the fraction `rate` of the tokens that reach a site passes it, as EViT counts."""
        return self._at([rate**step for step in range(1, len(self.sites) + 1)])

    def at_fraction(self, fraction: float) -> float:
        """MACs if the fraction `fraction` of all tokens is left after every site, all pruned at the first."""
        return self._at([fraction] * len(self.sites))

    def fraction_for(self, macs: float) -> float:
        """Inverse of `at_fraction`, within 0 and 1."""
        return sum(bisect(self.at_fraction, macs, 0.0, 1.0, steps=50)) / 2

    @property
    def floor(self) -> float:
        """MACs if every token is pruned at the first site."""
        return self.at_fraction(0.0)

    def _at(self, fractions: Sequence[float]) -> float:
        counts = self.model.num_patches * torch.tensor([fractions], dtype=torch.float64)
        return float(self.of(counts))


def target_macs(
    cost: PolicyCost, *, gmacs: float | None = None, keep: float | None = None, share: float | None = None
) -> float:
    """Read a budget, given in one of three ways, as mean MACs per image, the policy's own included.

    Args:
        cost: of the network, sites and policy in question.
        gmacs: GMACs per image.
        keep: keep rate; the MACs that keeping this fraction of the tokens at every site costs.
        share: share of the dense network's MACs.

    Raises:
        ValueError: unless exactly one is given, or if a rate is outside (0, 1].
        BudgetError: if the budget is below what the network costs without any patch token, or above dense.
    """
    given = {name: value for name, value in (("gmacs", gmacs), ("keep", keep), ("share", share)) if value is not None}
    if len(given) != 1:
        raise ValueError(f"budget: expected exactly one of gmacs, keep, share, got {given or 'none'}")
    if keep is not None and not 0 < keep <= 1:
        raise ValueError(f"target_keep: expected a rate above 0 and at most 1, got {keep!r}")
    dense = cost.model.dense()
    macs = min(cost.at_keep_rate(keep), dense) if keep is not None else (share or 0) * dense or (gmacs or 0) * 1e9
    if not cost.floor < macs <= dense:
        raise BudgetError(
            f"budget: expected above {cost.floor / 1e9:.5g} GMACs (every token pruned at the first site, policy "
            f"included) and at most {dense / 1e9:.5g} (dense), got {macs / 1e9:.5g}"
        )
    return macs


def annealed(update: int, updates: int, target: float, start: float, part: float) -> float:
    """Target of an update (0-based): linearly from `start` to `target` over the first `part` of all updates, then flat.

    A policy collapses if the target is small from the beginning. A `start` below the target is not used.
    """
    progress = min(1.0, update / max(1.0, part * updates))
    return target + max(0.0, start - target) * (1 - progress)
