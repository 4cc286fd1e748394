"""The two losses of PPO (RL4EViT, Eq. 3 and 4)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def policy_loss(ratio: Tensor, advantage: Tensor, clip: float, dual_clip: float | None = None) -> Tensor:
    """Clipped policy objective of RL4EViT, Eq. 3, as a loss: its negative mean over agent-steps.

    Args:
        ratio: `[rows]`, probability of each action now over what it was when drawn.
        advantage: `[rows]`.
        clip: epsilon of Eq. 3.
        dual_clip: bound, above 1, on how far a negative advantage may push (Ye et al., 2020); None: no bound.
    """
    gain = torch.min(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    if dual_clip is not None:
        gain = torch.where(advantage < 0, torch.max(gain, dual_clip * advantage), gain)
    return -gain.mean()


def value_loss(
    value: Tensor, old: Tensor, target: Tensor, clip: float | None, huber_delta: float | None = None
) -> Tensor:
    """Clipped value loss of RL4EViT, Eq. 4, mean over agent-steps.

    Clipped is the new value, to within `clip` of the old one; as printed, Eq. 4 clips the old value around itself,
    which would do nothing.

    Args:
        value: `[rows]`, the critic's values now.
        old: `[rows]`, its values before the update.
        target: `[rows]`, returns.
        clip: epsilon of Eq. 4; None: no clipping.
        huber_delta: error above which the loss grows linearly; None: squared error.
    """

    def error(prediction: Tensor) -> Tensor:
        if huber_delta is None:
            return (target - prediction).square()
        return 2 * F.huber_loss(prediction, target, reduction="none", delta=huber_delta)

    if clip is None:
        return error(value).mean()
    return torch.max(error(value), error(old + (value - old).clamp(-clip, clip))).mean()


def normalized(advantage: Tensor, eps: float) -> Tensor:
    """Advantages `[rows]` of a whole minibatch, shifted and scaled to mean 0 and deviation 1."""
    return (advantage - advantage.mean()) / (advantage.std() + eps)
