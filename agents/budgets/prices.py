"""How the reward moves so that play arrives at a budget, and how to notice that it does not."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from math import exp
from typing import Protocol

from ...game.rewards import Attribution, PaperReward, RewardFn, SharedOutcome
from .targets import PolicyCost


class CollapseWarning(UserWarning):
    """Play has settled where nothing can be learnt: every token pruned, or every token kept."""


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


class FixedReward:
    """A reward that stays as it is; the budget is met by the calibration of the threshold alone.

    Args:
        reward: what agents are paid.
    """

    def __init__(self, reward: RewardFn) -> None:
        self._reward = reward

    def reward(self, target: float) -> RewardFn:
        """Always the same."""
        return self._reward

    def observe(self, share: float, accuracy: float, target: float) -> None:
        """Nothing follows."""

    @property
    def price(self) -> float:
        """The reward's own price or cost of keeping; 0 if it has none."""
        return float(getattr(self._reward, "price", getattr(self._reward, "keep_cost", 0.0)))

    def state(self) -> dict[str, float]:
        """Nothing changes."""
        return {}

    def restore(self, state: Mapping[str, float]) -> None:
        """Nothing to take."""


class DualPrice:
    """Dual ascent on the price of a reward: dearer while play costs more than the target, cheaper below.

    The steps are relative, so that the price stays positive and the rate does not depend on its scale. Play answers
    late, and pure ascent overshoots: the price asked is therefore the dual variable times `exp(gain * excess)`, which
    pulls at once and vanishes at the target. The dual variable stays below 1, where a single token would cost as
    much as the whole outcome pays; above, it could only take long to come back.

    Args:
        reward: its price is where to start.
        rate: relative change of the dual variable per relative excess of the MACs, each update.
        gain: of the immediate answer.
    """

    def __init__(self, reward: SharedOutcome | Attribution, rate: float, gain: float) -> None:
        self._reward = reward
        self._rate = rate
        self._gain = gain
        self._dual = self._price = float(reward.price)

    def reward(self, target: float) -> RewardFn:
        """The reward at the current price."""
        return replace(self._reward, price=self._price)

    def observe(self, share: float, accuracy: float, target: float) -> None:
        """Move the price."""
        excess = share / target - 1
        self._dual = min(1.0, self._dual * exp(self._rate * excess))
        self._price = self._dual * exp(self._gain * excess)

    @property
    def price(self) -> float:
        """Price of carrying a token through the whole network."""
        return self._price

    def state(self) -> dict[str, float]:
        """Dual variable and price."""
        return {"dual": self._dual, "price": self._price}

    def restore(self, state: Mapping[str, float]) -> None:
        """Take dual variable and price."""
        self._dual, self._price = state["dual"], state["price"]


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

    def observe(self, first: float, last: float, target_fraction: float, accuracy: float) -> bool:
        """Look at an update.

        Args:
            first: share of the tokens left after the first site.
            last: share of the tokens left after the last site.
            target_fraction: what the target would leave if all pruning happened at the first site.
            accuracy: of the games played.

        Returns:
            Whether play is collapsed.
        """
        empty = first < 0.1 * target_fraction
        full = last > 0.99 and target_fraction < 0.9
        self.streak = self.streak + 1 if empty or full else 0
        if self.streak == self.patience:
            what = "pruned nearly every token" if empty else "kept every token"
            remedy = "lower keep_cost or price, or anneal the target more slowly" if empty else "raise the price"
            warnings.warn(
                f"training collapsed: the agents have {what} for {self.patience} updates (accuracy {accuracy:.1%}, "
                f"{first:.1%} of the tokens left after the first site, target about {target_fraction:.1%}); {remedy}",
                CollapseWarning,
                stacklevel=2,
            )
        return self.streak >= self.patience
