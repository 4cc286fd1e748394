"""How the reward follows from the play so far, so that play arrives at its budget; and the detection of collapse."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from math import exp
from typing import Any

from torch import Tensor

from ...game.rewards import START_PRICE, RewardFn, SettlingReward, at_price
from ...types import Observation
from .targets import PolicyCost


class RewardSchedule(ABC):
    """Chooses the reward of every update so that play moves to a target."""

    @abstractmethod
    def reward(self, target: float) -> RewardFn:
        """The reward of the coming update.

        Args:
            target: what its games should cost, as a share of the dense network's MACs.
        """

    @abstractmethod
    def observe(self, share: float, accuracy: float, target: float, costs: Tensor | None = None) -> None:
        """Take in the results of an update.

        Args:
            share: mean cost of its games, as a share of the dense network's MACs.
            accuracy: share of the images that were classified correctly.
            target: the target that `share` should have met.
            costs: `[B]`, what each game cost, as a share of the dense network's MACs.
        """

    @property
    @abstractmethod
    def price(self) -> float:
        """What a kept token is charged, for the log."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """All that the coming rewards depend on."""

    @abstractmethod
    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from the result of `state`."""

    def view(self, obs: Observation) -> Observation:
        """What actor and critic see of an observation of the coming games: the observation itself."""
        return obs


class FixedReward(RewardSchedule):
    """A reward without a price: it stays as it is, and calibration of the threshold alone meets the budget.

    Args:
        reward: what agents are paid.
    """

    def __init__(self, reward: RewardFn) -> None:
        self._reward = reward

    def reward(self, target: float) -> RewardFn:
        """Always the same."""
        return self._reward

    def observe(self, share: float, accuracy: float, target: float, costs: Tensor | None = None) -> None:
        """Nothing changes."""

    @property
    def price(self) -> float:
        """0: there is no price."""
        return 0.0

    def state(self) -> dict[str, Any]:
        """Empty."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Nothing to restore."""


class DualPrice(RewardSchedule):
    """Dual ascent on the price of a reward: it rises while play costs more than the target, and falls below.

    The steps are relative, so that the price stays positive and the rate does not depend on its scale. Play answers
    with a delay, and pure ascent overshoots. The price is therefore the dual variable times `exp(gain * excess)`, which
    acts at once and is 1 at the target. The dual variable is kept below 1, where a single token would cost as much as
    the whole outcome pays; from larger values it would only take long to come back.

    Args:
        reward: one with a price, see `has_price`; it is where to start.
        rate: relative change of the dual variable per relative excess of the MACs, each update.
        gain: of the immediate answer.

    Raises:
        ValueError: for a start that is not a number above 0.
    """

    def __init__(self, reward: RewardFn, rate: float, gain: float) -> None:
        self._reward = reward
        self._rate = rate
        self._gain = gain
        self._dual = self._price = start_price(reward)

    def reward(self, target: float) -> RewardFn:
        """The reward at the current price."""
        return at_price(self._reward, self._price)

    def observe(self, share: float, accuracy: float, target: float, costs: Tensor | None = None) -> None:
        """Move the price."""
        excess = share / target - 1
        self._dual = min(1.0, self._dual * exp(self._rate * excess))
        self._price = self._dual * exp(self._gain * excess)

    @property
    def price(self) -> float:
        """Price of carrying a token through the whole network."""
        return self._price

    def state(self) -> dict[str, Any]:
        """Dual variable and price."""
        return {"dual": self._dual, "price": self._price}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Set dual variable and price."""
        self._dual, self._price = state["dual"], state["price"]


class FedForwardKeepCost(RewardSchedule):
    """The weights of a reward that settles, chosen so that its equilibrium costs the target.

    For `PaperReward` the kept fraction is accuracy * outcome_bonus / keep_cost at every site, so
    `keep_cost = outcome_bonus * accuracy / fraction(target)`. A dual variable cannot take play out of the other, empty
    equilibrium, because accuracy falls with the tokens. With an annealed target and this formula play does not get
    there.

    Args:
        reward: its other weights stay as they are.
        cost: converts a target to the fraction of tokens kept at all sites.
        accuracy: first guess.
        smoothing: weight of the past in the running accuracy.
    """

    def __init__(self, reward: SettlingReward, cost: PolicyCost, accuracy: float = 0.9, smoothing: float = 0.8) -> None:
        self._reward = reward
        self._cost = cost
        self._accuracy = accuracy
        self._smoothing = smoothing
        self._price = float(reward.keep_cost)

    def reward(self, target: float) -> RewardFn:
        """The reward whose equilibrium costs the target."""
        tokens = self._cost.model.num_patches
        fraction = max(self._cost.fraction_for(target * self._cost.model.dense()), 1 / tokens)
        settled: Any = self._reward.settled(fraction, self._accuracy, tokens)
        self._price = settled.keep_cost
        return settled

    def observe(self, share: float, accuracy: float, target: float, costs: Tensor | None = None) -> None:
        """Update the running accuracy."""
        self._accuracy = self._smoothing * self._accuracy + (1 - self._smoothing) * accuracy

    @property
    def price(self) -> float:
        """The last `keep_cost`."""
        return self._price

    def state(self) -> dict[str, Any]:
        """The running accuracy."""
        return {"accuracy": self._accuracy}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Set the running accuracy."""
        self._accuracy = state["accuracy"]


class AnnealedKeepCost(RewardSchedule):
    """The weights of a reward that settles as they were given, approached from a game that keeps more.

    Before the target has come down, the equilibrium is that of the target, with every image classified correctly.

    Args:
        reward: with the weights in the end.
        cost: converts a target to the fraction of tokens kept at all sites.
        final: what its equilibrium costs, as a share of the dense network's MACs.
    """

    def __init__(self, reward: SettlingReward, cost: PolicyCost, final: float) -> None:
        self._reward = reward
        self._cost = cost
        self._final = final
        self._price = float(reward.keep_cost)

    def reward(self, target: float) -> RewardFn:
        """The reward whose equilibrium costs the target."""
        chosen: Any = self._reward
        if target > self._final:
            fraction = self._cost.fraction_for(target * self._cost.model.dense())
            chosen = self._reward.settled(fraction, 1.0, self._cost.model.num_patches)
        self._price = chosen.keep_cost
        return chosen

    def observe(self, share: float, accuracy: float, target: float, costs: Tensor | None = None) -> None:
        """Nothing changes."""

    @property
    def price(self) -> float:
        """The last `keep_cost`."""
        return self._price

    def state(self) -> dict[str, Any]:
        """Empty: the weights follow from the target alone."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Nothing to restore."""


def start_price(reward: Any) -> float:
    """The price that a reward begins with; `START_PRICE` if it has `at_price` but no attribute `price`.

    Raises:
        ValueError: if it is not one number above 0.
    """
    price = getattr(reward, "price", START_PRICE)
    is_number = not isinstance(price, Tensor) or price.numel() == 1
    if not is_number or not float(price) > 0:
        raise ValueError(f"price: expected one number above 0 for a budget to start from, got {price!r}")
    return float(price)


class CollapseWarning(UserWarning):
    """Play has settled where nothing can be learnt: every token pruned, or every token kept."""


class CollapseDetector:
    """Warns once when play has been at an extreme for several updates.

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
