"""tianshou's collector for the token game: one call plays one batch of games, without any per-agent Python."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch
from gymnasium.spaces import Discrete
from tianshou.algorithm import Algorithm
from tianshou.data import CollectStats
from tianshou.data.collector import BaseCollector
from tianshou.env import BaseVectorEnv
from torch import Tensor

from ...engine.tokens import TokenState
from ...game.rollout import play
from ...game.token_game import TokenGame
from ...types import Episode
from ..learners.buffer import GameBuffer, Trajectory
from ..learners.exploration import ExploringPolicy
from ..shared.processes import Processes

DrawImages = Callable[[int], tuple[Tensor | TokenState, Tensor]]


@dataclass(kw_only=True)
class GameStats(CollectStats):
    """What a batch of games looked like, means over its images."""

    accuracy: float = 0.0
    """Share of images classified correctly under exploring play."""
    macs: float = 0.0
    """MACs per image, policy included."""
    policy_macs: float = 0.0
    """The part of `macs` spent on the policy."""
    keep: dict[str, float] = field(default_factory=dict)
    """Share of all tokens alive after each site."""


@dataclass(frozen=True)
class GameResults:
    """How a batch of games ended."""

    n_kept: Tensor  # [B, T] int64, tokens that go on after each site
    macs: Tensor  # [B] float64, MACs of each image, policy included
    correct: Tensor  # [B] bool


class GameCollector(BaseCollector[GameStats]):
    """Plays a batch of games with an exploring policy and stores its live agent-steps.

    Args:
        algorithm: its policy is switched between training and evaluation mode by tianshou.
        explorer: the policy that plays.
        game: what is played; its `reward` may be replaced between calls.
        draw: how to get this process's share of a number of images (or prepared states), with labels.
        buffer: where the agent-steps go.
        processes: the processes that train together; statistics are over the games of all of them.
        amp: whether the backbone runs in bfloat16 where that is safe (`torch.autocast`); the actor never does.

    Attributes:
        played: games played in this run, by all processes.
        last: results of the last batch of games, of all processes.
    """

    def __init__(
        self,
        algorithm: Algorithm[Any, Any],
        explorer: ExploringPolicy,
        game: TokenGame,
        draw: DrawImages,
        buffer: GameBuffer | None = None,
        processes: Processes | None = None,
        amp: bool = False,
    ) -> None:
        self.processes = Processes() if processes is None else processes
        self.amp = amp
        self.played = 0
        self.last: GameResults | None = None
        self.explorer = explorer
        self.game = game
        self.draw = draw
        self.games = GameBuffer() if buffer is None else buffer
        super().__init__(
            algorithm,
            cast(BaseVectorEnv, _Board()),
            self.games,
            collect_stats_class=GameStats,
            raise_on_nan_in_buffer=False,
        )

    def _validate_buffer(self) -> None:
        """A `GameBuffer` takes any number of agents."""

    def reset_env(self, gym_reset_kwargs: dict[str, Any] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Nothing to do: every collection starts new games."""
        return np.empty(0), np.empty(0)

    def reset_buffer(self, keep_statistics: bool = False) -> None:
        """Forget the games played."""
        self.games.reset(keep_statistics)

    def _collect(
        self,
        n_step: int | None = None,
        n_episode: int | None = None,
        random: bool = False,
        render: float | None = None,
        gym_reset_kwargs: dict[str, Any] | None = None,
    ) -> GameStats:
        """Play `n_episode` games (images) to the end.

        Raises:
            ValueError: if asked for a number of steps.
        """
        if n_episode is None:
            raise ValueError(f"n_episode: expected a number of images, got None and n_step={n_step}")
        self.explorer.next_game = self.played + self.processes.share(n_episode).start
        self.played += n_episode
        images, labels = self.draw(n_episode)
        with torch.autocast(labels.device.type, torch.bfloat16, enabled=self.amp):
            episode = play(self.game, self.explorer, images, labels, record=True)
        seen = replace(episode, observations=tuple(map(self.explorer.view, episode.observations)))
        played = Trajectory.of(seen, self.explorer.actions, self.explorer.log_probs, self.explorer.masks)
        self.games.store(replace(played, noise=self.explorer.noise))
        self.collect_step += n_episode * self.game.num_steps
        self.collect_episode += n_episode
        return self._stats(episode)

    def _stats(self, episode: Episode) -> GameStats:
        """Means over the games of all processes."""
        outcome, everyone = episode.outcome, self.processes.gather
        assert episode.reward is not None
        assert outcome.correct is not None
        n_kept = everyone(outcome.n_kept)
        self.last = results = GameResults(n_kept, everyone(outcome.macs), everyone(outcome.correct))
        batch, steps = n_kept.shape
        rates = (n_kept.double().mean(dim=0) / self.game.num_agents).tolist()
        return GameStats(
            n_collected_episodes=batch,
            n_collected_steps=batch * steps,
            returns=everyone(episode.reward.sum(dim=0).mean(dim=1).double()).cpu().numpy(),
            lens=np.full(batch, steps),
            accuracy=float(results.correct.double().mean()),
            macs=float(results.macs.mean()),
            policy_macs=float(everyone(outcome.policy_macs).mean()),
            keep={site.label: rate for site, rate in zip(self.game.sites, rates, strict=True)},
        )


class _Board:
    """What `BaseCollector` reads of an environment; the game itself is played by `play`."""

    action_space = Discrete(2)

    def __len__(self) -> int:
        return 1

    def close(self) -> None:
        """Nothing to close."""
