"""What one agent that decides for all tokens of an image is paid: the sum over the tokens of such a reward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from vitprune_env.game.rewards import SharedOutcome
from vitprune_env.types import Step


@dataclass(frozen=True)
class TeamOutcome(SharedOutcome):
    """`SharedOutcome` for a team: summed over all tokens, the outcome once and the price of every token kept.

    The return of an image is `outcome - price * (sum over tokens of the share of the network each was carried
    through)`. The agents of `SharedOutcome` follow the gradient of the same objective: each is paid the whole outcome
    and charged only for itself, and what one agent's action costs is charged to nobody else. So equal prices mean
    equal objectives, and the two differ in who is credited with what.

    The outcome is known, and paid, in the last step; it is split evenly over all N tokens, pruned ones included.
    """

    def deferred(self, steps: Sequence[Step], score: Tensor) -> Tensor:
        """An equal share of the outcome for every token in the last step, `[T, B, N]`."""
        batch, agents = steps[-1].acted.shape
        table = score.new_zeros(len(steps), batch, agents)
        table[-1] = score[:, None] / agents
        return table
