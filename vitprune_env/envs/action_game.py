"""A `TokenGame` that is played with actions instead of decisions: what all environments share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitprune_env.data.batches import whole_numbers
from vitprune_env.engine.reduction import check_decision
from vitprune_env.envs.actions import ActionKind, action_kind, check_actions
from vitprune_env.game.rollout import check_fit
from vitprune_env.game.token_game import TokenGame
from vitprune_env.policy import Policy


def option(options: Any, name: str) -> Any:
    """The value of an option of `reset`; None: not given. Options of others, such as wrappers, are left to them.

    Raises:
        TypeError: for something that is not a dict.
        ValueError: for a name that is misspelt.
    """
    if options is not None and not isinstance(options, Mapping):
        raise TypeError(f"options: expected a dict, got {options!r}")
    given = dict(options or {})
    if near := get_close_matches(name, [str(key) for key in given if key != name], n=1, cutoff=0.5):
        raise ValueError(f"options: expected {name!r}, got {near[0]!r}")
    return given.get(name)


def random_stream(seed: int | None) -> np.random.Generator:
    """Random numbers of an environment; None: unpredictable ones.

    Raises:
        TypeError: for a seed that is no whole number.
        ValueError: for a negative one.
    """
    check_seed(seed)
    return np.random.default_rng(seed)


def check_seed(seed: int | None) -> None:
    """Refuse what is no seed.

    Raises:
        TypeError: for something that is no whole number.
        ValueError: for a negative number.
    """
    if seed is not None and whole_numbers("seed", [seed])[0] < 0:
        raise ValueError(f"seed: expected a whole number of at least 0, got {seed}")


class ActionGame:
    """B images played with actions `[B, N]`.

    Attributes:
        kind: what the actions mean.
        present: `[B, N]` bool, tokens still in the game, waiting ones included.

    Args:
        game: the rules.
        action_space: an `ActionKind`, or the name of a built-in one.
    """

    def __init__(self, game: TokenGame, action_space: ActionKind | str) -> None:
        self.game = game
        self.kind = action_kind(action_space)
        check_actions(self.kind, game)
        self.present = torch.zeros(1, game.num_agents, dtype=torch.bool)
        self._parked: Tensor | None = None  # [B, N] bool, of those present, tokens that wait; None: none
        self._order: Tensor | None = None  # [B, N], the `order` of the decision that `actions_from` encoded last

    def reset(self, images: Tensor, labels: Tensor) -> Tensor:
        """Begin a game per image and return the features `[B, N, D]` at the first site."""
        device = next(self.game.backbone.parameters()).device
        obs = self.game.reset(images.to(device), labels.to(device))
        self.present, self._parked, self._order = obs.present, None, None
        return self._features()

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, bool]:
        """Take the actions of all agents and run up to the next site, or to the end.

        Args:
            actions: `[B, N]` int64; those of tokens that have left are ignored.

        Returns:
            The features `[B, N, D]` at the next site, zeros at the end; the rewards `[B, N]`; whether the game is over.
        """
        decision = self.kind.decision(actions.to(self.present.device), self.game.observation())
        if self._order is not None:
            decision = replace(decision, order=self._order)
        obs, reward, _, _, info = self.game.step(decision)
        assert reward is not None  # every game has labels
        self._order, self._parked = None, info.get("parked")
        self.present = info["alive"] if self._parked is None else info["alive"] | self._parked
        if obs is None:
            return reward.new_zeros(*reward.shape, self.game.backbone.embed_dim), reward, True
        return self._features(), reward, False

    def infos(self) -> dict[str, Tensor]:
        """Facts about all agents.

        Returns:
            `alive` `[B, N]` bool, in the game; `parked` `[B, N]` bool, waiting, only where some token waits; and
            `action_mask` `[B, N, A]` bool, only for kinds that have a mask.
        """
        mask = self.kind.mask(self.present)
        infos = {"alive": self.present, "parked": self._parked, "action_mask": mask}
        return {name: value for name, value in infos.items() if value is not None}

    def state(self) -> Tensor:
        """Features and alive flags of all tokens, `[B, P + N, D + 1]` float32: prefix tokens first, zeros for the dead.

        Raises:
            RuntimeError: before the first game.
        """
        tokens, num_prefix = self.game.state, self.game.backbone.num_prefix
        rows, width = num_prefix + self.game.num_agents, self.game.backbone.embed_dim + 1
        table = torch.zeros(tokens.batch_size, rows, width, device=tokens.x.device)
        with torch.no_grad():
            table[:, :num_prefix, :-1], table[:, :num_prefix, -1] = tokens.prefix, 1
            for part in (tokens, tokens.parked):
                if part is not None:
                    place = part.image, num_prefix + part.token
                    table[(*place, slice(-1))], table[(*place, -1)] = part.tokens.to(table.dtype), 1
        return table

    def actions_from(self, policy: Policy) -> Tensor:
        """The actions `[B, N]` int64 that a policy would take now.

        The `order` of its decision is remembered and applied in the next step.

        Raises:
            ValueError: if the game lacks what the policy needs, or its decision does not fit or is not expressible.
        """
        check_fit(self.game, policy)
        obs = self.game.observation()
        if obs.step == 0:
            policy.reset(obs.batch_size, obs.num_agents)
        decision = policy.decide(obs)
        check_decision(decision, obs.alive, obs.parked)
        try:
            actions = self.kind.encode(decision, obs)
        except ValueError as error:
            name = type(policy).__name__
            raise ValueError(f"policy: {name} cannot play through actions: {error}; use vitprune_env.play") from None
        self._order = decision.order
        return actions

    def _features(self) -> Tensor:
        """Features of all tokens `[B, N, D]`: waiting ones as they wait, zeros for those that have left."""
        dense, waiting = self.game.observation().dense(), self.game.state.parked
        if waiting is not None:
            dense[waiting.image, waiting.token] = waiting.tokens
        return dense
