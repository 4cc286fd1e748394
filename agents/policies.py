"""The learnt policy as it is deployed: greedy, with equal counts, or sampling; calibration sets its threshold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import replace
from math import exp, isnan
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ..envs.actions import ActionKind, KeepActions, action_kind, registered_actions
from ..policy import BasePolicy, check_precision, keep_top, register_policy
from ..types import Decision, Observation, Site
from .networks import TokenActor
from .senses import needed, see
from .shared.noise import exploration_noise


def checked_threshold(threshold: float) -> float:
    """A threshold in logits.

    Raises:
        ValueError: for NaN, with which every comparison fails.
    """
    if isnan(threshold):
        raise ValueError("threshold: expected a number in logits, got nan")
    return float(threshold)


@register_policy("token_policy")
class TokenPolicy(BasePolicy, nn.Module):
    """Takes the most probable action of every token, after the threshold is added to the logit of action 0.

    With the two actions prune and keep, tokens are kept whose log-odds of being kept exceed the threshold. With any
    number of actions, a higher threshold drops more tokens, if action 0 is the one that drops.

    With a schedule, every image keeps equally many tokens at a site, those with the largest log-odds. The threshold
    then scales the schedule: the shares are divided by its exponential. Every image costs the same, and exported models
    take batches of any size.

    With a seed, actions are drawn with their probabilities instead, as in training and as the authors' code of RL4EViT
    evaluates. The noise of an image follows from the seed and from how many images the policy has seen before.

    Args:
        actor: the network that decides.
        threshold: in logits; 0 takes the most probable action, calibration moves it to meet a budget.
        sites: where the actor was trained to act; None: the backbone's own.
        info: notes on its origin (backbone, budget, seed); JSON values.
        actions: what the actor's actions mean.
        seed: of the noise with which actions are drawn; None: the most probable ones are taken.
        schedule: `[T]`, share of all N tokens that stays after each site, in every image; None: each token that exceeds
            the threshold stays.

    Raises:
        ValueError: if the actor has other than two actions, and no kind of actions is given that has as many; for a
            schedule that is no such shares, or beside a seed or more than two actions.
    """

    def __init__(
        self,
        actor: TokenActor,
        threshold: float = 0.0,
        sites: Sequence[int | str | Site] | None = None,
        info: Mapping[str, Any] | None = None,
        actions: ActionKind | None = None,
        seed: int | None = None,
        schedule: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.num_actions = getattr(actor, "num_actions", 2)  # a module of one's own decides between prune and keep
        if actions is None and self.num_actions != 2:
            raise ValueError(f"actions: expected the kind of the actor's {self.num_actions} actions, got None")
        self.actor = actor
        self.senses: tuple[str, ...] = getattr(actor, "senses", ())
        self.threshold = checked_threshold(threshold)
        self.sites = None if sites is None else tuple(Site.parse(site) for site in sites)
        self.info = dict(info or {})
        self.actions: ActionKind = KeepActions() if actions is None else actions
        self.needs = needed(self.senses) | self.actions.needs
        self.attention_bias: Literal["log_size"] | None = self.actions.attention_bias
        self.seed = seed
        self.schedule = None if schedule is None else self._checked(schedule)
        self._first_game = self._next_game = 0

    def default_sites(self, depth: int) -> Sequence[int | str | Site] | None:
        """Where it was trained to act."""
        return self.sites

    def reset(self, batch_size: int, num_agents: int) -> None:
        """Start a new batch of images, which have noise of their own."""
        if self.seed is not None:  # a compiled policy would be compiled anew whenever a number of it changes
            self._first_game, self._next_game = self._next_game, self._next_game + batch_size

    @torch.no_grad()
    def decide(self, obs: Observation) -> Decision:
        """Choose an action for every alive token."""
        # In half precision, logits near the threshold would be rounded, and the calibrated budget would be missed.
        with full_precision(obs.tokens.device.type):
            check_precision(self.actor, obs.tokens)
            if self.schedule is not None:
                return self._equal_counts(obs, self.schedule)
            chosen = self._chosen(obs)
        return joint_decision(self.actions, chosen, obs, self.actor)

    def _equal_counts(self, obs: Observation, schedule: tuple[float, ...]) -> Decision:
        """As many tokens as the schedule says stay in every image."""
        if obs.step >= len(schedule):
            raise ValueError(f"schedule: expected a share for site number {obs.step + 1}, got {schedule}")
        count = max(1, round(min(1.0, schedule[obs.step] * exp(-self.threshold)) * obs.num_agents))
        scores = self.actor.keep_logit(see(obs, self.senses).tokens)
        chosen = obs.gather(keep_top(obs, scores, torch.full_like(obs.num_alive, count))).long()
        decision = joint_decision(self.actions, chosen, obs, self.actor)
        known = obs.count is not None and self.actions == KeepActions()
        return replace(decision, count=min(count, cast(int, obs.count))) if known else decision

    def _chosen(self, obs: Observation) -> Tensor:
        """Actions of the alive tokens, `[sum n_i]` int64."""
        mask, tokens = action_rows(self.actions, obs), see(obs, self.senses).tokens
        if self.num_actions == 2 and mask is None and self.seed is None:
            return (self.actor.keep_logit(tokens) > self.threshold).long()
        logits = self.actor(tokens)
        raised = torch.cat([logits[:, :1] + self.threshold, logits[:, 1:]], dim=1)
        chance = self.actions.distribution(raised, mask)
        if self.seed is None:
            return chance.mode()
        return chance.sample(exploration_noise(self.seed, self._first_game + obs.image, obs.step, obs.token))

    def with_threshold(self, threshold: float) -> TokenPolicy:
        """The same policy, sharing its weights, with another threshold."""
        return self._like(threshold, self.seed, self.schedule)

    def with_schedule(self, schedule: Sequence[float] | None) -> TokenPolicy:
        """The same policy, sharing its weights, that keeps these shares of all tokens in every image.

        Args:
            schedule: `[T]`; None: each token that exceeds the threshold stays.
        """
        return self._like(0.0, None, schedule)

    def starting_actor(self) -> TokenActor:
        """A copy of the actor with the threshold in its biases: what training goes on from."""
        actor = deepcopy(self.actor)
        if self.schedule is None:
            with torch.no_grad():
                actor.last.bias[0] += self.threshold
        return actor

    def sampling(self, seed: int = 0) -> TokenPolicy:
        """The policy, sharing its weights, that draws every action with the probability that it has in training."""
        return self._like(0.0, seed)

    def _like(self, threshold: float, seed: int | None, schedule: Sequence[float] | None = None) -> TokenPolicy:
        return TokenPolicy(self.actor, threshold, self.sites, self.info, self.actions, seed, schedule)

    def _checked(self, schedule: Sequence[float]) -> tuple[float, ...]:
        """A schedule that this policy can follow."""
        shares = tuple(float(share) for share in schedule)
        if not shares or not all(0 <= share <= 1 for share in shares):
            raise ValueError(f"schedule: expected shares of the tokens, 0 to 1, one for each site, got {schedule}")
        if self.sites is not None and len(shares) != len(self.sites):
            raise ValueError(f"schedule: expected {len(self.sites)} shares, one for each site, got {len(shares)}")
        if self.num_actions != 2 or self.seed is not None:
            got = f"{self.num_actions} actions" if self.num_actions != 2 else f"seed {self.seed}"
            raise ValueError(f"schedule: expected None unless there are two actions and none is drawn, got {got}")
        return shares

    @property
    def width(self) -> int:
        """Embedding width of the networks that it can prune."""
        return self.actor.embed_dim

    def config(self) -> dict[str, Any]:
        """All that `from_config` needs beside the actor's weights, as JSON values.

        Raises:
            ValueError: for a kind of actions of one's own that `register_actions` was not given.
        """
        values = {"embed_dim": self.actor.embed_dim, "hidden": list(self.actor.hidden), **self._settings()}
        if self.senses:
            values["senses"] = list(self.senses)
        return values if self.actions == KeepActions() else {**values, "num_actions": self.num_actions}

    def _settings(self) -> dict[str, Any]:
        """What `config` says of everything but the actor."""
        values = {
            "threshold": self.threshold,
            "sites": None if self.sites is None else [site.label for site in self.sites],
            "info": self.info,
        }
        if self.seed is not None:
            values["seed"] = self.seed
        if self.schedule is not None:
            values["schedule"] = list(self.schedule)
        return values if self.actions == KeepActions() else {**values, "actions": registered_actions(self.actions)}

    @classmethod
    def from_config(
        cls,
        embed_dim: int,
        hidden: Sequence[int],
        actions: str = "keep",
        num_actions: int = 2,
        senses: Sequence[str] = (),
        **settings: Any,
    ) -> TokenPolicy:
        """The policy that gave this `config()`, with fresh weights.

        Raises:
            ValueError: for a kind of actions, or a sense, that is not known by this name.
        """
        actor = TokenActor(embed_dim, hidden, num_actions=num_actions, senses=senses)
        return cls(actor, actions=action_kind(actions, "actions"), **settings)

    def extra_repr(self) -> str:
        """Threshold and sites, the seed of a policy that draws, and the schedule of one with equal counts."""
        sites = None if self.sites is None else [site.label for site in self.sites]
        more = {"seed": self.seed, "schedule": self.schedule}
        shown = (f", {name}={value}" for name, value in more.items() if value is not None)
        return f"threshold={self.threshold:.4g}, sites={sites}" + "".join(shown)


def full_precision(device_type: str) -> AbstractContextManager[object]:
    """Suspend autocast where it is on; where it is off, add nothing to an exported graph."""
    active = torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if active else nullcontext()


def decision_macs(actor: TokenActor, obs: Observation) -> Tensor:
    """MACs per image of letting the actor look at every alive token, `[B]` float64."""
    return obs.num_alive.double() * actor.macs_per_token


def joint_decision(kind: ActionKind, actions: Tensor, obs: Observation, actor: TokenActor) -> Decision:
    """The decision that the actions `[sum n_i]` of the alive tokens amount to, with the MACs of the actor."""
    table = kind.unseen_actions(obs)
    table[obs.image, obs.token] = actions
    decision = kind.decision(table, obs)
    macs = decision_macs(actor, obs)
    return replace(decision, macs=macs if decision.macs is None else macs + decision.macs)


def action_rows(actions: ActionKind, obs: Observation) -> Tensor | None:
    """Which actions make sense for each alive token, `[sum n_i, A]` bool; None: all of them."""
    mask = actions.mask(obs.alive)
    return None if mask is None else obs.gather(mask)
