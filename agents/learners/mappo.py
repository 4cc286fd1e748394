"""MAPPO: tianshou's PPO on the live agent-steps of the token game, with a critic that also sees the class token.

RL4EViT, Eq. 3 and 4 (after Yu et al., 2022). Without value normalisation and Huber loss an update equals tianshou's
stock PPO on the same flat agent-steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from tianshou.algorithm import PPO
from tianshou.algorithm.modelfree.a2c import A2CTrainingStats
from tianshou.algorithm.optim import AdamOptimizerFactory, OptimizerFactory
from tianshou.data import ReplayBuffer, SequenceSummaryStats
from tianshou.data.types import BatchWithAdvantagesProtocol, LogpOldProtocol, RolloutBatchProtocol
from torch import Tensor

from ...envs.actions import ActionKind, KeepActions
from ...envs.distributions import ActionDistribution
from ..networks import TokenActor, TokenCritic, standardize
from ..shared.processes import Processes
from ..shared.settings import check
from .buffer import GameBuffer, Lanes, Trajectory
from .gradient import GradientStep, Shared, chunk_rows
from .learner import LearnerConfig, Parts, finite_table, minibatches, tokenwise_policy
from .losses import normalized, policy_loss, value_loss
from .value_norm import ValueNorm

Precision = Literal["fp32", "bf16"]


@dataclass(kw_only=True)
class MAPPOStats(A2CTrainingStats):
    """What an update did; the names are those that CleanRL logs."""

    approx_kl: float  # mean of (ratio - 1) - log(ratio) over the last epoch
    clip_frac: float  # share of agent-steps whose ratio lay outside the clipping range
    explained_variance: float  # of the returns, by the critic before the update
    grad_norm: float  # of the joint gradient before clipping, mean over gradient steps


@dataclass(frozen=True)
class MAPPOConfig(LearnerConfig):
    """Multi-agent PPO: every token is an agent, all share actor and critic; the defaults learn best in minutes."""

    clip: float = 0.2
    """Range of the probability ratio (RL4EViT, Eq. 3)."""
    value_clip: float | None = 0.2
    """Range of the new value around the old one (Eq. 4); None: no clipping."""
    discount: float = 1.0
    """gamma; a game has as many steps as there are sites."""
    trace: float = 0.95
    """lambda of the advantage estimate."""
    entropy: float = 0.01
    """Weight of the entropy bonus."""
    value_coef: float = 0.5
    """Weight of the value loss."""
    normalize_advantages: bool = True
    """Whether advantages are standardised in every minibatch."""
    value_norm: bool = False
    """Whether the critic learns normalised returns."""
    huber_delta: float | None = None
    """Error above which the value loss grows linearly; None: squared error."""
    update_chunk: int | None = None
    """Agent-steps whose gradient is computed at once and summed over a minibatch: less memory, the same gradient. None:
    as many as fit the cache."""
    precision: Precision = "fp32"
    """Of the matrix products of an update: bf16 is faster where the processor has it, gradients then differ by per
    cents."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, "update_chunk", self.update_chunk is None or self.update_chunk >= 1, "at least 1 or None")
        check(self, "precision", self.precision in get_args(Precision), "'fp32' or 'bf16'")
        for name in ("value_clip", "huber_delta"):
            check(self, name, getattr(self, name) is None or getattr(self, name) > 0, "above 0 or None")
        for name in ("entropy", "value_coef"):
            check(self, name, getattr(self, name) >= 0, "at least 0")
        check(self, "clip", 0 < self.clip < 1, "between 0 and 1")
        for name in ("discount", "trace"):
            check(self, name, 0 <= getattr(self, name) <= 1, "0 to 1")

    def algorithm(self, parts: Parts) -> MAPPO:
        """MAPPO with these settings."""
        return MAPPO(critic=cast(TokenCritic, parts.critic), **self.arguments(parts))

    def arguments(self, parts: Parts) -> dict[str, Any]:
        """The arguments of `MAPPO`, but for the critic."""
        return {
            "actor": parts.actor,
            "optim": parts.optim,
            "actions": parts.actions,
            "generator": parts.generator,
            "clip": self.clip,
            "value_clip": self.value_clip,
            "huber_delta": self.huber_delta,
            "value_norm": self.value_norm,
            "advantage_normalization": self.normalize_advantages,
            "vf_coef": self.value_coef,
            "ent_coef": self.entropy,
            "max_grad_norm": self.max_grad_norm,
            "gae_lambda": self.trace,
            "gamma": self.discount,
            "update_chunk": self.update_chunk,
            "precision": self.precision,
        }


class MAPPO(PPO):
    """Multi-agent PPO with parameters shared by all tokens.

    Args:
        actor: decides from a token alone.
        critic: values a token given the class token of its image; training only.
        optim: of both networks together; None: Adam with `lr=1e-3, eps=1e-5`.
        clip: range of the probability ratio, Eq. 3.
        value_clip: range of the new value around the old one, Eq. 4; None: no clipping.
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
        max_batchsize: rows per critic pass outside of training, at most.
        update_chunk: agent-steps whose gradient is computed at once, those of a minibatch are summed: less memory, the
            same gradient. None: as many as `chunk_rows` says.
        precision: of the matrix products of an update; `bf16` runs them under `torch.autocast`, parameters, losses
            and sums over chunks stay in fp32. Play is not affected.
        return_scaling: not supported; `value_norm` serves the same purpose.
        generator: of the minibatches; a CPU generator. None: seeded with 0.
        actions: what the actor's actions mean; None: prune or keep.

    Raises:
        ValueError: for `return_scaling=True`, a `dual_clip` of 1 or less, an `update_chunk` below 1, or an unknown
            precision.
    """

    Optimizer = GradientStep
    processes = Processes()  # the processes that train together; `train` sets it

    def __init__(
        self,
        *,
        actor: TokenActor,
        critic: TokenCritic,
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
        max_batchsize: int = 16384,
        update_chunk: int | None = None,
        precision: Precision = "fp32",
        return_scaling: bool = False,
        generator: torch.Generator | None = None,
        actions: ActionKind | None = None,
    ) -> None:
        if return_scaling:
            raise ValueError("return_scaling: expected False, got True; use value_norm=True to normalise returns")
        if dual_clip is not None and dual_clip <= 1:
            raise ValueError(f"dual_clip: expected above 1 or None, got {dual_clip!r}")
        if update_chunk is not None and update_chunk < 1:
            raise ValueError(f"update_chunk: expected at least 1 or None, got {update_chunk!r}")
        if precision not in get_args(Precision):
            raise ValueError(f"precision: expected one of {', '.join(get_args(Precision))}, got {precision!r}")
        super().__init__(
            policy=tokenwise_policy(actor),
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
            max_batchsize=max_batchsize,
            gamma=gamma,
        )
        self.actor = actor
        self.actions: ActionKind = KeepActions() if actions is None else actions
        self.update_chunk = update_chunk
        self.precision = precision
        self.value_eps = value_clip
        self.huber_delta = huber_delta
        self.value_norm = ValueNorm() if value_norm else None
        self.generator = torch.Generator().manual_seed(0) if generator is None else generator

    @property
    def token_critic(self) -> TokenCritic:
        """The critic as a `TokenCritic`."""
        return cast(TokenCritic, self.critic)

    def _preprocess_batch(
        self, batch: RolloutBatchProtocol, buffer: ReplayBuffer, indices: np.ndarray
    ) -> LogpOldProtocol:
        """Add values, returns and advantages; the log-probabilities of the rollout are reused as they are."""
        assert isinstance(buffer, GameBuffer)
        self._buffer, self._indices = buffer, indices
        seen = standardize(buffer.trajectory.tokens)
        self._seen = seen.bfloat16() if self.precision == "bf16" else seen
        games, told = buffer.trajectory, self.token_critic.context is not None
        self._images = torch.cat([games.cls, games.context()], dim=1) if told else games.cls
        return cast(LogpOldProtocol, self._add_returns_and_advantages(batch, buffer, indices))

    @torch.no_grad()
    def _add_returns_and_advantages(
        self, batch: RolloutBatchProtocol, buffer: ReplayBuffer, indices: np.ndarray
    ) -> BatchWithAdvantagesProtocol:
        """GAE on the dense table; `v_s` and `returns` are in the critic's (maybe normalised) units."""
        assert isinstance(buffer, GameBuffer)
        games = buffer.trajectory
        out = cast(Any, batch)
        out.v_s = self._values(games)
        value = out.v_s if self.value_norm is None else self.value_norm.denormalize(out.v_s)
        out.adv = games.advantage(value, self.gamma, self.gae_lambda)
        out.returns = self._targets(out.adv + value, value)
        return cast(BatchWithAdvantagesProtocol, batch)

    def _targets(self, returns: Tensor, value: Tensor) -> Tensor:
        """Returns in the critic's units, and how much of their variance it explained."""
        everyones = self.processes.gather(returns)
        error = everyones - self.processes.gather(value)
        self._explained = float(1 - error.var() / everyones.var().clamp(min=1e-12))
        if self.value_norm is None:
            return returns
        self.value_norm.update(everyones)
        return self.value_norm.normalize(returns)

    def _values(self, games: Trajectory) -> Tensor:
        """The critic on all live agent-steps, `[M]`."""
        with self._autocast():
            critic, size = self.token_critic, self._chunk_size(self.max_batchsize)
            shared = critic.folded(self._images)
            chunks = zip(self._seen.split(size), games.image.split(size), strict=True)
            return torch.cat([critic.value_folded(seen, image, *shared) for seen, image in chunks]).float()

    def _update_with_batch(self, batch: LogpOldProtocol, batch_size: int | None, repeat: int) -> MAPPOStats:
        """`repeat` epochs of minibatches of `batch_size` agent-steps.

        The loop is tianshou's. It is written anew here because splitting a `Batch` copies every field, and because
        stock PPO draws an action in every forward pass and synchronises four times per minibatch.

        Raises:
            NumericalError: if a loss is not finite.
        """
        games = cast(GameBuffer, self._buffer).trajectory
        step = cast(GradientStep, self.optim).step_along
        logs: list[Tensor] = []
        explained, last_epoch = self._explained, 0
        for epoch in range(repeat):
            last_epoch = len(logs)
            if self.recompute_adv and epoch > 0:
                self._add_returns_and_advantages(batch, self._buffer, self._indices)
            lanes = self._lanes(games, batch)
            advantage = self.processes.gather(lanes.advantage)
            first, total = self.processes.span(len(lanes.advantage))
            for rows in self._minibatches(total, batch_size):
                rows = rows.to(games.tokens.device)
                own = (rows >= first) & (rows < first + len(lanes.advantage))
                some = normalized(advantage[rows], self._eps) if self.advantage_normalization else advantage[rows]
                part = rows[own] - first, some[own], len(rows)
                log, norm = step(partial(self._gradient, lanes, self._images, *part), self.processes)
                logs.append(torch.cat([log, norm[None]]))
        table = finite_table(logs, 6, self.processes)
        loss, actor_loss, vf_loss, ent_loss = (SequenceSummaryStats.from_sequence(c.tolist()) for c in table.T[:4])
        approx_kl, clip_frac = table[last_epoch:, 4:6].mean(0).tolist()
        return MAPPOStats(
            loss=loss,
            actor_loss=actor_loss,
            vf_loss=vf_loss,
            ent_loss=ent_loss,
            gradient_steps=len(table),
            approx_kl=approx_kl,
            clip_frac=clip_frac,
            explained_variance=explained,
            grad_norm=float(table[:, 6].mean()),
        )

    def _minibatches(self, length: int, size: int | None) -> Iterator[Tensor]:
        """Random rows in groups of `size`, see `minibatches`."""
        return minibatches(length, size, self.generator)

    def _lanes(self, games: Trajectory, batch: LogpOldProtocol) -> Lanes:
        fields = cast(Any, batch)
        columns = games.action, games.log_prob, fields.adv, fields.v_s, fields.returns, games.mask
        return Lanes(self._seen, games.image, *columns)

    def _gradient(self, lanes: Lanes, images: Tensor, rows: Tensor, advantage: Tensor, everyones: int) -> Tensor:
        """Add the gradient of the loss to the parameters; see `_loss` for what is returned.

        The loss is a mean over `everyones` rows of a minibatch, of which `rows`, with `advantage`, are this process's.
        """
        log = advantage.new_zeros(6)
        if not len(rows):
            return log
        actor, critic = Shared(*self.actor.folded()), Shared(*self.token_critic.folded(images))
        size = self._chunk_size(len(rows))
        for chunk, of_chunk in zip(rows.split(size), advantage.split(size), strict=True):
            some = replace(lanes.take(chunk), advantage=of_chunk)
            with self._autocast():
                logits = self.actor.logits_folded(some.tokens, *actor.leaves)
                value = self.token_critic.value_folded(some.tokens, some.image, *critic.leaves).float()
            loss, part = self._loss(some, self.actions.distribution(in_fp32(logits), some.mask), value)
            share = len(chunk) / everyones
            (share * loss).backward()
            log += share * part
        actor.backward()
        critic.backward()
        return log

    def _loss(self, lanes: Lanes, chance: ActionDistribution, value: Tensor) -> tuple[Tensor, Tensor]:
        """Total loss on some rows, and detached `[6]`: total, policy, value, entropy, approximate KL, clipped share."""
        log_ratio = chance.log_prob(lanes.action) - lanes.log_prob
        ratio = log_ratio.exp()
        actor_loss = policy_loss(ratio, lanes.advantage, self.eps_clip, self.dual_clip)
        vf_loss = value_loss(value, lanes.value, lanes.target, self.value_eps, self.huber_delta)
        entropy = chance.entropy().mean()
        loss = actor_loss + self.vf_coef * vf_loss - self.ent_coef * entropy
        with torch.no_grad():
            approx_kl, clip_frac = (ratio - 1 - log_ratio).mean(), ((ratio - 1).abs() > self.eps_clip).float().mean()
            return loss, torch.stack([loss, actor_loss, vf_loss, entropy, approx_kl, clip_frac])

    def _chunk_size(self, most: int) -> int:
        """Rows to compute on at once, at most so many."""
        if self.update_chunk is not None:
            return min(most, self.update_chunk)
        widths = (2 * self.actor.width, *self.actor.hidden, *self.token_critic.hidden)
        return min(most, chunk_rows(widths, self._seen.device.type))

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._seen.device.type, torch.bfloat16, enabled=self.precision == "bf16")


def in_fp32(logits: Tensor) -> Tensor:
    """Logits `[rows, A]` of any precision as fp32. Of half-precision ones only the differences to the first are kept.

    The differences are what probabilities depend on; they are rounded once, as half-precision numbers.
    """
    return logits if logits.dtype == torch.float32 else (logits - logits[:, :1]).float()
