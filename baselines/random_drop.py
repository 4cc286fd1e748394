"""RandomDrop: keep a random share of the tokens, the control that every method has to beat."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil

import torch

from ..policy import check_keep_rate, keep_top
from ..types import Decision, Observation
from .argument_checks import whole_number
from .ways_out import Leave, Selection, check_leave


@dataclass
class RandomDrop(Selection):
    """Keep `ceil(keep_rate * n)` of the n alive tokens, drawn uniformly.

    Args:
        keep_rate: fraction kept at every site, above 0 and at most 1.
        seed: of its own random generator.
        leave: way out of the others: "drop", "merge" (into the kept token most like it) or "fuse" (all into one).
    """

    keep_rate: float
    seed: int = 0
    leave: Leave = "drop"
    generator: torch.Generator = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_keep_rate(self.keep_rate)
        check_leave(self.leave)
        self.seed = whole_number("seed", self.seed)
        self.generator = torch.Generator().manual_seed(self.seed)

    def decide(self, obs: Observation) -> Decision:
        """Draw the tokens that stay."""
        scores = torch.rand(len(obs.image), generator=self.generator).to(obs.tokens.device)
        count = (obs.num_alive.double() * self.keep_rate).ceil()
        known = None if obs.count is None else ceil(obs.count * self.keep_rate)
        return self.decided(obs, keep_top(obs, scores, count), known)
