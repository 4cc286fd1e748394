"""Budgets, and the controller that makes play and the deployed policy meet one.

A budget is an object that brings its target, the way there (annealing), the schedule of the reward, and the
calibration of the trained policy. See `vitprune_env.agents.budgets` for its use in a training loop of one's own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from ...engine.tokens import TokenState
from ...envs.actions import ActionKind
from ...game.rewards import START_PRICE, RewardFn, SettlingReward, SharedOutcome, has_price
from ...game.rollout import play
from ...game.token_game import TokenGame
from ...types import Site
from ..networks import TokenActor
from ..policies import TokenPolicy
from ..shared.processes import Processes
from ..shared.settings import check, check_numbers
from .calibration import calibrate_counts, calibrate_threshold
from .prices import (
    AnnealedKeepCost,
    CollapseDetector,
    DualPrice,
    FedForwardKeepCost,
    FixedReward,
    RewardSchedule,
)
from .targets import PolicyCost, annealed, attainable

Batches = Sequence[Tensor | TokenState]


class Played(Protocol):
    """The results of a batch of games; `Outcome` is one."""

    @property
    def n_kept(self) -> Tensor:
        """`[B, T]`, tokens that go on after each site."""
        ...

    @property
    def macs(self) -> Tensor:
        """`[B]` float64, MACs of each image, policy included."""
        ...

    @property
    def correct(self) -> Tensor | None:
        """`[B]` bool, whether each image was classified correctly."""
        ...


@dataclass(frozen=True, kw_only=True)
class Budget(ABC):
    """What images may cost on average, the policy's own MACs included."""

    anneal_from: float = 0.55
    """Share of dense MACs that the target starts from: about what the untrained policy costs."""
    anneal_part: float = 0.5
    """Part of the updates over which the target moves to the budget."""
    price_rate: float = 0.2
    """Relative change of the price per relative excess of MACs, each update."""
    price_gain: float = 2.0
    """How strongly the price answers an excess at once."""
    sampled: bool = False
    """Whether the deployed policy draws its actions, as the authors' code of RL4EViT evaluates; otherwise it takes the
    most probable ones."""
    fixed_counts: bool = False
    """Whether the deployed policy keeps equally many tokens in every image, on average those that it keeps with a
    threshold; otherwise each token that exceeds the threshold."""

    extra_features: ClassVar[int] = 0
    """Features that `RewardSchedule.view` adds to every token."""

    def __post_init__(self) -> None:
        check_numbers(self)
        for name in ("anneal_from", "anneal_part"):
            check(self, name, 0 <= getattr(self, name) <= 1, "0 to 1")
        for name in ("price_rate", "price_gain"):
            check(self, name, getattr(self, name) >= 0, "at least 0")
        check(self, "fixed_counts", not (self.fixed_counts and self.sampled), "False where actions are drawn")

    @abstractmethod
    def target(self, cost: PolicyCost, reward: RewardFn) -> float:
        """Mean MACs per image that the deployed policy shall cost.

        Raises:
            BudgetError: if no policy can meet it.
        """

    @property
    def seed(self) -> int | None:
        """Seed of the deployed policy's draws; None: it does not draw."""
        return 0 if self.sampled else None

    def check_fit(self, reward: RewardFn, joint: bool = False, finetune: bool = False) -> None:
        """Refuse a combination that this budget cannot serve, before time is spent.

        Args:
            reward: what agents are paid.
            joint: whether one agent decides for all tokens of an image.
            finetune: whether the network learns, too.

        Raises:
            ValueError: naming it.
        """
        if has_price(reward):
            return
        for each in fields(Budget):
            if each.name in ("price_rate", "price_gain") and getattr(self, each.name) != each.default:
                raise ValueError(
                    f"{each.name}: expected {each.default} (the default) with {type(reward).__name__}, which has no "
                    f"price to move, got {getattr(self, each.name)!r}"
                )

    def schedule(
        self, reward: RewardFn, cost: PolicyCost, images: int, generator: torch.Generator, processes: Processes
    ) -> RewardSchedule:
        """How the reward follows this budget.

        Args:
            reward: what agents are paid.
            cost: of the network, sites and policy.
            images: games of an update, of all processes.
            generator: a CPU generator.
            processes: the processes that train together.
        """
        if has_price(reward):
            return DualPrice(reward, self.price_rate, self.price_gain)
        return FedForwardKeepCost(reward, cost) if isinstance(reward, SettlingReward) else FixedReward(reward)

    def greedy(
        self, actor: TokenActor, sites: Sequence[Site], actions: ActionKind, info: Mapping[str, Any] | None = None
    ) -> TokenPolicy:
        """The policy to deploy, not calibrated yet."""
        return TokenPolicy(actor, sites=sites, info=info, actions=actions, seed=self.seed)

    def calibrated(self, game: TokenGame, policy: Any, batches: Batches, target: float) -> Any:
        """The policy with the threshold, or the equal counts, at which it meets the budget.

        Args:
            game: what is played.
            policy: one with a method `with_threshold`.
            batches: training images, or states that `game.prepare` made of them.
            target: mean MACs per image.
        """
        found = calibrate_threshold(game, policy, batches, target)
        return calibrate_counts(game, found, batches, target) if self.fixed_counts else found

    def at_target(self, game: TokenGame, policy: Any, batches: Batches, target: float) -> Any:
        """The policy at the target, for a look at it during training; as `calibrated` gives it unless that takes long.

        Args:
            game: see `calibrated`.
            policy: likewise.
            batches: likewise.
            target: likewise.
        """
        return self.calibrated(game, policy, batches, target)

    def controller(
        self,
        game: TokenGame,
        updates: int,
        reward: RewardFn | None = None,
        macs_per_token: int = 0,
        *,
        images: int = 1,
        generator: torch.Generator | None = None,
        processes: Processes | None = None,
    ) -> BudgetController:
        """The controller of a training run.

        Args:
            game: what is played.
            updates: of the run.
            reward: what agents are paid; None: `SharedOutcome(price=0.01)`.
            macs_per_token: MACs that the policy spends on every token it looks at.
            images: games of an update.
            generator: a CPU generator; None: seeded with 0.
            processes: the processes that train together; None: just this one.
        """
        reward = SharedOutcome(START_PRICE) if reward is None else reward
        self.check_fit(reward)
        cost = PolicyCost(game.cost, game.sites, macs_per_token)
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        processes = Processes() if processes is None else processes
        target = self.target(cost, reward)
        schedule = self.schedule(reward, cost, images, generator, processes)
        return BudgetController(self, game, cost, target, updates, schedule)


@dataclass(frozen=True)
class Share(Budget):
    """A share of the dense network's MACs."""

    share: float = 0.35
    """Share of the dense network's MACs, above 0 and at most 1."""

    def target(self, cost: PolicyCost, reward: RewardFn) -> float:
        """Mean MACs per image."""
        return attainable(cost, self.share * cost.model.dense())


@dataclass(frozen=True)
class GMACs(Budget):
    """A number of GMACs per image."""

    gmacs: float
    """Mean GMACs per image, the policy's own included."""

    def target(self, cost: PolicyCost, reward: RewardFn) -> float:
        """Mean MACs per image."""
        return attainable(cost, self.gmacs * 1e9)


@dataclass(frozen=True)
class KeepRate(Budget):
    """A keep rate: what keeping this fraction of the tokens at every site costs."""

    keep: float
    """Fraction of the tokens that reach a site and pass it, above 0 and at most 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, "keep", 0 < self.keep <= 1, "a rate above 0 and at most 1")

    def target(self, cost: PolicyCost, reward: RewardFn) -> float:
        """Mean MACs per image."""
        return attainable(cost, min(cost.at_keep_rate(self.keep), cost.model.dense()))


@dataclass(frozen=True)
class Equilibrium(Budget):
    """The weights of a reward that settles (`SettlingReward`) decide how much is kept.

    `train(budget=None)` means this object. The weights are reached by annealing. The deployed policy costs what
    exploring play costs on the training images: its threshold is calibrated to that, or it samples, too.
    """

    def check_fit(self, reward: RewardFn, joint: bool = False, finetune: bool = False) -> None:
        """Refuse a reward that does not settle.

        Raises:
            ValueError: naming it.
        """
        if not isinstance(reward, SettlingReward):
            raise ValueError(
                f"budget: expected one, such as Share(0.35), with {type(reward).__name__}; None is for rewards that "
                "settle by themselves, such as PaperReward"
            )
        super().check_fit(reward, joint, finetune)
        if not reward.keep_cost > 0:
            raise ValueError(f"keep_cost: expected above 0, got {reward.keep_cost!r}")

    def target(self, cost: PolicyCost, reward: RewardFn) -> float:
        """What play costs in the equilibrium, were every image classified correctly; more than dense is possible."""
        assert isinstance(reward, SettlingReward)
        return cost.at_fraction(reward.equilibrium(1.0, cost.model.num_patches))

    def schedule(
        self, reward: RewardFn, cost: PolicyCost, images: int, generator: torch.Generator, processes: Processes
    ) -> RewardSchedule:
        """The weights as given, once annealing is over."""
        assert isinstance(reward, SettlingReward)
        return AnnealedKeepCost(reward, cost, self.target(cost, reward) / cost.model.dense())

    def calibrated(self, game: TokenGame, policy: Any, batches: Batches, target: float) -> Any:
        """The policy with the threshold at which it costs what drawing every action costs.

        The most probable action alone may keep every token where exploring play keeps three of four.

        Args:
            game: what is played.
            policy: a `TokenPolicy`; one that draws its actions stays as it is.
            batches: training images, or states that `game.prepare` made of them.
            target: not needed.
        """
        if self.sampled:
            return policy
        explorer = policy.sampling()
        explored = torch.cat([play(game, explorer, batch).outcome.macs for batch in batches])
        return super().calibrated(game, policy, batches, float(explored.mean()))


class BudgetController:
    """Leads play to a budget: gives the reward of every update, takes in its results, calibrates in the end.

    Args:
        budget: what is to be met.
        game: what is played.
        cost: of the network, sites and policy.
        target: the budget in MACs per image.
        updates: of the run.
        schedule: how the reward follows.

    Attributes:
        done: updates observed so far.
    """

    def __init__(
        self,
        budget: Budget,
        game: TokenGame,
        cost: PolicyCost,
        target: float,
        updates: int,
        schedule: RewardSchedule,
    ) -> None:
        self.budget, self.game, self.cost, self.target = budget, game, cost, target
        self.updates, self.schedule = updates, schedule
        self.collapse = CollapseDetector()
        self.done = 0

    @property
    def target_share(self) -> float:
        """Target of the coming update, as a share of the dense network's MACs."""
        share = self.target / self.cost.model.dense()
        return annealed(self.done, self.updates, share, self.budget.anneal_from, self.budget.anneal_part)

    def reward(self) -> RewardFn:
        """The reward of the coming update."""
        return self.schedule.reward(self.target_share)

    def observe(self, played: Played) -> dict[str, float]:
        """Take in the results of an update, and move the price.

        Args:
            played: the outcome of its games, played with labels.

        Returns:
            What the update was: accuracy, GMACs and share of dense, target, price, and whether play has collapsed.
        """
        assert played.correct is not None
        dense, target, price = self.cost.model.dense(), self.target_share, self.schedule.price
        accuracy, macs = float(played.correct.double().mean()), float(played.macs.mean())
        kept = (played.n_kept.double().mean(dim=0) / self.cost.model.num_patches).tolist()
        collapsed = self.collapse.observe(kept[0], kept[-1], self.cost.fraction_for(target * dense), accuracy)
        self.schedule.observe(macs / dense, accuracy, target, played.macs / dense)
        self.done += 1
        return {
            "accuracy": accuracy,
            "gmacs": macs / 1e9,
            "share": macs / dense,
            "target_share": target,
            "price": price,
            "collapsed": float(collapsed),
        }

    def calibrate(self, policy: Any, batches: Batches) -> Any:
        """The trained policy as it meets the budget on training images.

        Args:
            policy: one with a method `with_threshold`, such as a `TokenPolicy`.
            batches: training images, or states that `game.prepare` made of them.
        """
        return self.budget.calibrated(self.game, policy, batches, self.target)

    def at_target(self, policy: Any, batches: Batches) -> Any:
        """A policy that is still being trained as it would meet the budget.

        Args:
            policy: see `calibrate`.
            batches: likewise.
        """
        return self.budget.at_target(self.game, policy, batches, self.target)

    def state(self) -> dict[str, Any]:
        """All that the coming updates depend on."""
        return {"schedule": self.schedule.state(), "collapse_streak": self.collapse.streak, "done": self.done}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from the result of `state`."""
        self.schedule.restore(state["schedule"])
        self.collapse.streak = state["collapse_streak"]
        self.done = state["done"]
