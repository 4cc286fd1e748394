"""LTMP (Bonnaerens & Dambre, 2023): merge tokens above a similarity, prune tokens below an importance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor

from ...deploy.policy_files import load_policy, save_policy
from ...errors import CheckpointError
from ...files import PathLike
from ...game.bipartite_matching import match_bipartite, merge_senders
from ...policy import BasePolicy
from ...types import Decision, Observation, Site, every_block
from ..argument_checks import check_number, per_site

Thresholds = float | Sequence[float] | Tensor | None


@dataclass
class LTMP(BasePolicy):
    """Merge tokens above a similarity threshold, then prune tokens at or below an importance threshold.

    The inference form of the authors' code. First every sender whose similarity to its best partner (see `Matching`)
    is strictly above the merge threshold merges into it; unlike in ToMe their number is not limited. Then the tokens
    stay whose importance is strictly above the prune threshold. The importance of a token is the attention that it
    received in this block, mean over heads and all queries, prefix tokens included; that of a merged token is the
    largest of its members. Prefix tokens always stay. With merge thresholds, later attention is proportional to size.
    A pruned token takes the patches that were merged into it along.

    The number of remaining tokens depends on the image. `fit_ltmp` trains the thresholds. `offset` is ours: one number
    that moves all thresholds together, so that a policy can be brought to any budget. The distance of each threshold
    from the value at which it has no effect (1 for merging, 0 for pruning) is multiplied by `10 ** offset`.

    Args:
        merge_thresholds: cosine similarity above which tokens merge, 0 to 1, the same at every site or one per site;
            None: nothing merges.
        prune_thresholds: importance up to which tokens are pruned, likewise; None: nothing is pruned.
        sites: where to act; None: inside every block, between attention and MLP.
        offset: 0: thresholds as given; above 0 fewer tokens stay, below 0 more.
    """

    merge_thresholds: Thresholds = None
    prune_thresholds: Thresholds = None
    sites: Sequence[int | str | Site] | None = None
    offset: float = 0.0

    def __post_init__(self) -> None:
        self.merge_thresholds = _check_thresholds("merge_thresholds", self.merge_thresholds)
        self.prune_thresholds = _check_thresholds("prune_thresholds", self.prune_thresholds)
        if self.merge_thresholds is None and self.prune_thresholds is None:
            raise ValueError("merge_thresholds, prune_thresholds: expected at least one of them, got None for both")
        check_number("offset", self.offset)
        self.sites = None if self.sites is None else tuple(str(Site.parse(site)) for site in self.sites)
        evidence = {"keys": self.merge_thresholds, "mean_attention": self.prune_thresholds}
        self.needs = frozenset(name for name, thresholds in evidence.items() if thresholds is not None)
        self.attention_bias: Literal["log_size"] | None = None if self.merge_thresholds is None else "log_size"

    def default_sites(self, depth: int) -> Sequence[int | str | Site] | None:
        """The given sites, or inside every block."""
        return every_block(depth) if self.sites is None else self.sites

    def decide(self, obs: Observation) -> Decision:
        """Merge and prune by the thresholds of this site."""
        alone = torch.arange(obs.num_agents, device=obs.alive.device).expand(obs.alive.shape)
        if self.merge_thresholds is None:
            return Decision(self._important(obs, alone))
        matching = match_bipartite(obs)
        merges = matching.score > self._moved_merge(per_site("merge_thresholds", self.merge_thresholds, obs))
        merge_into, weight, order = merge_senders(obs, matching, merges)
        keep = self._important(obs, torch.where(merges, merge_into, alone)) & ~merges
        return Decision(keep, merge_into, weight, order, matching.macs)

    def _important(self, obs: Observation, into: Tensor) -> Tensor:
        """Alive tokens `[B, N]` whose group is important enough; tokens with equal `into` `[B, N]` form a group."""
        if self.prune_thresholds is None:
            return obs.alive
        importance = obs.scatter(obs.evidence["mean_attention"])
        importance = importance.scatter_reduce(1, into, importance, "amax")
        threshold = self._moved_prune(per_site("prune_thresholds", self.prune_thresholds, obs))
        return (importance > threshold) & obs.alive

    def _moved_merge(self, threshold: float) -> float:
        return max(0.0, 1 - (1 - threshold) * 10.0**self.offset)

    def _moved_prune(self, threshold: float) -> float:
        return min(1.0, threshold * 10.0**self.offset)

    def thresholds(self, num_sites: int) -> dict[str, list[float]]:
        """The thresholds that decide at each site, moved by `offset`, by what is compared with them.

        Args:
            num_sites: T, sites at which the policy acts.
        """
        found = {}
        if self.merge_thresholds is not None:
            values = _at_every_site(self.merge_thresholds, num_sites)
            found["similarity (merged above)"] = [self._moved_merge(value) for value in values]
        if self.prune_thresholds is not None:
            values = _at_every_site(self.prune_thresholds, num_sites)
            found["importance (pruned up to)"] = [self._moved_prune(value) for value in values]
        return found

    def at(self, offset: float) -> Self:
        """The same policy with its thresholds moved by `offset` more, to meet a budget."""
        return replace(self, offset=self.offset + offset)

    def save(self, path: PathLike) -> Path:
        """Write the thresholds to a file: `save_policy(self, path)`."""
        return save_policy(self, path)

    @classmethod
    def load(cls, path: PathLike) -> Self:
        """Read what `save` wrote.

        Raises:
            CheckpointError: if the file is missing, damaged, or something else.
        """
        policy = load_policy(path)
        if not isinstance(policy, cls):
            raise CheckpointError(f"{path}: expected a file of {cls.__name__}, got one of {type(policy).__name__}")
        return policy


def _at_every_site(value: Any, num_sites: int) -> Sequence[float]:
    """Checked thresholds as one number for each site."""
    return value if isinstance(value, tuple) else (value,) * num_sites


def _check_thresholds(name: str, value: Any) -> float | tuple[float, ...] | None:
    """Thresholds as a number or a tuple of them.

    Raises:
        TypeError: if they are something else.
        ValueError: if one of them is not from 0 to 1.
    """
    if value is None:
        return None
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, bool) or value in ([], ()):
        raise TypeError(f"{name}: expected None, a number, or one per site, got {value!r}")
    try:
        numbers = tuple(map(float, value)) if isinstance(value, Sequence) else float(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}: expected None, a number, or one per site, got {value!r}") from error
    for number in numbers if isinstance(numbers, tuple) else (numbers,):
        if not 0 <= number <= 1:
            raise ValueError(f"{name}: expected 0 to 1, got {value!r}")
    return numbers
