"""The policy that plays in training: it samples its actions, with noise that is a function of the agent-step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from ...envs.actions import ActionKind, KeepActions
from ...policy import BasePolicy
from ...types import Decision, Observation
from ..networks import TokenActor
from ..policies import action_rows, full_precision, joint_decision
from ..senses import needed, see
from ..shared.noise import exploration_noise

View = Callable[[Observation], Observation]


def as_it_is(obs: Observation) -> Observation:
    """The observation itself."""
    return obs


class ExploringPolicy(BasePolicy):
    """Samples an action for every token, and records actions and log-probabilities for training.

    Attributes:
        actions: one `[sum n_i]` int64 per step of the current games.
        log_probs: one `[sum n_i]` float per step, log-probability of the actions.
        masks: one `[sum n_i, A]` bool per step, actions that made sense; empty if all do.
        noise: `[B, ...]`, what is added to the actor's parameters in each of the current games; None: nothing.
        next_game: number of the first game of the coming batch; the noise of a game follows from it.

    Args:
        actor: the network that decides.
        generator: its seed is the seed of the noise; nothing is drawn from it.
        kind: what the actor's actions mean; None: prune or keep.
        view: what is made of an observation before the actor's senses see it.
    """

    def __init__(
        self,
        actor: TokenActor,
        generator: torch.Generator,
        kind: ActionKind | None = None,
        view: View = as_it_is,
    ) -> None:
        self.actor = actor
        self.seed = generator.initial_seed()
        self.kind: ActionKind = KeepActions() if kind is None else kind
        self.senses: tuple[str, ...] = getattr(actor, "senses", ())  # a module of one's own sees its token alone
        self.needs = needed(self.senses) | self.kind.needs
        self.attention_bias: Literal["log_size"] | None = self.kind.attention_bias
        self._view = view
        self.next_game = 0
        self._first_game = 0
        self.actions: list[Tensor] = []
        self.log_probs: list[Tensor] = []
        self.masks: list[Tensor] = []
        self.noise: Tensor | None = None

    def view(self, obs: Observation) -> Observation:
        """What actor and critic see of an observation."""
        return see(self._view(obs), self.senses)

    def reset(self, batch_size: int, num_agents: int) -> None:
        """Start a new batch of games."""
        self._first_game, self.next_game = self.next_game, self.next_game + batch_size
        self.actions, self.log_probs, self.masks = [], [], []

    @torch.no_grad()
    def decide(self, obs: Observation) -> Decision:
        """Sample an action for every alive token."""
        # In half precision the log-probabilities would differ from those that the update computes.
        with full_precision(obs.tokens.device.type):
            logits = self.actor(self.view(obs).tokens.float())
        mask = action_rows(self.kind, obs)
        chance = self.kind.distribution(logits, mask)
        actions = chance.sample(exploration_noise(self.seed, self._first_game + obs.image, obs.step, obs.token))
        self.actions.append(actions)
        self.log_probs.append(chance.log_prob(actions))
        if mask is not None:
            self.masks.append(mask)
        return joint_decision(self.kind, actions, obs, self.actor)
