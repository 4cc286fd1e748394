"""The actor in the shape of a tianshou policy, which its algorithms and trainers hold."""

from __future__ import annotations

from typing import Any

from tianshou.algorithm.modelfree.reinforce import DiscreteActorPolicy
from torch import Tensor, nn

from ..networks import TokenActor


class ActorOnRows(nn.Module):
    """A `TokenActor` as tianshou calls actors: `(obs, state, info) -> (logits, state)`, `obs.token` `[rows, D]`."""

    def __init__(self, actor: TokenActor) -> None:
        super().__init__()
        self.actor = actor

    def forward(self, obs: Any, state: Any = None, info: Any = None) -> tuple[Tensor, Any]:
        """Logits `[rows, A]`."""
        return self.actor(obs.token), state


class TokenwisePolicy(DiscreteActorPolicy):
    """tianshou's policy without the compilation of numba kernels, which takes seconds and is not needed here."""

    @staticmethod
    def _compile() -> None:
        """Nothing to compile."""
