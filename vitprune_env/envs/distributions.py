"""Distributions over the actions of a token, one row per token; pure functions of the logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class ActionDistribution(Protocol):
    """A distribution over the actions 0 to A - 1 in each row; log-probabilities and entropies carry gradients."""

    def sample(self, noise: Tensor) -> Tensor:
        """Draw one action per row.

        Args:
            noise: `[rows]` float, uniform in [0, 1).

        Returns:
            `[rows]` int64; the same noise gives the same actions.
        """
        ...

    def log_prob(self, actions: Tensor) -> Tensor:
        """Log-probability of the actions `[rows]` int64, `[rows]`."""
        ...

    def entropy(self) -> Tensor:
        """Entropy in nats, `[rows]`."""
        ...

    def mode(self) -> Tensor:
        """The most probable action, `[rows]` int64; the lowest one where several are equally probable."""
        ...


@dataclass(frozen=True, eq=False)
class Bernoulli:
    """Two actions; action 1 has the log-odds `logit`."""

    logit: Tensor  # [rows]

    def sample(self, noise: Tensor) -> Tensor:
        """1 where the noise is below the probability of 1."""
        return (noise < self.logit.sigmoid()).long()

    def log_prob(self, actions: Tensor) -> Tensor:
        """Log-probability of the actions `[rows]` int64 (or bool), `[rows]`."""
        return F.logsigmoid(torch.where(actions.bool(), self.logit, -self.logit))

    def entropy(self) -> Tensor:
        """Entropy in nats, `[rows]`."""
        return F.softplus(self.logit) - self.logit * self.logit.sigmoid()

    def mode(self) -> Tensor:
        """1 where it is more probable than 0."""
        return (self.logit > 0).long()


class Categorical:
    """Any number of actions, some of which a mask may exclude.

    Args:
        logits: `[rows, A]`, unnormalised log-probabilities.
        mask: `[rows, A]` bool, True for the actions that are allowed, at least one per row; None: all of them.
    """

    def __init__(self, logits: Tensor, mask: Tensor | None = None) -> None:
        self.mask = torch.ones_like(logits, dtype=torch.bool) if mask is None else mask
        self.log_probs = logits.masked_fill(~self.mask, float("-inf")).log_softmax(dim=1)  # [rows, A]

    def sample(self, noise: Tensor) -> Tensor:
        """The first allowed action at which the cumulative probability exceeds the noise (inverse CDF)."""
        cumulative = torch.where(self.mask, self.log_probs.detach().exp().cumsum(dim=1), -1.0)
        # The last sum may be rounded to less than 1. Divided by itself it is exactly 1, which exceeds any noise.
        exceeds = cumulative / cumulative.amax(dim=1, keepdim=True) > noise[:, None]
        return exceeds.int().argmax(dim=1)

    def log_prob(self, actions: Tensor) -> Tensor:
        """Log-probability of the actions `[rows]` int64, `[rows]`; -inf for excluded ones."""
        return self.log_probs.gather(1, actions[:, None]).squeeze(1)

    def entropy(self) -> Tensor:
        """Entropy in nats, `[rows]`."""
        # Excluded actions have probability 0 and log-probability -inf, whose product would be NaN.
        return -(self.log_probs.exp() * self.log_probs.masked_fill(~self.mask, 0.0)).sum(dim=1)

    def mode(self) -> Tensor:
        """The most probable action, `[rows]` int64."""
        return self.log_probs.argmax(dim=1)
