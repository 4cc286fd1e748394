"""Give a method the budget that it is to be compared at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isfinite
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor

from ..data import ImageDataset, batches_of
from ..engine.backbone import Backbone
from ..engine.tokens import TokenState
from ..errors import BudgetError
from ..game.rollout import play
from ..game.token_game import TokenGame
from ..policy import Policy
from ..types import Site, parse_sites
from .knobs import Knob, Setting

P = TypeVar("P", bound=Policy)
Batches = Sequence[tuple[Tensor, Tensor]]
BATCH = 64  # images of a data set that are played at once


def calibrate(
    policy_factory: str | Callable[..., P],
    target_gmacs: float,
    backbone: Backbone,
    data: ImageDataset | Batches,
    sites: Sequence[int | str | Site] | None = None,
    steps: int = 18,
    tolerance: float = 0.0,
    knob: Knob | None = None,
    **parameters: Any,
) -> P:
    """Find the setting at which a method costs what was asked, by bisection of its own knob.

    Counts of tokens are whole numbers, so a method meets a budget in steps; the smallest setting that does not spend
    less than the budget is taken, lest a comparison favour whoever is compared with it.

    Args:
        policy_factory: a baseline's name, its class, or anything that builds the policy from the knob's value.
        target_gmacs: mean GMACs per image, policy and evidence included.
        backbone: the network.
        data: images to measure the cost on, a data set or a list of batches with labels; not the ones that accuracies
            are reported for.
        sites: where to prune; None: where the policy wants to.
        steps: bisection steps.
        tolerance: stop as soon as the budget is exceeded by this share of it or less.
        knob: what to turn; None: the baseline's own, and for what is not one a keep rate above 0 and at most 1.
        **parameters: further parameters of the method.

    Returns:
        The policy, freshly made.

    Raises:
        BudgetError: if the budget is below what the method's cheapest setting costs, or above what the dearest does;
            the message gives the range.
        UnknownNameError: for the name of no baseline.
        ValueError: for no images.
    """
    if isinstance(target_gmacs, bool) or not isinstance(target_gmacs, int | float) or not isfinite(target_gmacs):
        raise BudgetError(f"target_gmacs: expected a finite number of GMACs, got {target_gmacs!r}")
    build, turned = _builder(policy_factory, knob, parameters)
    dial = _Dial(build, turned, backbone, sites)
    batches = _as_batches(data)
    if not batches:
        raise ValueError("data: expected at least one image, got an empty dataset")
    everything = dial.prepare([images for images, _ in batches])
    # Most methods take as many tokens from every image, so that one image tells.
    position = _bisect(dial, dial.prepare([batches[0][0][:1]]), target_gmacs, steps, tolerance)
    if position is None or len(dial.macs(position, everything).unique()) > 1:
        position = _bisect(dial, everything, target_gmacs, steps, tolerance)
    if position is None:
        cheapest, dearest = (float(dial.macs(end, everything).mean()) / 1e9 for end in (0.0, 1.0))
        raise BudgetError(
            f"target_gmacs: {type(dial.policy(1.0)).__name__} reaches {cheapest:.5g} to {dearest:.5g} GMACs here, "
            f"got {target_gmacs:.5g}"
        )
    return dial.policy(position)


def _bisect(
    dial: _Dial[Any], states: Sequence[TokenState], target_gmacs: float, steps: int, tolerance: float
) -> float | None:
    """The smallest position that does not spend less than the budget; None where it is out of reach."""

    def cost(position: float) -> float:
        return float(dial.macs(position, states).mean()) / 1e9

    low, high, dearest = 0.0, 1.0, cost(1.0)
    if not cost(low) <= target_gmacs <= dearest:
        return None
    for _ in range(steps):
        if dearest <= (1 + tolerance) * target_gmacs or dial.setting(low) == dial.setting(high):
            break
        middle = (low + high) / 2
        spent = cost(middle)
        if spent < target_gmacs:
            low = middle
        else:
            high, dearest = middle, spent
    return high


def _builder(
    policy_factory: str | Callable[..., P], knob: Knob | None, parameters: dict[str, Any]
) -> tuple[Callable[[Setting], P], Knob]:
    """What makes the policy from a setting of the knob, and the knob."""
    from .registry import describe, knob_of  # deferred: the registry knows the fits, which calibrate

    if not isinstance(policy_factory, str):
        return (lambda value: policy_factory(value, **parameters)), knob or knob_of(policy_factory)
    method = describe(policy_factory)
    turned = knob or method.knob
    return (lambda value: cast(P, method(**{**method.start, turned.name: value, **parameters}))), turned


class _Dial(Generic[P]):
    """A method as a function of its knob's position, 0 (cheapest) to 1 (dearest)."""

    def __init__(
        self,
        build: Callable[[Setting], P],
        knob: Knob,
        backbone: Backbone,
        sites: Sequence[int | str | Site] | None,
    ) -> None:
        self.build, self.knob, self.backbone = build, knob, backbone
        if sites is None:
            sites = build(knob.setting(1.0, backbone.num_patches, 1)).default_sites(backbone.depth)
        self.sites = parse_sites(backbone.default_sites if sites is None else sites, backbone.depth)

    def setting(self, position: float) -> Setting:
        return self.knob.setting(position, self.backbone.num_patches, len(self.sites))

    def policy(self, position: float) -> P:
        return self.build(self.setting(position))

    def game(self, policy: Policy) -> TokenGame:
        return TokenGame.for_policy(self.backbone, policy, sites=self.sites)

    def prepare(self, batches: Sequence[Tensor]) -> list[TokenState]:
        """Run once what lies before the first site."""
        game = self.game(self.policy(1.0))
        return [game.prepare(images) for images in batches]

    def macs(self, position: float, states: Sequence[TokenState]) -> Tensor:
        """MACs of each image, `[images]`."""
        policy = self.policy(position)
        game = self.game(policy)
        return torch.cat([play(game, policy, state).outcome.macs for state in states])


def _as_batches(data: ImageDataset | Batches) -> Batches:
    """Batches as they are; a data set in batches."""
    if not isinstance(data, Sequence) and hasattr(data, "__getitem__"):
        return batches_of(cast(ImageDataset, data), BATCH)
    return list(cast(Batches, data))
