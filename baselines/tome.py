"""ToMe (Bolya et al., 2023): merge the most similar pairs of tokens, a fixed number in every block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..game.bipartite_matching import match_bipartite, merge_senders
from ..policy import BasePolicy, check_keep_rate
from ..types import Decision, Observation, Site, every_block
from .argument_checks import check_flag, check_range, per_site, whole_numbers


@dataclass
class ToMe(BasePolicy):
    """Merge the r most similar pairs of tokens in every block.

    Section 3 of the paper: the tokens alternate between senders and receivers (see `Matching`), each sender is matched
    with the receiver whose key (mean over heads) has the largest cosine similarity to its own, and the r most similar
    pairs merge into means weighted by size. At most half of the current tokens merge, however large r is. Of pairs that
    are exactly equally similar the one whose sender has the lower patch number merges; the authors' code leaves that
    open.

    The order of the tokens decides who sends and who receives in the next block. The senders that are left come first,
    then the receivers in their old order. With a class token the senders that are left keep their old order, too;
    without one they are ordered by their similarity, the most similar one first, as in the authors' code. Any other
    prefix token (a register) counts as a class token here; the authors' code has none.

    Args:
        r: pairs to merge, the same at every site or one number per site.
        proportional_attention: whether a merged token counts as often as its size in later attention (section 3.3);
            the authors switch it off for models pretrained by masked autoencoding (MAE).
        inflect: slope of the schedule of a single r, -1 to 1. r changes linearly from `r * (1 - inflect)` at the first
            site to `r * (1 + inflect)` at the last, each rounded down; 0 is constant, -1 falls to 0.
    """

    r: int | Sequence[int]
    proportional_attention: bool = True
    inflect: float = 0.0
    needs = frozenset({"keys"})

    def __post_init__(self) -> None:
        self.r = whole_numbers("r", self.r)
        check_flag("proportional_attention", self.proportional_attention)
        check_range("inflect", self.inflect, -1, 1)
        if self.inflect and isinstance(self.r, tuple):
            raise ValueError(f"inflect: expected 0 with one r per site, got {self.inflect!r}")
        self.attention_bias: Literal["log_size"] | None = "log_size" if self.proportional_attention else None

    def default_sites(self, depth: int) -> Sequence[int | str | Site] | None:
        """Inside every block, between attention and MLP."""
        return every_block(depth)

    def decide(self, obs: Observation) -> Decision:
        """Merge the best pairs."""
        wanted = self._wanted(obs)
        if not wanted:
            return Decision(keep=obs.alive, count=obs.count)
        return merge_best_pairs(obs, torch.full_like(obs.num_alive, wanted), wanted)

    def _wanted(self, obs: Observation) -> int:
        """Pairs to merge here."""
        if isinstance(self.r, int):
            first = int(self.r * (1 - self.inflect))
            slope = 2 * (self.r - first) / max(1, obs.num_steps - 1)
            return int(first + slope * obs.step)
        return int(per_site("r", self.r, obs))


@dataclass
class ToMeShare(BasePolicy):
    """ToMe whose schedule follows the tokens: the same share of those that are left stays in every block.

    With a number r that is the same everywhere, most of the budget is saved late, and a tight budget leaves next to no
    tokens at the end. A share saves early and leaves more for the end. It is the schedule that a learnt one has to
    beat.

    Args:
        keep_rate: share of the current tokens that stays at every site, above 0 and at most 1, to the nearest number;
            at least half of them stay.
        proportional_attention: see `ToMe`.
    """

    keep_rate: float
    proportional_attention: bool = True
    needs = frozenset({"keys"})

    def __post_init__(self) -> None:
        check_keep_rate(self.keep_rate)
        check_flag("proportional_attention", self.proportional_attention)
        self.attention_bias: Literal["log_size"] | None = "log_size" if self.proportional_attention else None

    def default_sites(self, depth: int) -> Sequence[int | str | Site] | None:
        """Inside every block, between attention and MLP."""
        return every_block(depth)

    def decide(self, obs: Observation) -> Decision:
        """Merge the best pairs."""
        wanted = obs.num_alive - (obs.num_alive * self.keep_rate).round().long()
        return merge_best_pairs(
            obs, wanted, None if obs.count is None else obs.count - round(obs.count * self.keep_rate)
        )


def merge_best_pairs(obs: Observation, wanted: Tensor, same: int | None) -> Decision:
    """Merge the most similar pairs of every image, at most half of its tokens.

    Args:
        obs: what was seen.
        wanted: `[B]` int64, pairs to merge.
        same: their number where it is the same in all images; None: it need not be.
    """
    matching = match_bipartite(obs)
    ranks = matching.score.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    merges = (ranks < torch.minimum(obs.num_alive // 2, wanted)[:, None]) & matching.sends
    merge_into, weight, order = merge_senders(obs, matching, merges)
    if not obs.num_prefix:
        order = torch.where(matching.sends, ranks, order)
    count = None if obs.count is None or same is None else obs.count - min(same, obs.count // 2)
    return Decision(obs.alive & ~merges, merge_into, weight, order, matching.macs, count)
