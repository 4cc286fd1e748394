"""The threshold, or the equal counts, at which a trained policy meets its budget."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from math import inf
from numbers import Integral, Real
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from ...engine.tokens import TokenState
from ...errors import BudgetError
from ...game.rollout import play
from ...game.token_game import TokenGame
from ...policy import Policy

MIN_CALIBRATION_STEPS = 20
LOGIT_RANGE = 40.0  # thresholds beyond it keep or prune everything, unless training ran away
WIDEST = 1e6  # where they may then lie
FAR = 0.02  # share of the target by which a result is so far off that it is said

_log = logging.getLogger(__name__)


class HasThreshold(Policy, Protocol):
    """A policy whose cost a threshold controls: the higher, the cheaper."""

    def with_threshold(self, threshold: float) -> Any:
        """The same policy with another threshold, in logits."""
        ...


Adjustable = TypeVar("Adjustable", bound=HasThreshold)


def calibrate_threshold(
    game: TokenGame,
    policy: Adjustable,
    batches: Sequence[Tensor | TokenState],
    target_macs: float,
    steps: int = 24,
    tolerance: float = 1e-3,
) -> Adjustable:
    """The same policy with the threshold at which its greedy play costs the target, or a little less.

    A result that is more than 2 % below the target is logged as a warning.

    Bisection in logits, drawn together as `logit / (1 + |logit|)`: most thresholds lie near 0, where each step halves
    the range, but policies whose probabilities are near 0 and 1 need thresholds far out, and many steps.

    Args:
        game: what is played.
        policy: a policy with a method `with_threshold`.
        batches: training images (or prepared states) to measure on.
        target_macs: mean MACs per image, policy included.
        steps: most halvings of the range, at least 20.
        tolerance: how far below the target, relative to it, the search may stop early.

    Raises:
        ValueError: for no images, too few steps, or a target or tolerance that is no such number.
        BudgetError: if even pruning everything costs more.
    """
    if not batches:
        raise ValueError("batches: expected at least one batch of images, got none")
    for name, number in (("steps", steps), ("tolerance", tolerance), ("target_macs", target_macs)):
        if isinstance(number, bool) or not isinstance(number, Integral if name == "steps" else Real):
            raise TypeError(f"{name}: expected a number, got {number!r}")
    if steps < MIN_CALIBRATION_STEPS:
        raise ValueError(f"steps: expected at least {MIN_CALIBRATION_STEPS}, got {steps}")
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance: expected a share of the target from 0 to below 1, got {tolerance}")
    if not 0 < target_macs < inf:
        raise ValueError(f"target_macs: expected a finite number above 0, got {target_macs}")

    def at(threshold: float) -> tuple[Adjustable, float]:
        candidate = policy.with_threshold(threshold)
        macs = [play(game, candidate, batch).outcome.macs for batch in batches]
        return candidate, float(torch.cat(macs).mean())

    try:
        best, macs, at_an_end = _search(at, target_macs, LOGIT_RANGE, steps, tolerance)
    except BudgetError:
        best, macs, at_an_end = policy, 0.0, True
    if at_an_end and macs < (1 - tolerance) * target_macs:  # logits that are larger than training leaves them
        best, macs, _ = _search(at, target_macs, WIDEST, 2 * steps, tolerance)
    if macs < (1 - FAR) * target_macs:
        _log.warning(
            "calibration: no threshold comes closer to %.5g GMACs than %.5g from below; are the logits numbers, and do "
            "they vary?",
            target_macs / 1e9,
            macs / 1e9,
        )
    return best


class HasSchedule(HasThreshold, Protocol):
    """A policy that can also keep equally many tokens in every image."""

    def with_schedule(self, schedule: Sequence[float] | None) -> Any:
        """The same policy that keeps these shares of all tokens, `[T]`."""
        ...


def calibrate_counts(
    game: TokenGame, policy: HasSchedule, batches: Sequence[Tensor | TokenState], target_macs: float
) -> Any:
    """The same policy with equally many tokens in every image, at the target or a little less.

    At each site they are the share of all tokens that the policy keeps on average; all shares are then scaled together
    until the budget is met.

    Args:
        game: what is played.
        policy: one with a method `with_schedule`, at the budget already.
        batches: training images (or prepared states) to measure on.
        target_macs: MACs per image, policy included.

    Raises:
        BudgetError: if even one token at every site costs more.
        ValueError: for no images, or a policy that cannot follow a schedule.
    """
    kept = torch.cat([play(game, policy, batch).outcome.n_kept for batch in batches]).double().mean(dim=0)
    schedule = (kept / game.backbone.num_patches).tolist()
    first = batches[0]
    any_image = first[:1] if isinstance(first, Tensor) else first  # all images cost the same then
    return calibrate_threshold(game, policy.with_schedule(schedule), [any_image], target_macs)


def _search(
    at: Callable[[float], tuple[Adjustable, float]], target: float, largest: float, steps: int, tolerance: float
) -> tuple[Adjustable, float, bool]:
    """The dearest policy found that costs at most the target, its cost, and whether all tried were on one side of it.

    Raises:
        BudgetError: if the largest threshold costs more.
    """
    low, high = -largest / (1 + largest), largest / (1 + largest)
    ends = low, high
    best, macs = at(largest)
    if macs > target:
        raise BudgetError(
            f"target_macs: expected at least {macs / 1e9:.5g} GMACs, what is left when the policy prunes all it can, "
            f"got {target / 1e9:.5g}"
        )
    for _ in range(steps):
        middle = (low + high) / 2
        candidate, cost = at(middle / (1 - abs(middle)))
        if cost > target:
            low = middle
        else:
            high, best, macs = middle, candidate, cost
            if macs >= (1 - tolerance) * target:
                break
    return best, macs, low == ends[0] or high == ends[1]
