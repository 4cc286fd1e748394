"""Action kinds in which leaving is more than being dropped: agents merge, or are fused, or choose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vitprune_env.envs.actions import ActionKind, destinations, register_actions
from vitprune_env.envs.distributions import ActionDistribution, Bernoulli, Categorical
from vitprune_env.game.leaving import NEEDS, fuse_leavers, merge_leavers
from vitprune_env.types import Decision, Observation


class ExitActions(ActionKind):
    """Actions of which the last one is to stay; the others are ways out."""

    attention_bias: Literal["log_size"] | None = "log_size"  # a merged token counts as often as its patches

    def encode(self, decision: Decision, obs: Observation) -> Tensor:
        """The actions that amount to a decision.

        Raises:
            ValueError: for tokens that merge into others than these actions lead to, or a decision that does more.
        """
        where = destinations(decision, obs)
        actions = self._encoded(where, obs)
        made = destinations(self.decision(actions, obs), obs)
        if (differs := made != where).any():
            raise ValueError(f"with {self.meaning(obs.num_agents)}, {int(differs.sum())} tokens would end up elsewhere")
        extra = [name for name in ("park", "features") if getattr(decision, name) is not None]
        if extra:
            raise ValueError(f"it also decides {', '.join(extra)}")
        return actions

    def _encoded(self, where: Tensor, obs: Observation) -> Tensor:
        """1 for tokens that end up in themselves, else 0."""
        return (where == torch.arange(obs.num_agents, device=where.device)).long()

    def distribution(self, logits: Tensor, mask: Tensor | None = None) -> ActionDistribution:
        """`Bernoulli` where there are two actions, else `Categorical`."""
        two = logits.shape[1] == 2 and mask is None
        return Bernoulli(logits[:, 1] - logits[:, 0]) if two else Categorical(logits, mask)


@dataclass(frozen=True)
class KeepOrMerge(ExitActions):
    """0 = merge into the kept token most like oneself, 1 = keep; see `game.leaving.merge_leavers`."""

    name = "keep_or_merge"
    needs = NEEDS

    def meaning(self, num_agents: int) -> str:
        """Both actions."""
        return "0 (merge into the most similar kept token) or 1 (keep)"

    def count(self, num_agents: int) -> int:
        """2."""
        return 2

    def decision(self, actions: Tensor, obs: Observation) -> Decision:
        """Merge the tokens with action 0."""
        return merge_leavers(obs, actions.bool())


@dataclass(frozen=True)
class KeepOrFuse(ExitActions):
    """0 = be fused with all that leave, 1 = keep; see `game.leaving.fuse_leavers`."""

    name = "keep_or_fuse"

    def meaning(self, num_agents: int) -> str:
        """Both actions."""
        return "0 (be fused with all others that leave) or 1 (keep)"

    def count(self, num_agents: int) -> int:
        """2."""
        return 2

    def decision(self, actions: Tensor, obs: Observation) -> Decision:
        """Fuse the tokens with action 0."""
        return fuse_leavers(obs, actions.bool())

    def _encoded(self, where: Tensor, obs: Observation) -> Tensor:
        """0 for tokens that share their end with another one, 1 for those that stand alone."""
        share = torch.zeros_like(where).scatter_add(1, where.clamp(min=0), (where >= 0).long())
        alone = share.gather(1, where.clamp(min=0)) == 1
        return (alone & (where >= 0)).long()


@dataclass(frozen=True)
class DropMergeKeep(ExitActions):
    """0 = drop, 1 = merge into the kept token most like oneself, 2 = keep: an agent chooses its way out."""

    name = "drop_merge_keep"
    needs = NEEDS

    def meaning(self, num_agents: int) -> str:
        """The three actions."""
        return "0 (drop), 1 (merge into the most similar kept token) or 2 (keep)"

    def count(self, num_agents: int) -> int:
        """3."""
        return 3

    def decision(self, actions: Tensor, obs: Observation) -> Decision:
        """Drop the tokens with action 0, and merge those with action 1."""
        return merge_leavers(obs, actions == 2, actions == 1)

    def _encoded(self, where: Tensor, obs: Observation) -> Tensor:
        """0 for tokens that are gone, 2 for those that end up in themselves, 1 for the others."""
        stays = where == torch.arange(obs.num_agents, device=where.device)
        return (where >= 0).long() + stays.long()


for kind in (KeepOrMerge(), KeepOrFuse(), DropMergeKeep()):
    register_actions(kind)
