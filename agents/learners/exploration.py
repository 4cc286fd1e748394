"""The policy that plays in training: it samples its actions, with noise that is a function of the agent-step.

Noise from a stream of random numbers would depend on how images are spread over processes or split into batches. Here
it is a function of the seed, the game's number in the run, the step and the token (a counter-based generator).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...envs.actions import ActionKind, KeepActions
from ...policy import BasePolicy
from ...types import Decision, Observation
from ..networks import TokenActor
from ..policies import action_rows, full_precision, joint_decision

WORD = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10

Counter = tuple[Tensor, Tensor, Tensor, Tensor]
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
        next_game: number of the first game of the coming batch; the noise of a game follows from it.

    Args:
        actor: the network that decides.
        generator: its seed is the seed of the noise; nothing is drawn from it.
        kind: what the actor's actions mean; None: prune or keep.
        view: what actor and critic see of an observation.
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
        self.view = view
        self.next_game = 0
        self._first_game = 0
        self.actions: list[Tensor] = []
        self.log_probs: list[Tensor] = []
        self.masks: list[Tensor] = []

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


def philox(counter: Counter, key: tuple[int, int]) -> Counter:
    """Philox4x32-10 (Salmon et al., 2011, "Parallel random numbers: as easy as 1, 2, 3"), elementwise.

    Args:
        counter: four `[rows]` int64 of 32 bits each.
        key: two words of 32 bits.

    Returns:
        Four `[rows]` int64, random words of 32 bits.
    """
    a, b, c, d = counter
    first, second = key
    for _ in range(ROUNDS):
        # The product fills 64 bits: as int64 it may come out negative, its bits are right.
        low, high = a * MULTIPLIERS[0], c * MULTIPLIERS[1]
        a, b, c, d = (high >> 32 & WORD) ^ b ^ first, high & WORD, (low >> 32 & WORD) ^ d ^ second, low & WORD
        first, second = first + KEY_STEPS[0] & WORD, second + KEY_STEPS[1] & WORD
    return a, b, c, d


def exploration_noise(seed: int, game: Tensor, step: int, token: Tensor) -> Tensor:
    """Uniform numbers in [0, 1), the same on every device and however the games are spread over processes.

    Args:
        seed: of the run.
        game: `[rows]` int64, the number of each row's game in the run.
        step: of the game, from 0.
        token: `[rows]` int64, each row's patch.

    Returns:
        `[rows]` float32, multiples of 2 ** -24.
    """
    counter = (token, torch.full_like(token, step), game & WORD, game >> 32 & WORD)
    word = philox(counter, (seed & WORD, seed >> 32 & WORD))[0]
    return (word >> 8).to(torch.float32) * 2.0**-24
