"""The one parameter of a method that its budget is set with."""

from __future__ import annotations

from dataclasses import dataclass
from math import floor
from typing import Literal

Setting = float | int | tuple[int, ...]


@dataclass(frozen=True)
class Knob:
    """A parameter whose turning makes a method prune more or less, and the range in which to turn it.

    Kinds: `"real"` and `"integer"` are single numbers; a `"schedule"` is one whole number per site, of which the mean
    is turned: where a single whole number jumps from one budget to another far away (ToMe's r acts in every block),
    r = 3.4 merges 3 tokens at some sites and 4 at others.

    Args:
        name: of the parameter.
        low: smallest value.
        high: largest value; None: the number of patch tokens.
        rising: whether larger values cost more.
        kind: what the method takes.
    """

    name: str = "keep_rate"
    low: float = 1e-6
    high: float | None = 1.0
    rising: bool = True
    kind: Literal["real", "integer", "schedule"] = "real"

    def setting(self, position: float, num_tokens: int, num_sites: int) -> Setting:
        """The value at a position from 0 (cheapest) to 1 (dearest).

        Args:
            position: how far the knob is turned.
            num_tokens: patch tokens of the network.
            num_sites: sites at which the method acts.
        """
        high = float(num_tokens) if self.high is None else self.high
        share = position if self.rising else 1 - position
        value = self.low + share * (high - self.low)
        if self.kind == "schedule":
            return spread(value, num_sites)
        return round(value) if self.kind == "integer" else value


def spread(mean: float, count: int) -> tuple[int, ...]:
    """Whole numbers, each the floor or the ceiling of `mean`, that sum to `floor(count * mean)`, evenly mixed."""
    return tuple(floor((index + 1) * mean) - floor(index * mean) for index in range(count))
