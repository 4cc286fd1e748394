"""The threshold at which a trained policy meets its budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from ...engine.tokens import TokenState
from ...errors import BudgetError
from ...game.rollout import play
from ...game.token_game import TokenGame
from ...policy import Policy

MIN_CALIBRATION_STEPS = 20
LOGIT_RANGE = 40.0  # thresholds beyond it keep or prune everything


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
        ValueError: for no images or too few steps.
        BudgetError: if even pruning everything costs more.
    """
    if not batches:
        raise ValueError("batches: expected at least one batch of images, got none")
    if steps < MIN_CALIBRATION_STEPS:
        raise ValueError(f"steps: expected at least {MIN_CALIBRATION_STEPS}, got {steps}")

    def at(threshold: float) -> tuple[Adjustable, float]:
        candidate = policy.with_threshold(threshold)
        macs = [play(game, candidate, batch).outcome.macs for batch in batches]
        return candidate, float(torch.cat(macs).mean())

    low, high = -LOGIT_RANGE / (1 + LOGIT_RANGE), LOGIT_RANGE / (1 + LOGIT_RANGE)
    best, least = at(LOGIT_RANGE)
    if least > target_macs:
        raise BudgetError(
            f"target_macs: expected at least {least / 1e9:.5g} GMACs, what is left when the policy prunes all it can, "
            f"got {target_macs / 1e9:.5g}"
        )
    for _ in range(steps):
        middle = (low + high) / 2
        candidate, macs = at(middle / (1 - abs(middle)))
        if macs > target_macs:
            low = middle
        else:
            high, best = middle, candidate
            if macs >= (1 - tolerance) * target_macs:
                break
    return best
