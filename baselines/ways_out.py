"""What becomes of tokens that a method does not keep, as a parameter of the methods that choose tokens one by one."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import replace
from typing import Any, Literal, Self

from torch import Tensor

from ..game.leaving import NEEDS, fuse_leavers, merge_leavers
from ..policy import BasePolicy
from ..types import Decision, Observation

Leave = Literal["drop", "merge", "fuse"]
WAYS_OUT: dict[str, Callable[[Observation, Tensor], Decision]] = {
    "drop": lambda _, keep: Decision(keep),
    "merge": merge_leavers,
    "fuse": fuse_leavers,
}


def check_leave(leave: str) -> None:
    """Refuse a way out that there is not.

    Raises:
        ValueError: naming the argument.
    """
    if leave not in WAYS_OUT:
        raise ValueError(f"leave: expected one of {', '.join(WAYS_OUT)}, got {leave!r}")


class Selection(BasePolicy):
    """A policy that chooses the tokens that stay; all others leave in one way.

    With `leave="drop"` they are gone. With "merge" each becomes part of the kept token most like it, with "fuse" all of
    an image become one token; these are the ways out that agents can learn to use (`envs.exits`), with the same MACs
    and the same proportional attention.

    Attributes:
        sees: evidence that the choice is made by.
        leave: the way out.
    """

    sees: frozenset[str] = frozenset()
    leave: Leave = "drop"

    @property
    def needs(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Evidence that choice and way out are made by."""
        return self.sees | NEEDS if self.leave == "merge" else self.sees

    @property
    def attention_bias(self) -> Literal["log_size"] | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """A token that others became part of counts as often as its patches."""
        return None if self.leave == "drop" else "log_size"

    def leaving(self, leave: Leave) -> Self:
        """The same choice with another way out; parameters and weights are shared."""
        check_leave(leave)
        other: Any = copy(self)
        other.leave = leave
        return other

    def decided(self, obs: Observation, keep: Tensor, count: int | None = None, macs: Tensor | None = None) -> Decision:
        """The decision: tokens that stay, and where the others go.

        Args:
            obs: what was seen.
            keep: `[B, N]` bool, tokens that stay.
            count: how many stay in every image, where that is known beforehand.
            macs: `[B]`, what the choice cost.
        """
        decision = WAYS_OUT[self.leave](obs, keep)
        if count is not None and obs.count is not None and self.leave == "fuse":
            count = min(count + 1, obs.count)  # the fused token goes on
        spent = decision.macs if macs is None else macs if decision.macs is None else macs + decision.macs
        return replace(decision, count=count, macs=spent)
