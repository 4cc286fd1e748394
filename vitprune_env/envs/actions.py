"""What agents may say at a site, and what it means: actions to a `Decision`, and a policy's decision to actions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, Protocol

import numpy as np
import torch
from gymnasium.spaces import MultiBinary, MultiDiscrete
from torch import Tensor

from vitprune_env.engine.reduction import check_decision, survivors
from vitprune_env.game.rollout import check_fit
from vitprune_env.game.token_game import TokenGame
from vitprune_env.policy import Policy
from vitprune_env.types import Decision, Observation

Action = int | np.int64

WEIGHT_TOLERANCE = 1e-4  # relative; a policy may compute its means in another order than we do
# Of a decision, what actions say, what `ask` hands over beside them, and what is bookkeeping.
EXPRESSIBLE = {"keep", "merge_into", "weight", "order", "macs", "count", "park_count"}


class Actions(Protocol):
    """An action space: how many actions every agent has, and what they mean together."""

    num_agents: int  # N
    count: int  # actions of every agent
    meaning: str  # for error messages

    def joint_space(self, *batch: int) -> MultiBinary | MultiDiscrete:
        """The actions of all agents, of `batch` games if given: `[*batch, N]`."""
        ...

    def decision(self, actions: Tensor, obs: Observation) -> Decision:
        """What the actions `[B, N]` int64 of all agents come to; those of the dead are ignored."""
        ...

    def actions(self, target: Tensor) -> Tensor:
        """The actions `[B, N]` int64 that send every token to its `target` `[B, N]`, itself or -1 (it leaves).

        Raises:
            ValueError: if these actions cannot.
        """
        ...

    def mask(self, alive: Tensor) -> Tensor | None:
        """Which actions make sense, `[B, N, count]` bool; None where all do, always."""
        ...


class KeepActions:
    """`Discrete(2)`: 0 = prune, 1 = keep."""

    count = 2
    meaning = "0 (prune) or 1 (keep)"

    def __init__(self, num_agents: int) -> None:
        self.num_agents = num_agents

    def joint_space(self, *batch: int) -> MultiBinary:
        """`MultiBinary`, `[*batch, N]`."""
        return MultiBinary([*batch, self.num_agents] if batch else self.num_agents)

    def decision(self, actions: Tensor, obs: Observation) -> Decision:
        """Keep the alive tokens that say 1."""
        return Decision(keep=actions.bool() & obs.alive)

    def actions(self, target: Tensor) -> Tensor:
        """1 for tokens that stand."""
        if (merged := (target >= 0) & (target != _itself(target))).any():
            raise ValueError(f"0 and 1 can only say prune or keep, but it merges {int(merged.sum())} tokens")
        return (target >= 0).long()

    def mask(self, alive: Tensor) -> None:
        """None: there is nothing to choose wrongly."""


class MergeActions:
    """`Discrete(N + 1)`: 0 = drop, 1 + j = go into token j; to stay, token i says 1 + i.

    All speak at once, so that where one wants to go another may be leaving. Everybody therefore follows the arrows to
    their end: to a token that stays; to one that leaves or is dead, and then all on the way leave with it; or into a
    circle, and then the lowest-numbered token of the circle stays for all of it. What goes into one token becomes the
    mean of its patches: features weighted with the tokens' sizes, as ToMe merges.
    """

    def __init__(self, num_agents: int) -> None:
        self.num_agents = num_agents
        self.count = num_agents + 1
        self.meaning = f"0 (drop) or 1 + j (go into token j, oneself included), 1 to {num_agents}"

    def joint_space(self, *batch: int) -> MultiDiscrete:
        """`MultiDiscrete`, `[*batch, N]`."""
        return MultiDiscrete(np.full((*batch, self.num_agents), self.count))

    def decision(self, actions: Tensor, obs: Observation) -> Decision:
        """Follow the arrows and merge what ends in the same token."""
        target = resolve(actions - 1, obs.alive)
        return Decision(keep=target == _itself(target), merge_into=target, weight=mean_weights(target, obs.size))

    def actions(self, target: Tensor) -> Tensor:
        """An arrow straight to the target."""
        return target + 1

    def mask(self, alive: Tensor) -> Tensor:
        """The alive may drop or go into anybody alive, themselves included; for the dead there is only 0."""
        to_alive = alive[:, :, None] & alive[:, None, :]
        return torch.cat([torch.ones_like(alive)[:, :, None], to_alive], dim=2)


ACTION_SPACES: dict[str, type[KeepActions] | type[MergeActions]] = {"keep": KeepActions, "merge": MergeActions}


def make_actions(name: str, num_agents: int) -> Actions:
    """The action space of a name.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in ACTION_SPACES:
        raise ValueError(f"action_space: expected one of {tuple(ACTION_SPACES)}, got {name!r}")
    return ACTION_SPACES[name](num_agents)


def resolve(arrows: Tensor, alive: Tensor) -> Tensor:
    """Where tokens that all point somewhere at once end up.

    Args:
        arrows: `[B, N]` int64, the token that each one points at, itself to stay, -1 to leave.
        alive: `[B, N]` bool.

    Returns:
        `[B, N]` int64: a token that stands and points at itself, or -1. See `MergeActions` for the rules.
    """
    batch, agents = arrows.shape
    # One more node, N, which points at itself, is where everybody goes who leaves; the dead point there too.
    nowhere = arrows.new_full((batch, 1), agents)
    jump = torch.cat([torch.where(alive & (arrows >= 0), arrows, agents), nowhere], dim=1)
    lowest = torch.arange(agents + 1, device=arrows.device).expand_as(jump)  # on the way so far
    for _ in range(agents.bit_length()):  # doubles the steps taken, until they suffice for any path and any circle
        lowest = torch.minimum(lowest, lowest.gather(1, jump))
        jump = jump.gather(1, jump)
    # Every path has ended in a circle (a token that stands is one of length 1), where all see the same lowest token.
    target = lowest.gather(1, jump)[:, :agents]
    return target.masked_fill(target == agents, -1)


def mean_weights(target: Tensor, size: Tensor) -> Tensor:
    """Weights `[B, N]` that make every group of tokens the mean of its patches; 1 for tokens that go nowhere.

    Args:
        target: `[B, N]` int64, where each token goes; -1: nowhere.
        size: `[B, N]` float, patches that each token stands for.
    """
    joins, into = target >= 0, target.clamp(min=0)
    total = torch.zeros_like(size).scatter_add(1, into, size * joins).gather(1, into)
    return torch.where(joins, size / total.clamp(min=1), 1.0)


def ask(policy: Policy, game: TokenGame, actions: Actions) -> tuple[Tensor, Tensor | None]:
    """What a policy would do now, as actions `[B, N]`, and the order in which it wants to see the tokens next.

    Raises:
        ValueError: if the game lacks what the policy needs, its decision does not fit, or actions cannot express it.
    """
    check_fit(game, policy)
    obs = game.observation()
    if obs.step == 0:
        policy.reset(obs.batch_size, obs.num_agents)
    decision = policy.decide(obs)
    check_decision(decision, obs.alive)
    target = _destinations(decision, obs)
    try:
        choices = actions.actions(target)
        _check_expressible(decision, target, obs)
    except ValueError as error:
        name = type(policy).__name__
        raise ValueError(f"policy: {name} cannot play through actions: {error}; use vitprune_env.play") from None
    return choices, decision.order


def _destinations(decision: Decision, obs: Observation) -> Tensor:
    """Where each token goes, `[B, N]` int64: a token that stands, or -1."""
    into = _itself(obs.alive) if decision.merge_into is None else decision.merge_into
    joins = obs.alive & (into >= 0) & survivors(decision, obs.alive).gather(1, into.clamp(min=0))
    return into.masked_fill(~joins, -1)


def _check_expressible(decision: Decision, target: Tensor, obs: Observation) -> None:
    """Refuse what no actions say: more than drops and merges, or merges into something else than the mean.

    Raises:
        ValueError: naming it.
    """
    given = {field.name for field in fields(decision) if getattr(decision, field.name) is not None}
    if extra := sorted(given - EXPRESSIBLE):
        raise ValueError(f"it also decides {', '.join(extra)}")
    mean = mean_weights(target, obs.size)
    weight = torch.ones_like(mean) if decision.weight is None else decision.weight.to(mean)
    if ((target >= 0) & ((weight - mean).abs() > WEIGHT_TOLERANCE * mean)).any():
        raise ValueError("they merge tokens into the mean of their patches, but its weights are others")


def read_actions(actions: Mapping[str, Action], agents: Sequence[str], space: Actions) -> list[int]:
    """The actions of a PettingZoo dict in the order of the agents.

    Raises:
        ValueError: for a missing or unknown agent or an action outside the space, naming the agent.
    """
    for agent in actions.keys() ^ set(agents):
        problem = "is missing" if agent in agents else "is not in the game, or not any more"
        raise ValueError(f"actions: expected one for each of env.agents; {agent} {problem}")
    for agent, action in actions.items():
        if not _is_below(action, space.count):
            raise ValueError(f"actions: expected {space.meaning}, got {action!r} for {agent}")
    return [int(actions[agent]) for agent in agents]


def _is_below(action: Any, count: int) -> bool:
    """Whether an action is a whole number from 0 to `count - 1`, of whatever type."""
    try:
        return 0 <= int(action) < count and bool(int(action) == action)
    except (TypeError, ValueError, OverflowError):
        return False


def _itself(like: Tensor) -> Tensor:
    """The number of every token, `[B, N]` int64."""
    return torch.arange(like.shape[1], device=like.device).expand(like.shape)
