"""One policy for any budget: it is told what the image may cost, and a user moves along the curve without retraining.

In training every image is asked for a budget of its own. The budget becomes one more feature of every token, for actor
and critic alike; the price of a token is a function of the budget, moved until images cost what they are asked to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import exp, log
from typing import Any

import torch
from torch import Tensor

from ...game.rewards import Attribution, RewardFn, SharedOutcome
from ...policy import register_policy
from ...types import Decision, Observation, Site
from ..networks import TokenActor
from ..policies import ExploringPolicy, TokenPolicy
from ..runs.processes import Processes

KNOTS = 6  # budgets at which price and threshold are known; linear in between
SPREAD = 2.0  # the budget feature goes from -2 to 2, the other features of a token have variance 1


def see_budget(obs: Observation, shares: Tensor, low: float, high: float) -> Observation:
    """An observation whose tokens and class tokens carry the budget as one more feature.

    The networks normalise each token, whose scale grows from block to block: the feature is therefore written in units
    of the token's own standard deviation, and comes out of the normalisation as it should.

    Args:
        obs: what the policy sees.
        shares: `[B]`, what each image may cost, as a share of the dense network's MACs.
        low: smallest budget of the training.
        high: largest one.

    Returns:
        The same with tokens `[sum n_i, D + 1]` and cls `[B, D + 1]`.
    """
    coded = (SPREAD * (2 * (shares - low) / (high - low) - 1)).to(obs.tokens)
    return replace(obs, tokens=_append(obs.tokens, coded[obs.image]), cls=_append(obs.cls, coded))


def _append(x: Tensor, feature: Tensor) -> Tensor:
    centre = x.mean(dim=1)
    scale = (x - centre[:, None]).square().mean(dim=1).sqrt()
    return torch.cat([x, (centre + scale * feature)[:, None]], dim=1)


def interpolate(at: Tensor, knots: Sequence[float], values: Sequence[float]) -> Tensor:
    """Piecewise linear function through `(knots, values)`, constant outside, at `[...]`."""
    x, y = (torch.tensor(list(numbers), dtype=torch.float64, device=at.device) for numbers in (knots, values))
    at = at.double().clamp(float(x[0]), float(x[-1]))
    right = torch.searchsorted(x, at).clamp(1, len(x) - 1)
    part = (at - x[right - 1]) / (x[right] - x[right - 1])
    return y[right - 1] + part * (y[right] - y[right - 1])


def spaced(low: float, high: float) -> tuple[float, ...]:
    """The knots of a range of budgets."""
    return (*(low + (high - low) * index / (KNOTS - 1) for index in range(KNOTS - 1)), high)


@register_policy("adaptive_policy")
class AdaptivePolicy(TokenPolicy):
    """A `TokenPolicy` that serves any budget of a range; `at(share)` is the same policy at another one.

    Args:
        actor: of width D + 1, the budget being one more feature.
        shares: budgets at which thresholds are known, increasing, as shares of the dense network's MACs.
        thresholds: calibrated at these budgets, in logits.
        share: the budget now; None: the largest.
        sites: see `TokenPolicy`.
        info: see `TokenPolicy`.

    Raises:
        ValueError: for a budget outside the range.
    """

    def __init__(
        self,
        actor: TokenActor,
        shares: Sequence[float],
        thresholds: Sequence[float],
        share: float | None = None,
        sites: Sequence[int | str | Site] | None = None,
        info: Mapping[str, Any] | None = None,
    ) -> None:
        self.shares, self.thresholds = tuple(shares), tuple(thresholds)
        self.share = self.shares[-1] if share is None else float(share)
        if not self.shares[0] <= self.share <= self.shares[-1]:
            raise ValueError(f"share: expected {self.shares[0]:g} to {self.shares[-1]:g} of dense, got {share!r}")
        threshold = float(interpolate(torch.tensor(self.share), self.shares, self.thresholds))
        super().__init__(actor, threshold, sites, info)

    def at(self, share: float) -> AdaptivePolicy:
        """The same policy, sharing its weights, at another budget.

        Args:
            share: of the dense network's MACs, within the range that it was trained for.
        """
        return AdaptivePolicy(self.actor, self.shares, self.thresholds, share, self.sites, self.info)

    def with_threshold(self, threshold: float) -> AdaptivePolicy:
        """The same policy at the same budget with another threshold there, for calibration."""
        made = self.at(self.share)
        made.threshold = float(threshold)
        return made

    def decide(self, obs: Observation) -> Decision:
        """Compare every alive token with the threshold, given the budget."""
        shares = torch.full((obs.batch_size,), self.share, device=obs.tokens.device)
        return super().decide(see_budget(obs, shares, self.shares[0], self.shares[-1]))

    @property
    def width(self) -> int:
        """Embedding width of the networks that it can prune."""
        return self.actor.embed_dim - 1

    def config(self) -> dict[str, Any]:
        """All that `from_config` needs beside the actor's weights, as JSON values."""
        plain = {name: value for name, value in super().config().items() if name != "threshold"}
        return {**plain, "shares": list(self.shares), "thresholds": list(self.thresholds), "share": self.share}


class AdaptiveExplorer(ExploringPolicy):
    """Samples decisions given a budget per image.

    Attributes:
        shares: `[B]`, budgets of the coming games.

    Args:
        actor: of width D + 1.
        generator: gives the noise its seed.
        low: smallest budget.
        high: largest one.
    """

    def __init__(self, actor: TokenActor, generator: torch.Generator, low: float, high: float) -> None:
        super().__init__(actor, generator)
        self.low, self.high = low, high
        self.shares = torch.empty(0)

    def view(self, obs: Observation) -> Observation:
        """What actor and critic see."""
        return see_budget(obs, self.shares.to(obs.tokens.device), self.low, self.high)

    def decide(self, obs: Observation) -> Decision:
        """Draw keep or prune for every alive token."""
        return super().decide(self.view(obs))


class AdaptivePrice:
    """A `RewardSchedule` that asks every image for a budget of its own and has a dual variable for every knot.

    Attributes:
        costs: `[B]`, what the last games cost, as shares of dense; to be set before `observe`.

    Args:
        reward: its price is where to start.
        explorer: is told the budgets.
        images: games of an update, of all processes.
        generator: draws the budgets.
        rate: see `DualPrice`.
        gain: see `DualPrice`.
        processes: who trains together.
    """

    def __init__(
        self,
        reward: SharedOutcome | Attribution,
        explorer: AdaptiveExplorer,
        images: int,
        generator: torch.Generator,
        rate: float,
        gain: float,
        processes: Processes,
    ) -> None:
        self._reward, self._explorer, self._images, self._generator = reward, explorer, images, generator
        self._rate, self._gain, self._processes = rate, gain, processes
        self.knots = spaced(explorer.low, explorer.high)
        self._duals = [float(reward.price)] * KNOTS
        self._prices = list(self._duals)
        self.costs = self._asked = torch.empty(0)

    def reward(self, target: float) -> RewardFn:
        """Draw the budgets of the coming games; prices are log-linear in them between the knots."""
        low, high = self._explorer.low, self._explorer.high
        self._asked = low + (high - low) * torch.rand(self._images, generator=self._generator)
        own = self._processes.share(self._images)
        shares = self._asked[own.start : own.stop]
        self._explorer.shares = shares
        price = interpolate(shares, self.knots, [log(each) for each in self._prices]).exp().float()
        return replace(self._reward, price=price)

    def observe(self, share: float, accuracy: float, target: float) -> None:
        """Move the prices; while the mean target is still on its way, every image's is as far from its budget."""
        late = target - (self._explorer.low + self._explorer.high) / 2
        costs, targets = self.costs.cpu(), (self._asked + late).clamp(max=1.0)
        nearest = (self._asked[:, None] - torch.tensor(self.knots)).abs().argmin(dim=1)
        for knot in nearest.unique().tolist():
            rows = nearest == knot
            excess = float(costs[rows].sum() / targets[rows].sum()) - 1
            self._duals[knot] = min(1.0, self._duals[knot] * exp(self._rate * excess))
            self._prices[knot] = self._duals[knot] * exp(self._gain * excess)

    @property
    def price(self) -> float:
        """Mean price over the knots."""
        return sum(self._prices) / KNOTS

    def state(self) -> dict[str, Any]:
        """Dual variables and prices."""
        return {"duals": self._duals, "prices": self._prices}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take dual variables and prices."""
        self._duals, self._prices = list(state["duals"]), list(state["prices"])
