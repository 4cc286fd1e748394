"""Give a method the budget that it is to be compared at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isfinite
from typing import Any, Generic, TypeVar, cast

from torch import Tensor

from ..backbone import Backbone
from ..data import ImageDataset, batches_of
from ..errors import BudgetError
from ..game import TokenGame
from ..policy import Policy
from ..rollout import evaluate
from ..tokens import TokenState
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
        data: labelled images to measure the cost on, a data set or a list of batches; not the ones that accuracies
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
    """
    if isinstance(target_gmacs, bool) or not isinstance(target_gmacs, int | float) or not isfinite(target_gmacs):
        raise BudgetError(f"target_gmacs: expected a finite number of GMACs, got {target_gmacs!r}")
    build, turned = _builder(policy_factory, knob, parameters)
    dial = _Dial(build, turned, backbone, sites)
    batches = dial.prepare(_as_batches(data))
    low, high = 0.0, 1.0
    cheapest, dearest = dial.cost(low, batches), dial.cost(high, batches)
    if not cheapest <= target_gmacs <= dearest:
        raise BudgetError(
            f"target_gmacs: {type(dial.policy(high)).__name__} reaches {cheapest:.5g} to {dearest:.5g} GMACs here, "
            f"got {target_gmacs:.5g}"
        )
    for _ in range(steps):
        if dearest <= (1 + tolerance) * target_gmacs or dial.setting(low) == dial.setting(high):
            break
        middle = (low + high) / 2
        spent = dial.cost(middle, batches)
        if spent < target_gmacs:
            low = middle
        else:
            high, dearest = middle, spent
    return dial.policy(high)


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

    def prepare(self, batches: Batches) -> list[tuple[TokenState, Tensor]]:
        """Run once what lies before the first site."""
        game = self.game(self.policy(1.0))
        return [(game.prepare(images), labels) for images, labels in batches]

    def cost(self, position: float, batches: list[tuple[TokenState, Tensor]]) -> float:
        policy = self.policy(position)
        return evaluate(self.game(policy), policy, batches).gmacs


def _as_batches(data: ImageDataset | Batches) -> Batches:
    """Batches as they are; a data set in batches."""
    if not isinstance(data, Sequence) and hasattr(data, "__getitem__"):
        return batches_of(cast(ImageDataset, data), BATCH)
    return list(cast(Batches, data))
