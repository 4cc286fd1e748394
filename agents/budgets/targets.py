"""From a budget to a policy that meets it: the target, its way there, and the threshold at the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...engine.cost import CostModel
from ...engine.tokens import TokenState
from ...errors import BudgetError
from ...game.rollout import play
from ...game.token_game import TokenGame
from ...types import Site
from ..policies import TokenPolicy

MIN_CALIBRATION_STEPS = 20
LOGIT_RANGE = 40.0  # thresholds beyond it keep or prune everything


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
        low, high = 0.0, 1.0
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if self.at_fraction(middle) < macs else (low, middle)
        return (low + high) / 2

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

    A policy that is asked for little too soon collapses; a start below the target is not used.
    """
    progress = min(1.0, update / max(1.0, part * updates))
    return target + max(0.0, start - target) * (1 - progress)


def calibrate_threshold(
    game: TokenGame,
    policy: TokenPolicy,
    batches: Sequence[Tensor | TokenState],
    target_macs: float,
    steps: int = 24,
    tolerance: float = 1e-3,
) -> TokenPolicy:
    """The same policy with the threshold at which its greedy play costs at most `target_macs` per image, and almost.

    Bisection in logit space; sharp policies need many steps.

    Args:
        game: what is played.
        policy: whose threshold to set.
        batches: training images (or prepared states) to measure on.
        target_macs: mean MACs per image, policy included.
        steps: most halvings of the range, at least 20.
        tolerance: how far below the target, relative to it, the search may stop early.

    Raises:
        ValueError: for no images or too few steps.
        BudgetError: if even pruning everything costs more.
    """
    if not batches:
        raise ValueError("batches: expected at least one batch of images, got none")
    if steps < MIN_CALIBRATION_STEPS:
        raise ValueError(f"steps: expected at least {MIN_CALIBRATION_STEPS}, got {steps}")

    def at(threshold: float) -> tuple[TokenPolicy, float]:
        candidate = policy.with_threshold(threshold)
        macs = [play(game, candidate, batch).outcome.macs for batch in batches]
        return candidate, float(torch.cat(macs).mean())

    low, high = -LOGIT_RANGE, LOGIT_RANGE
    best, least = at(high)
    if least > target_macs:
        raise BudgetError(
            f"target_macs: expected at least {least / 1e9:.5g} GMACs, what is left when the policy prunes all it can, "
            f"got {target_macs / 1e9:.5g}"
        )
    for _ in range(steps):
        middle = (low + high) / 2
        candidate, macs = at(middle)
        if macs > target_macs:
            low = middle
        else:
            high, best = middle, candidate
            if macs >= (1 - tolerance) * target_macs:
                break
    return best
