"""Single-agent PPO: one agent decides for all tokens of an image at once, the ablation of paper 000, Table II.

The actor is MAPPO's, token by token, so that a joint action is a product of independent choices. What differs is the
credit: one reward, one value, one advantage and one probability ratio, that of the joint action, per image and step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from gymnasium.spaces import Discrete
from tianshou.algorithm import PPO
from tianshou.algorithm.modelfree.a2c import A2CTrainingStats
from tianshou.algorithm.optim import AdamOptimizerFactory, OptimizerFactory
from tianshou.data import ReplayBuffer, SequenceSummaryStats
from tianshou.data.types import BatchWithAdvantagesProtocol, LogpOldProtocol, RolloutBatchProtocol
from torch import Tensor, nn

from ..errors import NumericalError
from ..tokens import segment_mean
from .advantage import generalized_advantage
from .buffer import GameBuffer, Trajectory
from .mappo import _ActorOnRows, _TokenwisePolicy, policy_loss, value_loss
from .networks import TokenActor, TokenCritic, keep_entropy, keep_log_prob
from .value_norm import ValueNorm


class ImageCritic(nn.Module):
    """An image's tokens to one value: MAPPO's critic on their mean, plus a term linear in how many are left.

    The mean does not say how many tokens there are, and what is yet to pay is nearly proportional to that.

    Args:
        embed_dim: D.
        hidden: widths of the hidden layers; None: those of MAPPO's critic.
        generator: of the initial weights; None: always the same ones.
    """

    def __init__(
        self, embed_dim: int, hidden: tuple[int, ...] | None = None, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.mean = TokenCritic(embed_dim, hidden, generator)
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
    """The S = T * B joint decisions of a batch of games; that of image b in step t is row t * B + b."""

    mean: Tensor  # [S, D] mean of the alive tokens
    left: Tensor  # [S] share of all tokens that are alive
    value: Tensor  # [S] before the update, in the critic's (maybe normalised) units
    advantage: Tensor  # [S]
    returns: Tensor  # [S] in the critic's units


def joint_sum(values: Tensor, row: Tensor, rows: int) -> Tensor:
    """Sum what belongs to the same image and step.

    Args:
        values: `[M]`, one per agent-step.
        row: `[M]` int64, the image-step of each.
        rows: S, number of image-steps.

    Returns:
        `[S]`, zero where no token acted.
    """
    return values.new_zeros(rows).index_add(0, row, values)


@dataclass(kw_only=True)
class PPOSingleStats(A2CTrainingStats):
    """What an update did; the names are those of MAPPO's."""

    approx_kl: float  # of joint actions: mean of (ratio - 1) - log(ratio) over the last epoch
    clip_frac: float  # share of image-steps whose joint ratio lay outside the clipping range
    explained_variance: float  # of the returns, by the critic before the update


class PPOSingle(PPO):
    """PPO with joint actions: the log-probability of an action is the sum over the tokens it decides for.

    The rewards of all tokens of an image are summed to one (`TeamOutcome` is meant for that), GAE runs over the steps
    of an image, and Eq. 3 clips the joint ratio once per image and step. The entropy is that of the joint action, the
    sum over its tokens.

    Args:
        actor: decides from a token alone, for every token.
        critic: values an image; training only.
        optim: of both networks together; None: Adam with `lr=1e-3, eps=1e-5`.
        clip: range of the joint probability ratio.
        value_clip: range of the new value around the old one; None: no clipping.
        dual_clip: see `policy_loss`.
        huber_delta: see `value_loss`.
        value_norm: whether the critic learns returns of running zero mean and unit variance.
        advantage_normalization: whether advantages are standardised in every minibatch.
        recompute_advantage: whether values and advantages are computed anew before every epoch after the first.
        vf_coef: weight of the value loss.
        ent_coef: weight of the entropy bonus.
        max_grad_norm: of the joint gradient; None: no clipping.
        gae_lambda: lambda of the advantage estimate.
        gamma: discount. Games are short, 1 is right.
        generator: of the minibatches; a CPU generator. None: seeded with 0.

    Raises:
        ValueError: for a `dual_clip` of 1 or less.
    """

    def __init__(
        self,
        *,
        actor: TokenActor,
        critic: ImageCritic,
        optim: OptimizerFactory | None = None,
        clip: float = 0.2,
        value_clip: float | None = 0.2,
        dual_clip: float | None = None,
        huber_delta: float | None = None,
        value_norm: bool = False,
        advantage_normalization: bool = True,
        recompute_advantage: bool = False,
        vf_coef: float = 0.5,
        ent_coef: float = 0.0,
        max_grad_norm: float | None = 0.5,
        gae_lambda: float = 0.95,
        gamma: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        if dual_clip is not None and dual_clip <= 1:
            raise ValueError(f"dual_clip: expected above 1 or None, got {dual_clip!r}")
        super().__init__(
            # tianshou's policy holds the actor; joint actions are drawn by `ExploringPolicy`, token by token.
            policy=_TokenwisePolicy(actor=cast(Any, _ActorOnRows(actor)), action_space=Discrete(2)),
            critic=critic,
            optim=AdamOptimizerFactory(lr=1e-3, eps=1e-5) if optim is None else optim,
            eps_clip=clip,
            dual_clip=dual_clip,
            value_clip=value_clip is not None,
            advantage_normalization=advantage_normalization,
            recompute_advantage=recompute_advantage,
            vf_coef=vf_coef,
            ent_coef=ent_coef,
            max_grad_norm=max_grad_norm,
            gae_lambda=gae_lambda,
            gamma=gamma,
        )
        self.actor = actor
        self.value_eps = value_clip
        self.huber_delta = huber_delta
        self.value_norm = ValueNorm() if value_norm else None
        self.generator = torch.Generator().manual_seed(0) if generator is None else generator

    def _preprocess_batch(
        self, batch: RolloutBatchProtocol, buffer: ReplayBuffer, indices: np.ndarray
    ) -> LogpOldProtocol:
        """Prepare the image-steps; the log-probabilities of the rollout are reused as they are."""
        return cast(LogpOldProtocol, self._add_returns_and_advantages(batch, buffer, indices))

    def _add_returns_and_advantages(
        self, batch: RolloutBatchProtocol, buffer: ReplayBuffer, indices: np.ndarray
    ) -> BatchWithAdvantagesProtocol:
        """Kept beside the batch, whose rows are agent-steps."""
        assert isinstance(buffer, GameBuffer)
        self._games = buffer.trajectory
        self._seen = self._image_steps(self._games)
        return cast(BatchWithAdvantagesProtocol, batch)

    @torch.no_grad()
    def _image_steps(self, games: Trajectory) -> ImageSteps:
        """Values, and GAE on the table `[T, B]` of joint rewards."""
        steps, images, _ = games.alive.shape
        mean = segment_mean(games.tokens, games.image, steps * images)
        left = games.alive.float().mean(dim=2).flatten()
        predicted = self.critic(mean, games.cls, left)
        value = predicted if self.value_norm is None else self.value_norm.denormalize(predicted)
        ended = torch.zeros(steps, images, dtype=torch.bool, device=left.device)
        ended[-1] = True
        advantage = generalized_advantage(
            games.reward.sum(dim=2),
            value.view(steps, images),
            torch.ones_like(ended),
            ended,
            self.gamma,
            self.gae_lambda,
        ).flatten()
        returns = advantage + value
        self._explained = float(1 - (returns - value).var() / returns.var().clamp(min=1e-12))
        if self.value_norm is not None:
            self.value_norm.update(returns)
            returns = self.value_norm.normalize(returns)
        return ImageSteps(mean, left, predicted, advantage, returns)

    def _update_with_batch(self, batch: LogpOldProtocol, batch_size: int | None, repeat: int) -> PPOSingleStats:
        """`repeat` epochs of minibatches of whole images, with `batch_size` agent-steps in each on average.

        So there are as many gradient steps, on as many tokens, as MAPPO takes.

        Raises:
            NumericalError: if a loss is not finite.
        """
        games, explained = self._games, self._explained
        count = 1 if batch_size is None else max(1, len(games) // batch_size)
        logs: list[Tensor] = []
        last_epoch = 0
        for epoch in range(repeat):
            last_epoch = len(logs)
            if self.recompute_adv and epoch > 0:
                self._seen = self._image_steps(games)
            for rows in self._minibatches(len(games.cls), count):
                loss, log = self._loss(games, self._seen, rows.to(games.tokens.device))
                self.optim.step(loss)
                logs.append(log)
        table = torch.stack(logs).cpu()
        if not torch.isfinite(table).all():
            bad = int((~torch.isfinite(table)).any(dim=1).sum())
            raise NumericalError(
                f"loss: expected finite numbers, got NaN or infinity in {bad} of {len(table)} minibatches; "
                "training stops and the last checkpoint is kept (a smaller learning rate may help)"
            )
        loss, actor_loss, vf_loss, ent_loss, _, _ = (SequenceSummaryStats.from_sequence(c.tolist()) for c in table.T)
        approx_kl, clip_frac = table[last_epoch:, 4:].mean(0).tolist()
        return PPOSingleStats(
            loss=loss,
            actor_loss=actor_loss,
            vf_loss=vf_loss,
            ent_loss=ent_loss,
            gradient_steps=len(table),
            approx_kl=approx_kl,
            clip_frac=clip_frac,
            explained_variance=explained,
        )

    def _minibatches(self, length: int, count: int) -> Iterator[Tensor]:
        """Random rows in `count` groups of nearly the same size, of two rows at least."""
        order = torch.randperm(length, generator=self.generator)
        yield from order.tensor_split(max(1, min(count, length // 2)))

    def _loss(self, games: Trajectory, seen: ImageSteps, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Total loss on some image-steps, and detached `[6]`: total, policy, value, entropy, KL, clipped share."""
        advantage = seen.advantage[rows]
        if self.advantage_normalization:
            advantage = (advantage - advantage.mean()) / (advantage.std() + self._eps)
        place = torch.full((len(games.cls),), -1, device=rows.device)
        place[rows] = torch.arange(len(rows), device=rows.device)
        mine = (place[games.image] >= 0).nonzero().squeeze(1)
        row = place[games.image[mine]]
        logit = self.actor.keep_logit(games.tokens[mine])
        log_ratio = joint_sum(keep_log_prob(logit, games.keep[mine]) - games.log_prob[mine], row, len(rows))
        ratio = log_ratio.exp()
        actor_loss = policy_loss(ratio, advantage, self.eps_clip, self.dual_clip)
        value = self.critic(seen.mean[rows], games.cls[rows], seen.left[rows])
        vf_loss = value_loss(value, seen.value[rows], seen.returns[rows], self.value_eps, self.huber_delta)
        entropy = joint_sum(keep_entropy(logit), row, len(rows)).mean()
        loss = actor_loss + self.vf_coef * vf_loss - self.ent_coef * entropy
        with torch.no_grad():
            approx_kl = (ratio - 1 - log_ratio).mean()
            clip_frac = ((ratio - 1).abs() > self.eps_clip).float().mean()
            return loss, torch.stack([loss, actor_loss, vf_loss, entropy, approx_kl, clip_frac])
