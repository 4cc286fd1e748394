"""Stand-in until the actions of the environments land: the same words as there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from vitprune_env.types import Decision, Observation


class ActionDistribution(Protocol):
    def sample(self, noise: Tensor) -> Tensor: ...
    def log_prob(self, actions: Tensor) -> Tensor: ...
    def entropy(self) -> Tensor: ...
    def mode(self) -> Tensor: ...


class ActionKind(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def meaning(self) -> str: ...
    def count(self, num_agents: int) -> int: ...
    def joint_space(self, num_agents: int, *batch: int) -> Any: ...
    def mask(self, alive: Tensor) -> Tensor | None: ...
    def decision(self, actions: Tensor, obs: Observation) -> Decision: ...
    def encode(self, decision: Decision, obs: Observation) -> Tensor: ...
    def distribution(self, logits: Tensor, mask: Tensor | None = None) -> ActionDistribution: ...


@dataclass(frozen=True)
class KeepDistribution:
    logit: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        return (noise < self.logit.sigmoid()).long()

    def log_prob(self, actions: Tensor) -> Tensor:
        return F.logsigmoid(torch.where(actions.bool(), self.logit, -self.logit))

    def entropy(self) -> Tensor:
        return F.softplus(self.logit) - self.logit * self.logit.sigmoid()

    def mode(self) -> Tensor:
        return (self.logit > 0).long()


@dataclass(frozen=True)
class KeepActions:
    name: str = "keep"
    meaning: str = "0 (prune) or 1 (keep)"

    def count(self, num_agents: int) -> int:
        return 2

    def joint_space(self, num_agents: int, *batch: int) -> Any:
        return None

    def mask(self, alive: Tensor) -> None:
        return None

    def decision(self, actions: Tensor, obs: Observation) -> Decision:
        return Decision(keep=actions.bool() & obs.alive)

    def encode(self, decision: Decision, obs: Observation) -> Tensor:
        return decision.keep.long()

    def distribution(self, logits: Tensor, mask: Tensor | None = None) -> KeepDistribution:
        return KeepDistribution((logits[:, 1] - logits[:, 0]).float())
