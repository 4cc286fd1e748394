"""One batch of finished games, presented to tianshou as flat live agent-steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from tianshou.data import Batch, ReplayBuffer
from tianshou.data.types import RolloutBatchProtocol
from torch import Tensor

from ...engine.tokens import segment_mean
from ...errors import NumericalError
from ...types import Episode
from ..networks import standardize
from .advantage import generalized_advantage


def context_width(embed_dim: int) -> int:
    """Columns of `Trajectory.context` for tokens of width `embed_dim`."""
    return embed_dim + 2


@dataclass(frozen=True)
class Trajectory:
    """The M live agent-steps of a batch of games, agent by agent, the steps of an agent in sequence.

    That is the order in which tianshou's own buffers hold episodes. Tables `[T, B, N]` and flat rows `[M]` are
    converted by `flat` and `dense`.
    """

    tokens: Tensor  # [M, D] each agent's own token
    cls: Tensor  # [T * B, D] the class token of each image at each step
    image: Tensor  # [M] int64, row of `cls` that belongs to each agent-step
    action: Tensor  # [M] int64, the action drawn
    log_prob: Tensor  # [M] its log-probability when it was drawn
    reward: Tensor  # [T, B, N]
    alive: Tensor  # [T, B, N] bool, agents that acted; those that wait do not
    terminated: Tensor  # [T, B, N] bool, agents whose game ended with that action
    mask: Tensor | None = None  # [M, A] bool, actions that made sense; None: all of them
    noise: Tensor | None = None  # [B, ...], what the parameters were disturbed by in each game; None: they were not

    def context(self) -> Tensor:
        """What a critic is told of each image at each step beside its class token, `[T * B, context_width(D)]`.

        The mean of the alive tokens, standardised; their share of all tokens; and how far the game has come, from 0 at
        the first site to 1 at the last. A further input is one more column here, and one more in `context_width`.
        """
        steps, images, _ = self.alive.shape
        mean = standardize(segment_mean(self.tokens, self.image, steps * images))
        share = self.alive.to(mean).mean(dim=2).flatten()
        progress = torch.linspace(0, 1, steps).to(mean).repeat_interleave(images)
        return torch.cat([mean, share[:, None], progress[:, None]], dim=1)

    @classmethod
    def of(
        cls, episode: Episode, actions: Sequence[Tensor], log_probs: Sequence[Tensor], masks: Sequence[Tensor] = ()
    ) -> Trajectory:
        """Collect the observations and actions of an exploring policy.

        Args:
            episode: a recorded episode with rewards.
            actions: per step `[sum n_i]` int64.
            log_probs: per step `[sum n_i]`.
            masks: per step `[sum n_i, A]` bool, actions that made sense; empty: all of them.

        Raises:
            ValueError: if the episode was played without labels or without recording.
            NumericalError: if a reward is not finite.
        """
        if episode.reward is None or not episode.observations:
            raise ValueError("episode: expected one played with labels and record=True")
        if not torch.isfinite(episode.reward).all():
            raise NumericalError("reward: expected finite numbers, got NaN or infinity")
        alive = torch.stack([obs.alive for obs in episode.observations])
        steps, batch, _ = alive.shape
        rows = _agent_major_rows(alive)
        total = int(alive.sum())
        first = episode.observations[0].tokens
        tokens = first.new_empty(total, first.shape[1])
        image = torch.empty(total, dtype=torch.int64, device=first.device)
        action = torch.empty(total, dtype=torch.int64, device=first.device)
        log_prob = first.new_empty(total)
        mask = masks[0].new_empty(total, masks[0].shape[1]) if masks else None
        for step, obs in enumerate(episode.observations):
            row = rows[step, obs.image, obs.token]
            tokens[row] = obs.tokens
            image[row] = obs.image + step * batch
            action[row] = actions[step]
            log_prob[row] = log_probs[step]
            if mask is not None:
                mask[row] = masks[step]
        classes = torch.cat([obs.cls for obs in episode.observations])
        assert len(classes) == steps * batch
        terminated = alive & episode.terminated
        return cls(tokens, classes, image, action, log_prob, episode.reward, alive, terminated, mask)

    def __len__(self) -> int:
        return len(self.tokens)

    def advantage(self, value: Tensor, discount: float, trace: float) -> Tensor:
        """Generalised advantage estimates, see `generalized_advantage`.

        Args:
            value: `[M]`, of each agent-step.
            discount: gamma, 0 to 1.
            trace: lambda, 0 to 1.

        Returns:
            `[M]`; advantage + value are the TD(lambda) returns.
        """
        table = self.dense(value)
        return self.flat(generalized_advantage(self.reward, table, self.alive, self.terminated, discount, trace))

    def flat(self, table: Tensor) -> Tensor:
        """The live entries of `[T, B, N]` as `[M]`, agent by agent."""
        return table.permute(1, 2, 0)[self.alive.permute(1, 2, 0)]

    def dense(self, values: Tensor) -> Tensor:
        """`[M]` spread over `[T, B, N]`, zero where no agent acted."""
        steps, batch, agents = self.alive.shape
        table = values.new_zeros(batch, agents, steps)
        table[self.alive.permute(1, 2, 0)] = values
        return table.permute(2, 0, 1)


@dataclass(frozen=True)
class Lanes:
    """The M live agent-steps of a `Trajectory`, prepared for the update of both networks."""

    tokens: Tensor  # [M, D] standardised
    image: Tensor  # [M] int64, row of the trajectory's `cls`
    action: Tensor  # [M] int64, the action drawn
    log_prob: Tensor  # [M] its log-probability when it was drawn
    advantage: Tensor  # [M]
    value: Tensor  # [M] the critic's before the update
    target: Tensor  # [M] returns, in the critic's units
    mask: Tensor | None = None  # [M, A] bool, actions that made sense; None: all of them

    def take(self, rows: Tensor) -> Lanes:
        """Some of them, `[rows]` int64."""
        columns = {name: column for name, column in vars(self).items() if column is not None}
        return Lanes(**{name: column.index_select(0, rows) for name, column in columns.items()})


def _agent_major_rows(alive: Tensor) -> Tensor:
    """Row of each live agent-step when they are sorted agent by agent, `[T, B, N]` int64."""
    by_agent = alive.permute(1, 2, 0)
    return (by_agent.flatten().cumsum(0) - 1).view(by_agent.shape).permute(2, 0, 1)


class GameBuffer(ReplayBuffer):
    """Holds one `Trajectory`; filled by the collector, emptied after the update."""

    def __init__(self) -> None:
        super().__init__(size=1)
        self._trajectory: Trajectory | None = None

    def store(self, trajectory: Trajectory) -> None:
        """Replace the stored games."""
        self._trajectory = trajectory

    @property
    def trajectory(self) -> Trajectory:
        """The stored games.

        Raises:
            RuntimeError: if there are none.
        """
        if self._trajectory is None:
            raise RuntimeError("buffer: nothing was collected since the last update")
        return self._trajectory

    def __len__(self) -> int:
        return 0 if self._trajectory is None else len(self._trajectory)

    def reset(self, keep_statistics: bool = False) -> None:
        """Remove the stored games."""
        super().reset(keep_statistics)
        self._trajectory = None

    def hasnull(self) -> bool:
        """False: `Trajectory.of` refuses rewards that are not finite."""
        return False

    def unfinished_index(self) -> np.ndarray:
        """None: games are always played to the end."""
        return np.empty(0, dtype=np.int64)

    def sample(self, batch_size: int | None) -> tuple[RolloutBatchProtocol, np.ndarray]:
        """All live agent-steps, in order; rewards and flags as numpy, which is what tianshou computes returns with.

        Raises:
            ValueError: if asked for a part of them (on-policy algorithms ask for all, with 0).
        """
        if batch_size != 0:
            raise ValueError(f"batch_size: expected 0 (all agent-steps), got {batch_size}")
        trajectory = self.trajectory
        terminated = trajectory.flat(trajectory.terminated).cpu().numpy()
        batch = Batch(
            obs=Batch(token=trajectory.tokens, image=trajectory.image),
            act=trajectory.action,
            rew=trajectory.flat(trajectory.reward).cpu().numpy(),
            terminated=terminated,
            truncated=np.zeros_like(terminated),
            done=terminated,
            logp_old=trajectory.log_prob,
        )
        return cast(RolloutBatchProtocol, batch), np.arange(len(trajectory))
