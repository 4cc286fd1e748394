"""The learnt policy, as deployed (greedy) and as it explores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..policy import BasePolicy, register_policy
from ..types import Decision, Observation, Site
from .learners.noise import exploration_noise
from .networks import TokenActor, keep_log_prob


@register_policy("token_policy")
class TokenPolicy(BasePolicy, nn.Module):
    """Keeps the tokens whose log-odds of being kept exceed a threshold; deterministic.

    Args:
        actor: the network that decides.
        threshold: in logits; 0 is the most probable action, calibration moves it to meet a budget.
        sites: where the actor was trained to act; None: the backbone's own.
        info: what is worth knowing about its origin (backbone, budget, seed); JSON values.
    """

    def __init__(
        self,
        actor: TokenActor,
        threshold: float = 0.0,
        sites: Sequence[int | str | Site] | None = None,
        info: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.actor = actor
        self.threshold = float(threshold)
        self.sites = None if sites is None else tuple(Site.parse(site) for site in sites)
        self.info = dict(info or {})

    def default_sites(self, depth: int) -> Sequence[int | str | Site] | None:
        """Where it was trained to act."""
        return self.sites

    @torch.no_grad()
    def decide(self, obs: Observation) -> Decision:
        """Compare every alive token with the threshold."""
        # Rounded to half precision, logits near the threshold would no longer meet the budget it was calibrated for.
        with full_precision(obs.tokens.device.type):
            keep = self.actor.keep_logit(obs.tokens) > self.threshold
        return Decision(keep=obs.scatter(keep, fill=False), macs=decision_macs(self.actor, obs))

    def with_threshold(self, threshold: float) -> TokenPolicy:
        """The same policy, sharing its weights, with another threshold."""
        return TokenPolicy(self.actor, threshold, self.sites, self.info)

    @property
    def width(self) -> int:
        """Embedding width of the networks that it can prune."""
        return self.actor.embed_dim

    def config(self) -> dict[str, Any]:
        """All that `from_config` needs beside the actor's weights, as JSON values."""
        return {
            "embed_dim": self.actor.embed_dim,
            "hidden": list(self.actor.hidden),
            "threshold": self.threshold,
            "sites": None if self.sites is None else [site.label for site in self.sites],
            "info": self.info,
        }

    @classmethod
    def from_config(cls, embed_dim: int, hidden: Sequence[int], **settings: Any) -> TokenPolicy:
        """The policy that gave this `config()`, with fresh weights."""
        return cls(TokenActor(embed_dim, hidden), **settings)

    def extra_repr(self) -> str:
        """Threshold and sites."""
        sites = None if self.sites is None else [site.label for site in self.sites]
        return f"threshold={self.threshold:.4g}, sites={sites}"


class ExploringPolicy(BasePolicy):
    """Samples every decision and remembers how probable it was, for training.

    Attributes:
        actions: one `[sum n_i]` bool per step of the current games, True = keep.
        log_probs: one `[sum n_i]` float per step, log-probability of the actions.
        next_game: number of the first game of the coming batch; the noise of a game follows from it.

    Args:
        actor: the network that decides.
        generator: gives the noise its seed; nothing is drawn from it.
    """

    def __init__(self, actor: TokenActor, generator: torch.Generator) -> None:
        self.actor = actor
        self.seed = generator.initial_seed()
        self.next_game = 0
        self._first_game = 0
        self.actions: list[Tensor] = []
        self.log_probs: list[Tensor] = []

    def reset(self, batch_size: int, num_agents: int) -> None:
        """Forget the last games."""
        self._first_game, self.next_game = self.next_game, self.next_game + batch_size
        self.actions, self.log_probs = [], []

    def view(self, obs: Observation) -> Observation:
        """What actor and critic see of an observation."""
        return obs

    @torch.no_grad()
    def decide(self, obs: Observation) -> Decision:
        """Draw keep or prune for every alive token."""
        # Log-probabilities in half precision would not be those that the update computes.
        with full_precision(obs.tokens.device.type):
            logit = self.actor.keep_logit(obs.tokens.float())
        noise = exploration_noise(self.seed, self._first_game + obs.image, obs.step, obs.token)
        keep = noise < logit.sigmoid()
        self.actions.append(keep)
        self.log_probs.append(keep_log_prob(logit, keep))
        return Decision(keep=obs.scatter(keep, fill=False), macs=decision_macs(self.actor, obs))


def full_precision(device_type: str) -> AbstractContextManager[object]:
    """Suspend autocast where it is on; elsewhere nothing, lest exported graphs carry it."""
    active = torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if active else nullcontext()


def decision_macs(actor: TokenActor, obs: Observation) -> Tensor:
    """MACs per image of letting the actor look at every alive token, `[B]` float64."""
    return obs.num_alive.double() * actor.macs_per_token
