"""The seam between the game and whoever plays it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from vitprune_env.types import Decision, Observation, Site


@runtime_checkable
class Policy(Protocol):
    """Decides at every site which tokens stay.

    Attributes:
        needs: evidence to compute for it, by name (see `engine.evidence`); empty for none.
        attention_bias: `"log_size"` for proportional attention (a merged token counts as often as its size).
    """

    @property
    def needs(self) -> frozenset[str]:
        """Evidence to compute for it."""
        ...

    @property
    def attention_bias(self) -> Literal["log_size"] | None:
        """What to add to the attention logits."""
        ...

    def default_sites(self, depth: int) -> Sequence[int | str | Site] | None:
        """Sites where it is meant to act in a network of `depth` blocks; None: the backbone's own."""
        ...

    def reset(self, batch_size: int, num_agents: int) -> None:
        """A new batch of games begins."""
        ...

    def decide(self, obs: Observation) -> Decision:
        """Decide for all alive tokens of all images at once."""
        ...


class BasePolicy:
    """Defaults of a policy without evidence, state or sites of its own; override `decide`."""

    needs: frozenset[str] = frozenset()
    attention_bias: Literal["log_size"] | None = None

    def default_sites(self, depth: int) -> Sequence[int | str | Site] | None:
        """The backbone's own sites."""
        return None

    def reset(self, batch_size: int, num_agents: int) -> None:
        """Nothing to forget."""

    def decide(self, obs: Observation) -> Decision:
        """Decide for all alive tokens of all images at once."""
        raise TypeError(f"{type(self).__name__} does not say how to decide")


class KeepAll(BasePolicy):
    """Prunes nothing: the dense model, played as a game."""

    def decide(self, obs: Observation) -> Decision:
        """Keep every alive token."""
        return Decision(keep=obs.alive, count=obs.count)


def keep_top(obs: Observation, scores: Tensor, count: Tensor) -> Tensor:
    """Keep the best-scored alive tokens of each image.

    Args:
        obs: the observation that the scores belong to.
        scores: `[sum n_i]`, one per alive token; ties go to the lower patch number.
        count: `[B]`, how many to keep.

    Returns:
        `[B, N]` bool.
    """
    # Dead tokens must come last, also after an alive one with a score of -inf.
    table = obs.scatter(scores.clamp(min=torch.finfo(scores.dtype).min), fill=float("-inf"))
    ranks = table.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return (ranks < count[:, None]) & obs.alive


def check_keep_rate(keep_rate: float) -> None:
    """Refuse a keep rate outside (0, 1].

    Raises:
        ValueError: naming the argument.
        TypeError: likewise, for what is no number.
    """
    message = f"keep_rate: expected a number above 0 and at most 1, got {keep_rate!r}"
    if isinstance(keep_rate, bool) or not isinstance(keep_rate, int | float):
        raise TypeError(message)
    if not 0 < keep_rate <= 1:
        raise ValueError(message)
