"""Action kinds: which actions an agent has at a site, and what the actions of all agents mean as a `Decision`.

An action kind is one object with everything that environments and learners need to handle its actions. A new kind is a
new class in a file of its own. `KeepActions` and `MergeActions` are built in.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, fields
from importlib import import_module
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import torch
from gymnasium.spaces import MultiBinary, MultiDiscrete
from torch import Tensor

from vitprune_env.engine.reduction import survivors
from vitprune_env.envs.distributions import ActionDistribution, Bernoulli, Categorical
from vitprune_env.errors import EvidenceError
from vitprune_env.game.token_game import TokenGame
from vitprune_env.policy import mean_weights
from vitprune_env.types import Decision, Observation

EXITS = "vitprune_env.envs.exits"  # further kinds that are built in
WEIGHT_TOLERANCE = 1e-4  # relative; a policy may compute its means in another order of operations
# Fields of a decision that drops and means can express, that environments pass on, or that only speed up execution.
EXPRESSIBLE = {"keep", "merge_into", "weight", "order", "macs", "count", "park_count"}


@runtime_checkable
class ActionKind(Protocol):
    """What the actions of the agents are and what they do.

    A kind of your own is a frozen dataclass that subclasses this protocol and gives `name`, `meaning`, `count`,
    `decision` and `encode`. The other methods have defaults. `register_actions` gives it a name in files.
    """

    name: str  # public name, such as "keep"
    needs: frozenset[str] = frozenset()  # evidence that `decision` looks at
    attention_bias: Literal["log_size"] | None = None  # what a game with these actions adds to the attention logits

    @abstractmethod
    def meaning(self, num_agents: int) -> str:
        """The actions and their meanings in words, for error messages."""

    @abstractmethod
    def count(self, num_agents: int) -> int:
        """A, the number of actions of every agent; they are the numbers 0 to A - 1."""

    @abstractmethod
    def decision(self, actions: Tensor, obs: Observation) -> Decision:
        """The decision that the actions `[B, N]` int64 of all agents amount to.

        The actions of tokens that have left the game are ignored.
        """

    @abstractmethod
    def encode(self, decision: Decision, obs: Observation) -> Tensor:
        """The actions `[B, N]` int64 that amount to a policy's decision, for policies played through an environment.

        Raises:
            ValueError: if no actions amount to it. The message continues "the policy cannot play through actions: ".
        """

    def joint_space(self, num_agents: int, *batch: int) -> MultiBinary | MultiDiscrete:
        """The space of the actions of all agents, `[*batch, N]`; by default `MultiDiscrete`."""
        return MultiDiscrete(np.full((*batch, num_agents), self.count(num_agents)))

    def mask(self, alive: Tensor) -> Tensor | None:
        """The actions that make sense, `[B, N, A]` bool; None, the default, where all of them always do.

        Args:
            alive: `[B, N]` bool, tokens still in the game.
        """
        return None

    def unseen_actions(self, obs: Observation) -> Tensor:
        """The actions `[B, N]` int64 of the tokens that a policy does not see; by default 0.

        A policy sees the rows of `obs.tokens`, the features of `obs.alive`. Environments take the actions of waiting
        tokens from their agents, but a learner gives actions to the rows only; all other tokens then get these.
        """
        return torch.zeros_like(obs.alive, dtype=torch.int64)

    def distribution(self, logits: Tensor, mask: Tensor | None = None) -> ActionDistribution:
        """The distribution that a learner draws actions from; by default `Categorical`.

        Args:
            logits: `[rows, A]`, one row per token.
            mask: `[rows, A]` bool, the actions that may be drawn; None: all.
        """
        return Categorical(logits, mask)


@dataclass(frozen=True)
class KeepActions(ActionKind):
    """0 = prune, 1 = keep."""

    name = "keep"

    def meaning(self, num_agents: int) -> str:
        """Both actions."""
        return "0 (prune) or 1 (keep)"

    def count(self, num_agents: int) -> int:
        """2."""
        return 2

    def joint_space(self, num_agents: int, *batch: int) -> MultiBinary:
        """`MultiBinary`, `[*batch, N]`."""
        return MultiBinary([*batch, num_agents] if batch else num_agents)

    def decision(self, actions: Tensor, obs: Observation) -> Decision:
        """Keep the tokens with action 1."""
        return Decision(keep=actions.bool() & obs.present)

    def encode(self, decision: Decision, obs: Observation) -> Tensor:
        """1 for the tokens that stay.

        Raises:
            ValueError: for a decision that does more than keep and prune.
        """
        target = destinations(decision, obs)
        if (merged := (target >= 0) & (target != _itself(target))).any():
            raise ValueError(f"0 and 1 can only say prune or keep, but it merges {int(merged.sum())} tokens")
        check_drops_and_means(decision, target, obs)
        return (target >= 0).long()

    def distribution(self, logits: Tensor, mask: Tensor | None = None) -> ActionDistribution:
        """`Bernoulli` with the log-odds of keeping, the difference of the two logits."""
        return Bernoulli(logits[:, 1] - logits[:, 0]) if mask is None else Categorical(logits, mask)


@dataclass(frozen=True)
class MergeActions(ActionKind):
    """0 = drop, 1 + j = go into token j; token i stays with action 1 + i.

    All agents act at once, so the token that another one goes into may itself leave. Every token therefore follows the
    arrows (`resolve`) to their end: to a token that stays; to a token that is dropped or dead, and then all on the way
    leave with it; or into a circle, and then the lowest-numbered token of the circle stays and the others go into it.
    What goes into one token becomes the mean of its patches: features weighted with the tokens' sizes, as in ToMe.
    """

    name = "merge"

    def meaning(self, num_agents: int) -> str:
        """The drop and the targets."""
        return f"0 (drop) or 1 + j (go into token j, oneself included), 1 to {num_agents}"

    def count(self, num_agents: int) -> int:
        """N + 1."""
        return num_agents + 1

    def mask(self, alive: Tensor) -> Tensor:
        """Alive tokens may drop or go into any alive token, themselves included; for dead tokens only 0 is left."""
        to_alive = alive[:, :, None] & alive[:, None, :]
        return torch.cat([torch.ones_like(alive)[:, :, None], to_alive], dim=2)

    def decision(self, actions: Tensor, obs: Observation) -> Decision:
        """Follow the arrows and merge all tokens that end in the same one."""
        target = resolve(actions - 1, obs.present)
        return Decision(keep=target == _itself(target), merge_into=target, weight=mean_weights(target, obs.size))

    def encode(self, decision: Decision, obs: Observation) -> Tensor:
        """An arrow from every token straight to the one it ends up in.

        Raises:
            ValueError: for a decision that merges with other weights, or does more than drop and merge.
        """
        target = destinations(decision, obs)
        check_drops_and_means(decision, target, obs)
        return target + 1


ACTION_KINDS: dict[str, ActionKind] = {kind.name: kind for kind in (KeepActions(), MergeActions())}


def check_actions(kind: ActionKind, game: TokenGame) -> None:
    """Refuse a game that lacks the evidence which actions look at.

    Raises:
        EvidenceError: naming it.
    """
    if missing := sorted(kind.needs - game.needs):
        raise EvidenceError(
            f"action_space: {kind.name!r} looks at {', '.join(missing)}, which this game does not compute; make it "
            f"with needs={set(kind.needs)}"
        )


def action_kind(kind: ActionKind | str, argument: str = "action_space") -> ActionKind:
    """The registered kind of a name; a kind itself is returned as it is.

    Args:
        kind: the kind or its name.
        argument: what the caller's parameter is called, for error messages.

    Raises:
        ValueError: for an unknown name.
        TypeError: for anything else.
    """
    if isinstance(kind, str):
        import_module(EXITS)  # registers its kinds
        if kind not in ACTION_KINDS:
            raise ValueError(
                f"{argument}: expected one of {tuple(ACTION_KINDS)}, got {kind!r}; "
                "vitprune_env.register_actions adds a kind of your own"
            )
        return ACTION_KINDS[kind]
    if isinstance(kind, type) or not isinstance(kind, ActionKind):
        raise TypeError(f"{argument}: expected an ActionKind object or one of {tuple(ACTION_KINDS)}, got {kind!r}")
    return kind


def register_actions(kind: ActionKind) -> ActionKind:
    """Make a kind known by its name, so that policies that use it can be saved and loaded.

    Args:
        kind: one of your own.

    Returns:
        The same.

    Raises:
        TypeError: for anything else.
        ValueError: for a name that another kind has.
    """
    kind = action_kind(kind, "kind")
    known = ACTION_KINDS.get(kind.name, kind)
    if known != kind:
        raise ValueError(f"name: expected one that is free, got {kind.name!r}, the name of {known}")
    ACTION_KINDS[kind.name] = kind
    return kind


def registered_actions(kind: ActionKind) -> str:
    """The name by which a kind can be found again.

    Raises:
        ValueError: for a kind that is not registered.
    """
    if ACTION_KINDS.get(kind.name) != kind:
        raise ValueError(
            f"actions: expected a registered kind for a policy that is saved, got {kind}; "
            "vitprune_env.register_actions(kind) registers it"
        )
    return kind.name


def resolve(arrows: Tensor, alive: Tensor) -> Tensor:
    """The tokens that arrows end in when all tokens point somewhere at once.

    Args:
        arrows: `[B, N]` int64, the token that each one points at, itself to stay, -1 to leave.
        alive: `[B, N]` bool.

    Returns:
        `[B, N]` int64: a token that stays and points at itself, or -1. See `MergeActions` for the rules.
    """
    batch, agents = arrows.shape
    # One more node, N, points at itself. Tokens that leave and dead tokens point at it.
    nowhere = arrows.new_full((batch, 1), agents)
    jump = torch.cat([torch.where(alive & (arrows >= 0), arrows, agents), nowhere], dim=1)
    lowest = torch.arange(agents + 1, device=arrows.device).expand_as(jump)  # on the way so far
    for _ in range(agents.bit_length()):  # doubles the steps taken, until they suffice for any path and any circle
        lowest = torch.minimum(lowest, lowest.gather(1, jump))
        jump = jump.gather(1, jump)
    # Every path has ended in a circle (a token that stays is one of length 1), whose tokens share their lowest number.
    target = lowest.gather(1, jump)[:, :agents]
    return target.masked_fill(target == agents, -1)


def destinations(decision: Decision, obs: Observation) -> Tensor:
    """The token that each token ends up in, `[B, N]` int64; -1 for tokens that leave the game."""
    into = _itself(obs.alive) if decision.merge_into is None else decision.merge_into
    joins = obs.present & (into >= 0) & survivors(decision, obs.present).gather(1, into.clamp(min=0))
    return into.masked_fill(~joins, -1)


def check_drops_and_means(decision: Decision, target: Tensor, obs: Observation) -> None:
    """Refuse a decision that does more than drop tokens and merge them into means.

    Args:
        decision: the decision.
        target: its `destinations`.
        obs: what it was taken on.

    Raises:
        ValueError: naming what else it does.
    """
    given = {field.name for field in fields(decision) if getattr(decision, field.name) is not None}
    if extra := sorted(given - EXPRESSIBLE):
        raise ValueError(f"it also decides {', '.join(extra)}")
    mean = mean_weights(target, obs.size)
    weight = torch.ones_like(mean) if decision.weight is None else decision.weight.to(mean)
    if ((target >= 0) & ((weight - mean).abs() > WEIGHT_TOLERANCE * mean)).any():
        raise ValueError("they merge tokens into the mean of their patches, but its weights are others")


def _itself(like: Tensor) -> Tensor:
    """The number of every token, `[B, N]` int64."""
    return torch.arange(like.shape[1], device=like.device).expand(like.shape)
