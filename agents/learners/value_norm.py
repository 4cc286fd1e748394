"""Running normalisation of returns (ValueNorm of Yu et al., 2022, "The surprising effectiveness of PPO")."""

from __future__ import annotations

import torch
from torch import Tensor, nn

MIN_VARIANCE = 1e-6


class ValueNorm(nn.Module):
    """Exponential mean and variance of the returns, with the start-up bias removed.

    The reference implementation clamps the variance at 1e-2, which leaves rewards as small as the bonus / n of RL4EViT
    almost unnormalised; here the floor is 1e-6.

    Args:
        decay: weight of the past at each update.
    """

    mean: Tensor
    square: Tensor
    weight: Tensor

    def __init__(self, decay: float = 0.99999) -> None:
        super().__init__()
        self.decay = decay
        for name in ("mean", "square", "weight"):
            self.register_buffer(name, torch.zeros(()))

    @torch.no_grad()
    def update(self, returns: Tensor) -> None:
        """Take in a batch of returns `[rows]`."""
        for total, batch in ((self.mean, returns.mean()), (self.square, returns.square().mean())):
            total.mul_(self.decay).add_(batch, alpha=1 - self.decay)
        self.weight.mul_(self.decay).add_(1 - self.decay)

    def _moments(self) -> tuple[Tensor, Tensor]:
        if self.weight == 0:
            return torch.zeros_like(self.mean), torch.ones_like(self.mean)
        mean = self.mean / self.weight
        return mean, (self.square / self.weight - mean.square()).clamp(min=MIN_VARIANCE).sqrt()

    def normalize(self, returns: Tensor) -> Tensor:
        """Returns to the critic's units, `[rows]`."""
        mean, deviation = self._moments()
        return (returns - mean) / deviation

    def denormalize(self, values: Tensor) -> Tensor:
        """The critic's values to units of return, `[rows]`."""
        mean, deviation = self._moments()
        return values * deviation + mean
