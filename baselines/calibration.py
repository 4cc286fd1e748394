"""Give a method the budget that it is to be compared at, by turning the one parameter that sets its cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cache
from math import floor, isfinite
from typing import Any, Generic, Literal, TypeVar, cast

import torch
from torch import Tensor

from ..data import ImageDataset, batches_of
from ..engine.backbone import Backbone
from ..engine.cost import CostModel, bisect
from ..engine.tokens import TokenState
from ..errors import BudgetError
from ..game.rollout import play
from ..game.token_game import TokenGame
from ..policy import Policy
from ..types import Site
from .argument_checks import check_range, whole_number

P = TypeVar("P", bound=Policy)
Batches = Sequence[tuple[Tensor, Tensor]]
Setting = float | int | tuple[int, ...]
BATCH = 64  # images of a data set that are played at once


@dataclass(frozen=True)
class Knob:
    """The parameter of a method that sets its cost, and the range in which it is turned.

    Kinds: `"real"` and `"integer"` are single numbers. A `"schedule"` is one whole number per site, and their mean is
    turned. It is for parameters of which a single whole number would jump from one budget to another far away: ToMe's
    r acts in every block, and a mean of 3.4 merges 3 tokens at some sites and 4 at others.

    Args:
        name: of the parameter.
        low: smallest value.
        high: largest value; None: the number of patch tokens.
        rising: whether larger values cost more.
        kind: what the method takes.
    """

    name: str = "keep_rate"
    low: float = 1e-6
    high: float | None = 1.0
    rising: bool = True
    kind: Literal["real", "integer", "schedule"] = "real"

    def setting(self, position: float, num_tokens: int, num_sites: int) -> Setting:
        """The value at a position from 0 (cheapest) to 1 (dearest).

        Args:
            position: how far the knob is turned.
            num_tokens: patch tokens of the network.
            num_sites: sites at which the method acts.
        """
        high = float(num_tokens) if self.high is None else self.high
        share = position if self.rising else 1 - position
        value = self.low + share * (high - self.low)
        if self.kind == "schedule":
            return spread(value, num_sites)
        return round(value) if self.kind == "integer" else value

    def turner(self, policy: Policy) -> Callable[[Any], Any] | None:
        """What makes the same policy with another setting of this knob; None: it has no such parameter."""
        if not hasattr(policy, self.name):
            return None

        def make(value: Any) -> Any:
            made = copy(policy)
            object.__setattr__(made, self.name, value)  # also where the policy is a frozen dataclass
            return made

        return make


KEEP_RATE = Knob()


def spread(mean: float, count: int) -> tuple[int, ...]:
    """Whole numbers, each the floor or the ceiling of `mean`, that sum to `floor(count * mean)`, evenly mixed."""
    return tuple(floor((index + 1) * mean) - floor(index * mean) for index in range(count))


def calibrate_policy(
    build: Callable[[Setting], P],
    target_gmacs: float,
    backbone: Backbone,
    data: ImageDataset | Batches,
    sites: Sequence[int | str | Site] | Literal["published"] | None = None,
    steps: int = 18,
    tolerance: float = 0.0,
    knob: Knob = KEEP_RATE,
) -> P:
    """Find the setting of a knob at which a policy meets a budget; `baselines.calibrate` does it by name.

    Args:
        build: makes the policy from a setting of the knob.
        target_gmacs: mean GMACs per image, policy and evidence included.
        backbone: the network.
        data: images to measure the cost on, a data set or a list of batches with labels.
        sites: where to prune, see `Backbone.sites_for`; None: where the policy is made to act, else the network's own.
        steps: bisection steps.
        tolerance: stop as soon as the budget is exceeded by this share of it or less.
        knob: what is turned.

    Returns:
        The policy at the smallest setting found that spends at least the budget, freshly made.

    Raises:
        BudgetError: if the budget is below what the cheapest setting costs, or above what the dearest does; the
            message gives the range.
        ValueError: for no images, no steps, or a tolerance that is no such share.
    """
    if isinstance(target_gmacs, bool) or not isinstance(target_gmacs, int | float) or not isfinite(target_gmacs):
        raise BudgetError(f"target_gmacs: expected a finite number of GMACs, got {target_gmacs!r}")
    whole_number("steps", steps, least=1)
    check_range("tolerance", tolerance, 0.0, 0.99)
    dial = _Dial(build, knob, backbone, sites)
    batches = _as_batches(data)
    if not batches:
        raise ValueError("data: expected at least one image, got an empty dataset")
    everything = dial.prepare([images for images, _ in batches])
    # Most methods keep equally many tokens of every image; for them a single image gives the cost of all.
    position = _bisected(dial, dial.prepare([batches[0][0][:1]]), target_gmacs, steps, tolerance)
    if position is None or len(dial.macs(position, everything).unique()) > 1:
        position = _bisected(dial, everything, target_gmacs, steps, tolerance)
    if position is None:
        cheapest, dearest = (float(dial.macs(end, everything).mean()) / 1e9 for end in (0.0, 1.0))
        name = type(dial.policy(1.0)).__name__
        raise out_of_reach(f"{name} reaches", cheapest, dearest, target_gmacs, backbone, dial.sites)
    return dial.policy(position)


def out_of_reach(
    what: str, cheapest: float, dearest: float, target_gmacs: float, backbone: Backbone, sites: Sequence[Site]
) -> BudgetError:
    """The error for a budget outside of what a method can cost: the range, and why it ends where it does.

    Args:
        what: subject and verb, such as "EViT reaches".
        cheapest: GMACs of the cheapest setting.
        dearest: GMACs of the dearest setting.
        target_gmacs: what was asked.
        backbone: the network.
        sites: where the method acts.
    """
    cost = CostModel.of(backbone)
    dense, floor = cost.dense() / 1e9, cost.floor(sites) / 1e9
    low, high, asked = (f"{100 * value / dense:.3g}" for value in (cheapest, dearest, target_gmacs))
    text = f"target_gmacs: {what} {cheapest:.5g} to {dearest:.5g} GMACs here, got {target_gmacs:.5g}; "
    text += f"that is {low} to {high} % of dense, got {asked} %"
    if target_gmacs < cheapest:
        text += f"; up to the first site ({sites[0]}, of {backbone.depth} blocks) all tokens run, "
        text += f"which takes {100 * floor / dense:.3g} % alone"
    return BudgetError(text)


class _Dial(Generic[P]):
    """A method as a function of its knob's position, from 0 (cheapest) to 1 (dearest)."""

    def __init__(
        self,
        build: Callable[[Setting], P],
        knob: Knob,
        backbone: Backbone,
        sites: Sequence[int | str | Site] | Literal["published"] | None,
    ) -> None:
        self.build, self.knob, self.backbone = build, knob, backbone
        self.sites = backbone.sites_for(build(knob.setting(1.0, backbone.num_patches, 1)), sites)

    def setting(self, position: float) -> Setting:
        return self.knob.setting(position, self.backbone.num_patches, len(self.sites))

    def policy(self, position: float) -> P:
        return self.build(self.setting(position))

    def game(self, policy: Policy) -> TokenGame:
        return TokenGame.for_policy(self.backbone, policy, sites=self.sites)

    def prepare(self, batches: Sequence[Tensor]) -> list[TokenState]:
        """Run the part of the network before the first site, once for all settings."""
        game = self.game(self.policy(1.0))
        return [game.prepare(images) for images in batches]

    def macs(self, position: float, states: Sequence[TokenState]) -> Tensor:
        """MACs of each image, `[images]`."""
        policy = self.policy(position)
        game = self.game(policy)
        return torch.cat([play(game, policy, state).outcome.macs for state in states])


def _bisected(
    dial: _Dial[P], states: Sequence[TokenState], target_gmacs: float, steps: int, tolerance: float
) -> float | None:
    """The smallest position found that spends at least the budget; None where the budget is out of reach."""

    @cache
    def cost(position: float) -> float:
        return float(dial.macs(position, states).mean()) / 1e9

    def done(low: float, high: float) -> bool:
        return cost(high) <= (1 + tolerance) * target_gmacs or dial.setting(low) == dial.setting(high)

    if not cost(0.0) <= target_gmacs <= cost(1.0):
        return None
    return bisect(cost, target_gmacs, 0.0, 1.0, steps, done)[1]


def _as_batches(data: ImageDataset | Batches) -> Batches:
    """Batches as they are; a data set in batches."""
    if not isinstance(data, Sequence) and hasattr(data, "__getitem__"):
        return batches_of(cast(ImageDataset, data), BATCH)
    return list(cast(Batches, data))
