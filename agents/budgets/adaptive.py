"""One policy for any budget of a range: the budget is an input, and a user chooses it without training again.

In training every image has a budget of its own. The budget becomes one more feature of every token, for actor and
critic. The price of a token is a function of the budget, which is moved until images cost what they should.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import exp, log
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...envs.actions import ActionKind
from ...errors import BudgetError
from ...game.rewards import RewardFn, at_price, has_price
from ...game.token_game import TokenGame
from ...policy import register_policy
from ...types import Decision, Observation, Site
from ..networks import TokenActor
from ..policies import TokenPolicy
from ..shared.processes import Processes
from ..shared.settings import check
from .calibration import calibrate_threshold
from .controller import Batches, Budget
from .prices import RewardSchedule, start_price
from .targets import PolicyCost, attainable

KNOTS = 6  # budgets at which price and threshold are known; linear in between
SPREAD = 2.0  # the budget feature goes from -2 to 2; the other features of a token have variance 1


def see_budget(obs: Observation, shares: Tensor, low: float, high: float) -> Observation:
    """An observation whose tokens and class tokens carry the budget as one more feature.

    The networks normalise each token. The feature is therefore in units of the token's own standard deviation: after
    the normalisation it is then the same whatever the scale of the token.

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
        actions: see `TokenPolicy`.
        seed: see `TokenPolicy`.

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
        actions: ActionKind | None = None,
        seed: int | None = None,
    ) -> None:
        self.shares, self.thresholds = tuple(shares), tuple(thresholds)
        self.share = self.shares[-1] if share is None else float(share)
        if not self.shares[0] <= self.share <= self.shares[-1]:
            raise ValueError(f"share: expected {self.shares[0]:g} to {self.shares[-1]:g} of dense, got {share!r}")
        threshold = float(interpolate(torch.tensor(self.share), self.shares, self.thresholds))
        super().__init__(actor, threshold, sites, info, actions, seed)

    def at(self, share: float) -> AdaptivePolicy:
        """The same policy, sharing its weights, at another budget.

        Args:
            share: of the dense network's MACs, within the range that it was trained for.
        """
        rest = self.sites, self.info, self.actions, self.seed
        return AdaptivePolicy(self.actor, self.shares, self.thresholds, share, *rest)

    def with_threshold(self, threshold: float) -> AdaptivePolicy:
        """The same policy at the same budget with another threshold there, for calibration."""
        made = self.at(self.share)
        made.threshold = float(threshold)
        return made

    def with_schedule(self, schedule: Sequence[float] | None) -> AdaptivePolicy:
        """Refused: a schedule belongs to one budget.

        Raises:
            ValueError: for any schedule but None.
        """
        if schedule is not None:
            raise ValueError(f"schedule: expected None for an adaptive policy, whose budget varies, got {schedule}")
        return self.at(self.share)

    def sampling(self, seed: int = 0) -> AdaptivePolicy:
        """The policy, sharing its weights, that draws every action with the probability that it has in training."""
        made = self.with_threshold(0.0)
        made.seed = seed
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


class AdaptivePrice(RewardSchedule):
    """Gives every image a budget of its own, drawn from a range, and keeps a dual variable for every knot of it.

    Attributes:
        shares: `[B]`, budgets of this process's coming games.

    Args:
        reward: one with a price, which may be `[B]`; it is where to start.
        low: smallest budget.
        high: largest one.
        images: games of an update, of all processes.
        generator: draws the budgets.
        rate: see `DualPrice`.
        gain: see `DualPrice`.
        processes: the processes that train together.
    """

    def __init__(
        self,
        reward: RewardFn,
        low: float,
        high: float,
        images: int,
        generator: torch.Generator,
        rate: float,
        gain: float,
        processes: Processes,
    ) -> None:
        self._reward, self._low, self._high = reward, low, high
        self._images, self._generator, self._processes = images, generator, processes
        self._rate, self._gain = rate, gain
        self.knots = spaced(low, high)
        self._duals = [start_price(reward)] * KNOTS
        self._prices = list(self._duals)
        self.shares = self._asked = torch.empty(0)

    def reward(self, target: float) -> RewardFn:
        """Draw the budgets of the coming games; between the knots the price is log-linear in the budget."""
        self._asked = self._low + (self._high - self._low) * torch.rand(self._images, generator=self._generator)
        own = self._processes.share(self._images)
        self.shares = self._asked[own.start : own.stop]
        price = interpolate(self.shares, self.knots, [log(each) for each in self._prices]).exp().float()
        return at_price(self._reward, price)

    def view(self, obs: Observation) -> Observation:
        """The observation with each image's budget as one more feature of its tokens."""
        return see_budget(obs, self.shares.to(obs.tokens.device), self._low, self._high)

    def observe(self, share: float, accuracy: float, target: float, costs: Tensor | None = None) -> None:
        """Move the prices; while the mean target is still annealed, every image's budget is raised by as much."""
        assert costs is not None
        late = target - (self._low + self._high) / 2
        costs, targets = costs.cpu(), (self._asked + late).clamp(max=1.0)
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
        """Set dual variables and prices."""
        self._duals, self._prices = list(state["duals"]), list(state["prices"])


@dataclass(frozen=True)
class BudgetRange(Budget):
    """A range of budgets for one policy, an `AdaptivePolicy`, that serves all of them."""

    low: float = 0.2
    """Smallest budget, as a share of the dense network's MACs."""
    high: float = 0.6
    """Largest budget."""

    extra_features: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, "fixed_counts", not self.fixed_counts, "False for an adaptive policy, whose budget varies")
        if not 0 < self.low < self.high <= 1:
            raise ValueError(
                "budget: expected two shares of dense for an adaptive policy, increasing, above 0 and at most 1, got "
                f"{(self.low, self.high)}"
            )

    def check_fit(self, reward: RewardFn, joint: bool = False, finetune: bool = False) -> None:
        """Refuse what an adaptive policy is not trained with.

        Raises:
            ValueError: naming it.
        """
        super().check_fit(reward, joint, finetune)
        if joint or finetune or not has_price(reward):
            got = "a joint agent" if joint else "fine-tuning" if finetune else type(reward).__name__
            raise ValueError(
                "budget: expected an agent per token, a reward with a price and no fine-tuning for an adaptive policy, "
                f"got {got}; or one budget, such as Share(0.35)"
            )

    def target(self, cost: PolicyCost, reward: RewardFn) -> float:
        """The middle of the range, MACs per image.

        Raises:
            BudgetError: if no policy can serve the whole range.
        """
        dense = cost.model.dense()
        try:
            for share in (self.low, self.high):
                attainable(cost, share * dense)
        except BudgetError as error:
            raise BudgetError(f"adaptive: no policy can serve all of {(self.low, self.high)}; {error}") from error
        return (self.low + self.high) / 2 * dense

    def schedule(
        self, reward: RewardFn, cost: PolicyCost, images: int, generator: torch.Generator, processes: Processes
    ) -> RewardSchedule:
        """A price for every budget of the range."""
        rates = self.price_rate, self.price_gain
        return AdaptivePrice(reward, self.low, self.high, images, generator, *rates, processes)

    def greedy(
        self, actor: TokenActor, sites: Sequence[Site], actions: ActionKind, info: Mapping[str, Any] | None = None
    ) -> AdaptivePolicy:
        """An `AdaptivePolicy` in the middle of the range, not calibrated yet."""
        shares, middle = spaced(self.low, self.high), (self.low + self.high) / 2
        return AdaptivePolicy(actor, shares, [0.0] * KNOTS, middle, sites, info, actions, self.seed)

    def calibrated(self, game: TokenGame, policy: Any, batches: Batches, target: float) -> AdaptivePolicy:
        """The policy with a threshold for every knot of the range, at the middle."""
        assert isinstance(policy, AdaptivePolicy)
        dense = game.cost.dense()
        at_knots = [calibrate_threshold(game, policy.at(share), batches, share * dense) for share in policy.shares]
        thresholds = [each.threshold for each in at_knots]
        rest = policy.sites, policy.info, policy.actions, policy.seed
        return AdaptivePolicy(policy.actor, policy.shares, thresholds, target / dense, *rest).eval()

    def at_target(self, game: TokenGame, policy: Any, batches: Batches, target: float) -> AdaptivePolicy:
        """The policy in the middle of the range alone, with the threshold there."""
        return calibrate_threshold(game, policy, batches, target)
