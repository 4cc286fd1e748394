"""From a budget to a policy that meets it: the target, the price that leads there, and the threshold at the end."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import exp
from typing import Protocol

import torch
from torch import Tensor

from ..cost import CostModel
from ..errors import BudgetError
from ..game import TokenGame
from ..reward import PaperReward, RewardFn, SharedOutcome
from ..rollout import play
from ..tokens import TokenState
from ..types import Site
from .policy import TokenPolicy

MIN_CALIBRATION_STEPS = 20


class CollapseWarning(UserWarning):
    """Play has settled where nothing can be learnt: every token pruned, or every token kept."""


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


class RewardSchedule(Protocol):
    """Chooses the reward of every update so that play moves to a target."""

    def reward(self, target: float) -> RewardFn:
        """The reward for an update whose target is `target` (share of dense MACs)."""
        ...

    def observe(self, share: float, accuracy: float, target: float) -> None:
        """Learn how the update's games came out: share of dense MACs and accuracy."""
        ...

    @property
    def price(self) -> float:
        """What a kept token is charged, for the log."""
        ...

    def state(self) -> dict[str, float]:
        """What a checkpoint has to hold."""
        ...

    def restore(self, state: Mapping[str, float]) -> None:
        """Go on from a checkpoint."""
        ...


class DualPrice:
    """Dual ascent on the price of `SharedOutcome`: dearer while play costs more than the target, cheaper below.

    The step is relative, so that the price stays positive and the rate does not depend on its scale.

    Args:
        reward: its price is where to start.
        rate: relative change per relative excess of the MACs.
    """

    def __init__(self, reward: SharedOutcome, rate: float) -> None:
        self._reward = reward
        self._rate = rate
        self._price = reward.price

    def reward(self, target: float) -> RewardFn:
        """The reward at the current price."""
        return replace(self._reward, price=self._price)

    def observe(self, share: float, accuracy: float, target: float) -> None:
        """Move the price."""
        self._price *= exp(self._rate * (share / target - 1))

    @property
    def price(self) -> float:
        """Price of carrying a token through the whole network."""
        return self._price

    def state(self) -> dict[str, float]:
        """The price."""
        return {"price": self._price}

    def restore(self, state: Mapping[str, float]) -> None:
        """Take the price."""
        self._price = state["price"]


class FedForwardKeepCost:
    """`keep_cost` of `PaperReward` at which play settles at the target, from its equilibrium.

    Kept fraction = accuracy * outcome_bonus / keep_cost at every site, so
    `keep_cost = outcome_bonus * accuracy / fraction(target)`. A dual variable does not rescue play from the other,
    empty equilibrium (accuracy falls with the tokens), an annealed target with the cost fed forward never got there.

    Args:
        reward: its `outcome_bonus` is kept.
        cost: converts a target to the fraction of tokens kept at all sites.
        accuracy: first guess.
        smoothing: weight of the past in the running accuracy.
    """

    def __init__(self, reward: PaperReward, cost: PolicyCost, accuracy: float = 0.9, smoothing: float = 0.8) -> None:
        self._reward = reward
        self._cost = cost
        self._accuracy = accuracy
        self._smoothing = smoothing

    def reward(self, target: float) -> RewardFn:
        """The reward whose equilibrium costs the target."""
        fraction = max(self._cost.fraction_for(target * self._cost.model.dense()), 1 / self._cost.model.num_patches)
        self._reward = replace(self._reward, keep_cost=self._reward.outcome_bonus * self._accuracy / fraction)
        return self._reward

    def observe(self, share: float, accuracy: float, target: float) -> None:
        """Update the running accuracy."""
        self._accuracy = self._smoothing * self._accuracy + (1 - self._smoothing) * accuracy

    @property
    def price(self) -> float:
        """The last `keep_cost`."""
        return self._reward.keep_cost

    def state(self) -> dict[str, float]:
        """The running accuracy."""
        return {"accuracy": self._accuracy}

    def restore(self, state: Mapping[str, float]) -> None:
        """Take the running accuracy."""
        self._accuracy = state["accuracy"]


class CollapseDetector:
    """Says so, once, when play has been stuck at an extreme for a while.

    Args:
        patience: updates in a row.
    """

    def __init__(self, patience: int = 5) -> None:
        self.patience = patience
        self.streak = 0

    def observe(self, kept: float, target_fraction: float, accuracy: float) -> bool:
        """Look at an update.

        Args:
            kept: share of the tokens left after the last site.
            target_fraction: what the target would leave if all pruning happened at the first site.
            accuracy: of the games played.

        Returns:
            Whether play is collapsed.
        """
        empty = kept < 0.1 * target_fraction
        full = kept > 0.99 and target_fraction < 0.9
        self.streak = self.streak + 1 if empty or full else 0
        if self.streak == self.patience:
            what = "pruned nearly every token" if empty else "kept every token"
            remedy = "lower keep_cost or price, or anneal the target more slowly" if empty else "raise the price"
            warnings.warn(
                f"training collapsed: the agents have {what} for {self.patience} updates (accuracy {accuracy:.1%}, "
                f"{kept:.1%} of the tokens left, target about {target_fraction:.1%}); {remedy}",
                CollapseWarning,
                stacklevel=2,
            )
        return self.streak >= self.patience


def calibrate_threshold(
    game: TokenGame,
    policy: TokenPolicy,
    batches: Sequence[Tensor | TokenState],
    target_macs: float,
    steps: int = 24,
) -> TokenPolicy:
    """The same policy with the threshold at which its greedy play costs at most `target_macs` per image, and almost.

    Bisection in logit space; sharp policies need many steps.

    Args:
        game: what is played.
        policy: whose threshold to set.
        batches: training images (or prepared states) to measure on.
        target_macs: mean MACs per image, policy included.
        steps: halvings of the range, at least 20.

    Raises:
        ValueError: for no images or too few steps.
        BudgetError: if even pruning everything costs more.
    """
    if not batches:
        raise ValueError("batches: expected at least one batch of images, got none")
    if steps < MIN_CALIBRATION_STEPS:
        raise ValueError(f"steps: expected at least {MIN_CALIBRATION_STEPS}, got {steps}")

    def at(threshold: float) -> tuple[TokenPolicy, float]:
        candidate = TokenPolicy(policy.actor, threshold, policy.sites, policy.info)
        macs = [play(game, candidate, batch).outcome.macs for batch in batches]
        return candidate, float(torch.cat(macs).mean())

    low, high = -_LOGIT_RANGE, _LOGIT_RANGE
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
    return best


_LOGIT_RANGE = 40.0
