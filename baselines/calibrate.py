"""Give a method the budget that it is to be compared at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import Tensor

from ..backbone import Backbone
from ..errors import BudgetError
from ..game import TokenGame
from ..policy import Policy
from ..rollout import evaluate
from ..types import Site

P = TypeVar("P", bound=Policy)


def calibrate(
    make: Callable[[float], P],
    target_gmacs: float,
    backbone: Backbone,
    batches: Sequence[tuple[Tensor, Tensor]],
    sites: Sequence[int | str | Site] | None = None,
    steps: int = 16,
) -> P:
    """Find the keep rate at which a method costs what was asked, by bisection.

    Counts of tokens are whole numbers, so a method meets a budget in steps; the smallest setting that does not spend
    less than the budget is taken, lest a comparison favour whoever is compared with it.

    Args:
        make: builds the policy from its keep rate, above 0 and at most 1.
        target_gmacs: mean GMACs per image, policy and evidence included.
        backbone: the network.
        batches: labelled images to measure the cost on; not the ones that accuracies are reported for.
        sites: where to prune; None: where the policy wants to.
        steps: bisection steps.

    Returns:
        The policy, freshly made.

    Raises:
        BudgetError: if even a keep rate next to 0 costs more, or a keep rate of 1 costs less.
    """

    def cost(rate: float) -> float:
        policy = make(rate)
        where = {} if sites is None else {"sites": sites}
        return evaluate(TokenGame.for_policy(backbone, policy, **where), policy, batches).gmacs

    low, high = 1e-6, 1.0
    cheapest, dearest = cost(low), cost(high)
    if not cheapest <= target_gmacs <= dearest:
        raise BudgetError(
            f"target_gmacs: {type(make(high)).__name__} reaches {cheapest:.5g} to {dearest:.5g} GMACs here, "
            f"got {target_gmacs:.5g}"
        )
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) < target_gmacs else (low, middle)
    return make(high)
