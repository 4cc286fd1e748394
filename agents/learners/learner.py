"""What a learner is: settings that build its parts, and a base class for an algorithm of one's own.

A learner is written in two classes. The first holds its settings and says what it is made of:

    @dataclass(frozen=True)
    class MyConfig(LearnerConfig):
        entropy: float = 0.01

        def algorithm(self, parts: Parts) -> MyAlgorithm:
            return MyAlgorithm(parts, self)

The second computes the loss of a minibatch of agent-steps from the `Trajectory` of the games that were played:

    class MyAlgorithm(Learner):
        def prepare(self, games):                 # once per update, without gradients
            return {"returns": ...}               # columns [M], one entry per agent-step

        def loss(self, games, prepared, rows):    # rows [k] int64: the agent-steps of the minibatch
            logits = self.actor(games.tokens[rows])
            chance = self.actions.distribution(logits)
            ...
            return loss, {}

`train(backbone, data, learner=MyConfig())` does the rest: it plays the games, follows the budget, takes gradient steps,
writes checkpoints, resumes them to the bit, and deploys the policy. `examples/custom_learner.py` is a whole learner.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Self, cast

import numpy as np
import torch
from gymnasium.spaces import Discrete
from tianshou.algorithm.algorithm_base import OnPolicyAlgorithm, TrainingStats
from tianshou.algorithm.modelfree.reinforce import DiscreteActorPolicy
from tianshou.algorithm.optim import AdamOptimizerFactory, LRSchedulerFactory, OptimizerFactory
from tianshou.data import ReplayBuffer, SequenceSummaryStats
from tianshou.data.types import RolloutBatchProtocol
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ...envs.actions import ActionKind
from ...errors import NumericalError, SettingsError
from ...game.rewards import START_PRICE, RewardFn, SharedOutcome
from ..networks import LightNetworks, PaperNetworks, TokenActor, TokenCritic
from ..policies import TokenPolicy
from ..senses import seen_width
from ..shared.processes import Processes
from ..shared.settings import check, check_numbers, check_type
from .buffer import GameBuffer, Trajectory, context_width
from .exploration import ExploringPolicy, View
from .gradient import GradientStep

LIGHT = LightNetworks()


@dataclass(frozen=True)
class Parts:
    """What every learner is made of; `LearnerConfig.build` puts them together."""

    actor: TokenActor
    critic: nn.Module
    optim: OptimizerFactory  # Adam with a learning rate that falls linearly
    actions: ActionKind
    generator: torch.Generator  # of the minibatches, and of whatever else an algorithm draws


@dataclass(frozen=True)
class LearnerConfig:
    """Settings that all learners have; a subclass adds its own and overrides what it makes differently."""

    lr: float = 3e-3
    """Learning rate of Adam at the start."""
    lr_final: float = 0.05
    """Fraction of it at the end; linear in between."""
    adam_eps: float = 1e-5
    """Epsilon of Adam."""
    epochs: int = 1
    """Passes over the agent-steps of an update (K in RL4EViT)."""
    minibatch: int | None = 2048
    """Agent-steps per gradient step; None: all at once."""
    max_grad_norm: float | None = 0.5
    """Largest norm of the joint gradient; None: no clipping."""
    networks: LightNetworks | PaperNetworks = LIGHT
    """Sizes of actor and critic."""

    may_change: ClassVar[frozenset[str]] = frozenset({"lr", "max_grad_norm"})
    """Settings that a resumed run may change: the remedies for a run that exploded."""
    joint: ClassVar[bool] = False
    """Whether one agent decides for all tokens of an image; otherwise every token is an agent."""
    games_per_image: ClassVar[int] = 1
    """How often every image of an update is played."""

    def __post_init__(self) -> None:
        check_numbers(self)
        check_type("networks", self.networks, LightNetworks, "LightNetworks(...) or PaperNetworks(...)")
        check(self, "epochs", self.epochs >= 1, "at least 1")
        check(self, "minibatch", self.minibatch is None or self.minibatch >= 2, "at least 2 or None")
        for name in ("lr", "adam_eps"):
            check(self, name, getattr(self, name) > 0, "above 0")
        check(self, "lr_final", 0 <= self.lr_final <= 1, "0 to 1")
        check(self, "max_grad_norm", self.max_grad_norm is None or self.max_grad_norm > 0, "above 0 or None")

    def default_reward(self) -> RewardFn:
        """The reward of `train` if none is given."""
        return SharedOutcome(price=START_PRICE)

    def check_reward(self, reward: RewardFn) -> None:
        """Refuse a reward that this learner cannot learn from.

        Raises:
            ValueError: naming it.
        """

    def check_start(self, start: Any) -> None:
        """Refuse a policy that this learner cannot start from.

        Args:
            start: a policy, or None for none.

        Raises:
            SettingsError: naming it.
        """
        if start is not None and type(start) is not TokenPolicy:
            raise SettingsError(f"start: expected a TokenPolicy or None, got {start!r}")

    def continuing(self, start: Any) -> Self:
        """The same settings for a critic that sees what the actor of a policy to start from sees."""
        return replace(self, networks=replace(self.networks, senses=getattr(start, "senses", ())))

    def actor(self, embed_dim: int, num_actions: int, generator: torch.Generator) -> TokenActor:
        """The network that decides, for tokens of width `embed_dim`."""
        return self.networks.actor(embed_dim, num_actions, generator)

    def critic(self, embed_dim: int, num_actions: int, generator: torch.Generator) -> nn.Module:
        """The network that values, used in training only."""
        widths = self.networks.critic_widths(embed_dim)
        senses = self.networks.senses
        context = context_width(seen_width(senses, embed_dim)) if self.networks.critic_context else 0
        return TokenCritic(embed_dim, widths, generator, context, last_gain=0.0, senses=senses)

    def explorer(
        self, actor: TokenActor, actions: ActionKind, generator: torch.Generator, view: View
    ) -> ExploringPolicy:
        """The policy that plays in training."""
        return ExploringPolicy(actor, generator, actions, view)

    def algorithm(self, parts: Parts) -> OnPolicyAlgorithm[Any]:
        """The update, a `Learner` or another on-policy algorithm of tianshou that reads a `GameBuffer`."""
        raise TypeError(f"learner: {type(self).__name__} does not override algorithm(parts)")

    def build(
        self,
        embed_dim: int,
        num_agents: int,
        updates: int,
        actions: ActionKind,
        generator: torch.Generator,
        start: Any = None,
    ) -> Any:
        """Networks, optimiser and update.

        Args:
            embed_dim: width of the tokens that actor and critic see.
            num_agents: N.
            updates: of the run; the learning rate falls over them.
            actions: what agents may do.
            generator: a CPU generator; of the initial weights, and of all that the update draws.
            start: a policy whose actor is copied; None: the actor is a new one.
        """
        count = actions.count(num_agents)
        actor = self.actor(embed_dim, count, generator) if start is None else start.starting_actor()
        critic = self.critic(embed_dim, count, generator)
        adam = AdamOptimizerFactory(lr=self.lr, eps=self.adam_eps)
        optim = adam.with_lr_scheduler_factory(LinearDecay(updates, self.lr_final))
        return self.algorithm(Parts(actor, critic, optim, actions, generator))


@dataclass(kw_only=True)
class LearnerStats(TrainingStats):
    """What an update did."""

    loss: SequenceSummaryStats  # over gradient steps
    gradient_steps: int
    grad_norm: float  # of the joint gradient before clipping, mean over gradient steps
    metrics: dict[str, float] = field(default_factory=dict)  # the algorithm's own, means over gradient steps

    def get_loss_stats_dict(self) -> dict[str, float]:
        """All numbers, by name."""
        return {"loss": self.loss.mean, "grad_norm": self.grad_norm, **self.metrics}


class ActorOnRows(nn.Module):
    """A `TokenActor` as tianshou calls actors: `(obs, state, info) -> (logits, state)`, `obs.token` `[rows, D]`."""

    def __init__(self, actor: TokenActor) -> None:
        super().__init__()
        self.actor = actor

    def forward(self, obs: Any, state: Any = None, info: Any = None) -> tuple[Tensor, Any]:
        """Logits `[rows, A]`."""
        return self.actor(obs.token), state


class TokenwisePolicy(DiscreteActorPolicy):
    """tianshou's policy without the compilation of numba kernels, which takes seconds and is not needed here."""

    @staticmethod
    def _compile() -> None:
        """Nothing to compile."""


class Learner(OnPolicyAlgorithm[TokenwisePolicy]):
    """Base class of an algorithm of one's own: a subclass writes `prepare` and `loss`.

    One Adam optimiser trains actor and critic together. Further networks, such as a target network, are attributes like
    in any `nn.Module`; they are saved and resumed with the others. All randomness must come from `self.generator`.

    Attributes:
        actor: the network that decides.
        critic: the network that values.
        actions: what agents may do; `actions.distribution(logits, mask)` gives probabilities.
        generator: the run's CPU generator.
        processes: the processes that train together. Games are whole images, so most learners need not care; a mean
            over all agent-steps of an update is taken over `processes.gather(column)`.
        metrics: names of what `loss` reports beside the loss.

    Args:
        parts: see `Parts`.
        config: settings.
    """

    Optimizer = GradientStep
    processes = Processes()
    metrics: ClassVar[tuple[str, ...]] = ()

    def __init__(self, parts: Parts, config: LearnerConfig) -> None:
        super().__init__(policy=tokenwise_policy(parts.actor))
        self.actor, self.critic = parts.actor, cast(Any, parts.critic)
        self.actions, self.generator, self.config = parts.actions, parts.generator, config
        networks = nn.ModuleList([parts.actor, parts.critic])
        self.optim = self._create_optimizer(networks, parts.optim, max_grad_norm=config.max_grad_norm)

    def prepare(self, games: Trajectory) -> Mapping[str, Tensor]:
        """What stays the same during an update, such as advantages; computed without gradients.

        Args:
            games: the agent-steps of the games that were played.

        Returns:
            Tensors by name, in any shape; `loss` gets them unchanged.
        """
        return {}

    def loss(
        self, games: Trajectory, prepared: Mapping[str, Tensor], rows: Tensor
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Loss of a minibatch, the mean over its agent-steps.

        Args:
            games: the agent-steps of the games that were played.
            prepared: the result of `prepare`.
            rows: `[k]` int64, the agent-steps of the minibatch, at least one.

        Returns:
            A scalar with a gradient, and the numbers that `metrics` names.
        """
        raise TypeError(f"learner: {type(self).__name__} does not override loss(games, prepared, rows)")

    def _preprocess_batch(
        self, batch: RolloutBatchProtocol, buffer: ReplayBuffer, indices: np.ndarray
    ) -> RolloutBatchProtocol:
        assert isinstance(buffer, GameBuffer)
        self._games = buffer.trajectory
        with torch.no_grad():
            self._prepared = self.prepare(self._games)
        return batch

    def _update_with_batch(self, batch: RolloutBatchProtocol, batch_size: int | None, repeat: int) -> LearnerStats:
        step = cast(GradientStep, self.optim).step_along
        first, total = self.processes.span(len(self._games))
        logs: list[Tensor] = []
        for _ in range(repeat):
            for rows in minibatches(total, batch_size, self.generator):
                own = rows[(rows >= first) & (rows < first + len(self._games))] - first
                log, norm = step(partial(self._gradient, own, len(rows)), self.processes)
                logs.append(torch.cat([log, norm[None]]))
        table = finite_table(logs, len(self.metrics) + 1, self.processes)
        means = dict(zip(self.metrics, table[:, 1:-1].mean(dim=0).tolist(), strict=True))
        return LearnerStats(
            loss=SequenceSummaryStats.from_sequence(table[:, 0].tolist()),
            gradient_steps=len(table),
            grad_norm=float(table[:, -1].mean()),
            metrics=means,
        )

    def _gradient(self, rows: Tensor, everyones: int) -> Tensor:
        """Add the gradient of this process's part of a minibatch; its part of loss and metrics, `[1 + metrics]`."""
        games = self._games
        rows = rows.to(games.tokens.device)
        if not len(rows):
            return games.tokens.new_zeros(1 + len(self.metrics))
        loss, metrics = self._checked(self.loss(games, self._prepared, rows))
        share = len(rows) / everyones
        (share * loss).backward()
        report = loss.detach()
        return share * torch.stack(
            [report, *(torch.as_tensor(metrics[name]).detach().to(report) for name in self.metrics)]
        )

    def _checked(self, returned: Any) -> tuple[Tensor, Mapping[str, Tensor]]:
        """What `loss` returned.

        Raises:
            TypeError: for something else than a loss with a gradient and the numbers that `metrics` names.
        """
        pair = returned if isinstance(returned, tuple) and len(returned) == 2 else (returned, None)
        loss, metrics = pair
        if not isinstance(loss, Tensor) or not isinstance(metrics, Mapping):
            raise TypeError(f"loss: expected (loss, metrics), a tensor and a dict, got {type(returned).__name__}")
        if loss.ndim or not loss.requires_grad:
            kind = "with a gradient" if loss.requires_grad else "without a gradient"
            raise TypeError(f"loss: expected a scalar with a gradient, got shape {list(loss.shape)} {kind}")
        if set(metrics) != set(self.metrics):
            named = "the class attribute `metrics` names the numbers that loss reports"
            raise TypeError(f"metrics: expected {sorted(self.metrics)}, got {sorted(metrics)}; {named}")
        return loss, metrics


class LinearDecay(LRSchedulerFactory):
    """Learning rate falling linearly from its initial value to a fraction of it; never below.

    Args:
        updates: over how many updates.
        final: the fraction at the end.
    """

    def __init__(self, updates: int, final: float) -> None:
        self.updates = updates
        self.final = final

    def create_scheduler(self, optim: Optimizer) -> LambdaLR:
        """One step per update."""
        return LambdaLR(optim, lambda done: 1 - (1 - self.final) * min(1.0, done / max(1, self.updates - 1)))


def tokenwise_policy(actor: TokenActor) -> TokenwisePolicy:
    """The actor as tianshou's algorithms hold it."""
    return TokenwisePolicy(actor=cast(Any, ActorOnRows(actor)), action_space=Discrete(actor.num_actions))


def minibatches(length: int, size: int | None, generator: torch.Generator) -> Iterator[Tensor]:
    """Random rows in groups of `size`; a remainder joins the last group, as `Batch.split(merge_last=True)` does.

    Within a group the rows are in order, so that chunks of it read memory front to back.
    """
    order = torch.randperm(length, generator=generator)
    count = 1 if size is None else max(1, length // size)
    starts = [index * (size or 0) for index in range(count)]
    for start, stop in zip(starts, [*starts[1:], length], strict=True):
        yield order[start:stop].sort().values


def finite_table(logs: list[Tensor], summed: int, processes: Processes) -> Tensor:
    """The numbers of all gradient steps on the CPU, `[steps, columns]`.

    Args:
        logs: `[columns]` per gradient step.
        summed: the first columns, of which every process has computed its part.
        processes: the processes that train together.

    Raises:
        NumericalError: if a number is not finite.
    """
    table = torch.stack(logs)
    table[:, :summed] = processes.sum(table[:, :summed])
    table = table.cpu()
    if not torch.isfinite(table).all():
        bad = int((~torch.isfinite(table)).any(dim=1).sum())
        raise NumericalError(
            f"loss: expected finite numbers, got NaN or infinity in {bad} of {len(table)} minibatches; "
            "training stops and the last checkpoint is kept (a smaller learning rate may help)"
        )
    return table


def learner_state(algorithm: Any) -> dict[str, Any]:
    """Networks, optimiser and learning-rate schedule of an algorithm, for a checkpoint."""
    schedules = [scheduler.state_dict() for scheduler in algorithm.lr_schedulers]
    plain = [{name: value for name, value in state.items() if name != "lr_lambdas"} for state in schedules]
    return {"algorithm": algorithm.state_dict(), "lr_schedule": plain}


def restore_learner(algorithm: Any, state: Mapping[str, Any], lr: float) -> None:
    """Continue from the result of `learner_state`; another learning rate than before takes effect at once."""
    algorithm.load_state_dict(dict(state["algorithm"]))  # tianshou removes the optimisers from what it is given
    for scheduler, saved in zip(algorithm.lr_schedulers, state["lr_schedule"], strict=True):
        scheduler.load_state_dict({**scheduler.state_dict(), **saved})
        if any(base != lr for base in scheduler.base_lrs):
            _set_lr(scheduler, lr)


def _set_lr(scheduler: LambdaLR, lr: float) -> None:
    scheduler.base_lrs = [lr for _ in scheduler.base_lrs]
    for group, factor in zip(scheduler.optimizer.param_groups, scheduler.lr_lambdas, strict=True):
        group["initial_lr"], group["lr"] = lr, lr * factor(scheduler.last_epoch)
