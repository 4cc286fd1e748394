"""Single-agent PPO: one agent decides for all tokens of an image at once, the ablation of RL4EViT, Table II.

The actor is MAPPO's, token by token, so that a joint action is a product of independent choices. What differs is the
credit: one reward, one value, one advantage and one probability ratio, that of the joint action, per image and step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from tianshou.data import ReplayBuffer
from tianshou.data.types import BatchWithAdvantagesProtocol, LogpOldProtocol, RolloutBatchProtocol
from torch import Tensor, nn

from ...engine.tokens import segment_mean
from ...game.rewards import START_PRICE, RewardFn, TeamOutcome
from ..networks import TokenCritic
from .advantage import generalized_advantage
from .buffer import GameBuffer, Trajectory
from .learner import Parts
from .losses import policy_loss, value_loss
from .mappo import MAPPO, MAPPOConfig, in_fp32


class ImageCritic(nn.Module):
    """An image's tokens to one value: MAPPO's critic on their mean, plus a term linear in how many are left.

    The mean does not depend on how many tokens there are, but the price that is still to be paid is nearly proportional
    to that number.

    Args:
        embed_dim: D.
        hidden: widths of the hidden layers; None: those of MAPPO's critic.
        generator: of the initial weights; None: always the same ones.
        last_gain: of the last layer's weights, see `TokenCritic`.
        senses: names of what it sees beside a token, see `TokenCritic`.
    """

    def __init__(
        self,
        embed_dim: int,
        hidden: tuple[int, ...] | None = None,
        generator: torch.Generator | None = None,
        last_gain: float = 1.0,
        senses: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.mean = TokenCritic(embed_dim, hidden, generator, last_gain=last_gain, senses=senses)
        self.left = nn.Parameter(torch.zeros(()))

    def forward(self, mean: Tensor, cls: Tensor, left: Tensor) -> Tensor:
        """Values of images.

        Args:
            mean: `[S, D]`, mean of the alive tokens.
            cls: `[S, D]`, class tokens.
            left: `[S]`, share of all tokens that are alive.

        Returns:
            `[S]`.
        """
        return self.mean(mean, cls, torch.arange(len(mean), device=mean.device)) + self.left * left


Critic = TokenCritic | ImageCritic


@dataclass(frozen=True)
class ImageSteps:
    """The S = B * T joint decisions of a batch of games, image by image: that of image b in step t is row b * T + t."""

    row: Tensor  # [M] int64, the joint decision that each agent-step is a part of
    mean: Tensor  # [S, D] mean of the alive tokens
    cls: Tensor  # [S, D] class token
    left: Tensor  # [S] share of all tokens that are alive
    reward: Tensor  # [S] sum over the tokens

    @classmethod
    def of(cls, games: Trajectory) -> ImageSteps:
        """Means of the tokens and sums of the rewards of every image and step."""
        steps, images, _ = games.alive.shape
        row = games.image % images * steps + games.image // images
        return cls(
            row=row,
            mean=segment_mean(games.tokens, row, images * steps),
            cls=games.cls.unflatten(0, (steps, images)).transpose(0, 1).flatten(0, 1),
            left=games.alive.float().mean(dim=2).T.flatten(),
            reward=games.reward.sum(dim=2).T.flatten(),
        )


@dataclass(frozen=True)
class JointLanes:
    """What an update needs beside the agent-steps themselves."""

    seen: ImageSteps
    advantage: Tensor  # [S]
    value: Tensor  # [S] the critic's before the update
    target: Tensor  # [S] returns, in the critic's units


def joint_sum(values: Tensor, row: Tensor, rows: int) -> Tensor:
    """Sum what belongs to the same joint decision.

    Args:
        values: `[M]`, one per agent-step.
        row: `[M]` int64, the joint decision of each.
        rows: S.

    Returns:
        `[S]`, zero where no token acted.
    """
    return values.new_zeros(rows).index_add(0, row, values)


@dataclass(frozen=True)
class PPOSingleConfig(MAPPOConfig):
    """Single-agent PPO: one agent decides for all tokens of an image; settings as in `MAPPOConfig`."""

    joint: ClassVar[bool] = True

    def default_reward(self) -> RewardFn:
        """The reward of `train` if none is given."""
        return TeamOutcome(price=START_PRICE)

    def check_reward(self, reward: RewardFn) -> None:
        """Refuse a reward that is meant for single tokens.

        Raises:
            ValueError: unless the reward has an attribute `for_team` that is true.
        """
        if not getattr(reward, "for_team", False):
            raise ValueError(
                f"reward: expected one for a team, such as TeamOutcome, with single-agent PPO (others pay token by "
                f"token), got {type(reward).__name__}"
            )

    def critic(self, embed_dim: int, num_actions: int, generator: torch.Generator) -> nn.Module:
        """The network that values images."""
        widths = self.networks.critic_widths(embed_dim)
        return ImageCritic(embed_dim, widths, generator, last_gain=0.0, senses=self.networks.senses)

    def algorithm(self, parts: Parts) -> PPOSingle:
        """Single-agent PPO with these settings."""
        return PPOSingle(critic=cast(Any, parts.critic), **self.arguments(parts))


class PPOSingle(MAPPO):
    """PPO with joint actions: the log-probability of an action is the sum over the tokens it decides for.

    The rewards of all tokens of an image are summed to one (`TeamOutcome` is meant for that), GAE runs over the steps
    of an image, and Eq. 3 clips the joint ratio once per image and step. The entropy is that of the joint action, the
    sum over its tokens. Loop, optimiser and arguments are MAPPO's, the critic is an `ImageCritic`. A minibatch holds
    whole images: as many as have its number of agent-steps on average, so that there are as many gradient steps, on as
    many tokens, as in MAPPO.
    """

    @property
    def token_critic(self) -> TokenCritic:
        """The part of the critic that looks at features."""
        return cast(ImageCritic, self.critic).mean

    @torch.no_grad()
    def _add_returns_and_advantages(
        self, batch: RolloutBatchProtocol, buffer: ReplayBuffer, indices: Any
    ) -> BatchWithAdvantagesProtocol:
        """GAE on the table `[T, B]` of joint rewards; kept beside the batch, whose rows are agent-steps."""
        assert isinstance(buffer, GameBuffer)
        games, seen = buffer.trajectory, ImageSteps.of(buffer.trajectory)
        steps, images, _ = games.alive.shape
        with self._autocast():
            predicted = self.critic(seen.mean, seen.cls, seen.left).float()
        value = predicted if self.value_norm is None else self.value_norm.denormalize(predicted)
        reward, table = (column.view(images, steps).T for column in (seen.reward, value))
        ended = torch.zeros(steps, images, dtype=torch.bool, device=value.device)
        ended[-1] = True
        acted = torch.ones_like(ended)
        advantage = generalized_advantage(reward, table, acted, ended, self.gamma, self.gae_lambda).T.flatten()
        self._joint = JointLanes(seen, advantage, predicted, self._targets(advantage + value, value))
        self._agent_steps = self.processes.span(len(games))[1]
        return cast(BatchWithAdvantagesProtocol, batch)

    def _lanes(self, games: Trajectory, batch: LogpOldProtocol) -> Any:
        return self._joint

    def _minibatches(self, length: int, size: int | None) -> Iterator[Tensor]:
        """Random joint decisions in nearly equal groups, with `size` agent-steps in each on average."""
        count = 1 if size is None else max(1, min(self._agent_steps // size, length // 2))
        for group in torch.randperm(length, generator=self.generator).tensor_split(count):
            yield group.sort().values

    def _gradient(self, lanes: Any, images: Tensor, rows: Tensor, advantage: Tensor, everyones: int) -> Tensor:
        """As MAPPO's, but rows are joint decisions, and a chunk has all agent-steps of each of its rows."""
        log = advantage.new_zeros(6)
        games = cast(GameBuffer, self._buffer).trajectory
        per_row = max(1, len(games) // len(lanes.advantage))
        size = max(1, self._chunk_size(len(games)) // per_row)
        for chunk, of_chunk in zip(rows.split(size), advantage.split(size), strict=True):
            if len(chunk):
                loss, part = self._joint_loss(games, lanes, chunk, of_chunk)
                share = len(chunk) / everyones
                (share * loss).backward()
                log += share * part
        return log

    def _joint_loss(
        self, games: Trajectory, lanes: JointLanes, rows: Tensor, advantage: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Total loss on some joint decisions, and what `_loss` returns."""
        seen = lanes.seen
        place = torch.full((len(seen.left),), -1, device=rows.device)
        place[rows] = torch.arange(len(rows), device=rows.device)
        mine = (place[seen.row] >= 0).nonzero().squeeze(1)
        row = place[seen.row[mine]]
        with self._autocast():
            logits = in_fp32(self.actor(games.tokens[mine]))
            value = self.critic(seen.mean[rows], seen.cls[rows], seen.left[rows]).float()
        chance = self.actions.distribution(logits, None if games.mask is None else games.mask[mine])
        log_ratio = joint_sum(chance.log_prob(games.action[mine]) - games.log_prob[mine], row, len(rows))
        ratio = log_ratio.exp()
        actor_loss = policy_loss(ratio, advantage, self.eps_clip, self.dual_clip)
        vf_loss = value_loss(value, lanes.value[rows], lanes.target[rows], self.value_eps, self.huber_delta)
        entropy = joint_sum(chance.entropy(), row, len(rows)).mean()
        loss = actor_loss + self.vf_coef * vf_loss - self.ent_coef * entropy
        with torch.no_grad():
            approx_kl = (ratio - 1 - log_ratio).mean()
            clip_frac = ((ratio - 1).abs() > self.eps_clip).float().mean()
            return loss, torch.stack([loss, actor_loss, vf_loss, entropy, approx_kl, clip_frac])
