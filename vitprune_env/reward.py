"""What the agents are paid. A reward is an object handed to the game.

Each reward has an immediate part, known when the agents have decided, and a deferred part, known when the image has
been classified. `[T, B, N]` tables hold one entry per step, image and token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from vitprune_env.types import Step

OutcomeFn = Callable[[Tensor, Tensor], Tensor]


def correct(logits: Tensor, labels: Tensor) -> Tensor:
    """gamma of paper 000: 1 if the image is classified correctly, else 0; `[B]` float."""
    return (logits.argmax(dim=1) == labels).to(logits)


def log_probability(logits: Tensor, labels: Tensor, floor: float = -2.0) -> Tensor:
    """Log-probability of the true class, clamped below and shifted to end at 1; `[B]` float."""
    true = logits.log_softmax(dim=1).gather(1, labels[:, None]).squeeze(1)
    return 1.0 + true.clamp(min=floor)


class RewardFn(Protocol):
    """A reward for the game of token pruning."""

    def score(self, logits: Tensor, labels: Tensor) -> Tensor:
        """How well an image came out, `[B]`."""
        ...

    def immediate(self, step: Step) -> Tensor:
        """The part known right after a decision, `[B, N]`."""
        ...

    def deferred(self, steps: Sequence[Step], score: Tensor) -> Tensor:
        """The part that depends on the outcome `score` `[B]`, for all steps played so far, `[T, B, N]`."""
        ...


@dataclass(frozen=True)
class PaperReward:
    """RL4EViT (paper 000, Eq. 1 and 2), scaled by the number of agents.

    Agent i that is kept at site l earns `-keep_cost + outcome_bonus * gamma * N / n_l`, a pruned one earns 0; gamma is
    1 if the image is classified correctly and n_l is the number of tokens kept at that site. The printed form has
    `gamma / n_l`, with weights alpha for the first and beta for the second part; its printed ratios only make sense
    with the N. A token is worth keeping iff `outcome_bonus * gamma * N / n > keep_cost`, so play settles where the
    kept fraction is `gamma * outcome_bonus / keep_cost` (the paper's sentence on alpha/beta has the two swapped).
    """

    keep_cost: float = 1.0  # alpha as printed
    outcome_bonus: float = 0.5  # beta as printed
    outcome: OutcomeFn = correct

    def score(self, logits: Tensor, labels: Tensor) -> Tensor:
        """gamma, `[B]`."""
        return self.outcome(logits, labels)

    def immediate(self, step: Step) -> Tensor:
        """`keep_cost * r1`: -1 for a kept token, `[B, N]`; who waits costs nothing."""
        return -self.keep_cost * step.carried.float()

    def deferred(self, steps: Sequence[Step], score: Tensor) -> Tensor:
        """`outcome_bonus * r2`: gamma * N / n_l for each kept token, `[T, B, N]`."""
        kept = torch.stack([step.carried for step in steps]).to(score)
        per_token = score[:, None] * kept.shape[2] / kept.sum(dim=2, keepdim=True).clamp(min=1)
        return self.outcome_bonus * kept * per_token


@dataclass(frozen=True)
class SharedOutcome:
    """Everybody is paid the image's outcome once; a kept token pays for the blocks it buys.

    The outcome reaches an agent at the last step in which it acted, pruned ones included. A kept token is charged
    `price` times the share of the network between this site and the next one, so `price` is what it costs to carry
    one token through the whole network, in units of the outcome. A budget is met by moving the price.
    """

    price: float = 0.035
    outcome: OutcomeFn = correct

    def score(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The outcome, `[B]`."""
        return self.outcome(logits, labels)

    def immediate(self, step: Step) -> Tensor:
        """The price of the blocks up to the next site, for kept tokens, `[B, N]`."""
        return -self.price * step.share * step.carried.float()

    def deferred(self, steps: Sequence[Step], score: Tensor) -> Tensor:
        """The outcome in the last step that each agent acted in, `[T, B, N]`."""
        last = [step.acted & ~step.kept for step in steps[:-1]] + [steps[-1].acted]
        return torch.stack(last).to(score) * score[None, :, None]
