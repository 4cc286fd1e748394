"""Settings of a training run: those that have nothing to do with what is learnt or how, and all of them together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ...envs.actions import ActionKind, KeepActions
from ...errors import SettingsError
from ...game.rewards import RewardFn, check_reward
from ...types import Site
from ..budgets.controller import Budget
from ..finetuning.settings import FinetuneConfig
from ..learners.learner import LearnerConfig
from ..merging.policy import MergePolicy
from ..policies import TokenPolicy
from ..shared.processes import Processes
from ..shared.settings import as_json, check, check_numbers, check_type, digest


@dataclass(frozen=True)
class RunConfig:
    """How long a run is, on which images, and what it writes."""

    updates: int = 80
    """Number of updates, or the most if there is a patience; each plays one batch of games."""
    images: int = 128
    """Images (games) per update."""
    seed: int = 0
    """Of weights, images, exploration and minibatches."""
    cache_images: int = 2048
    """Training images whose tokens up to the first site are computed once and kept in memory; 0: none, every image is
    run through the first blocks whenever it is drawn."""
    calibration_images: int = 512
    """Training images on which the threshold is set at the end."""
    validate_every: int = 0
    """Updates between validations, in which the greedy policy plays held-out images at the budget; 0: none."""
    validation_images: int = 512
    """How many of the images for validation are played."""
    patience: int = 0
    """Validations without a new best accuracy after which training ends, once price and cost have settled; 0: training
    runs all updates."""
    checkpoint_every: int = 10
    """Updates between checkpoints."""
    amp: bool = False
    """Whether the backbone plays in bfloat16 (autocast); actor, critic and calibration stay in full precision."""
    log_images_every: int = 0
    """Updates between pictures of what is pruned, in TensorBoard; 0: none."""
    wandb: str | None = None
    """Project of Weights & Biases to log to, beside TensorBoard; needs the package wandb."""

    may_change: ClassVar[frozenset[str]] = frozenset(
        {"checkpoint_every", "log_images_every", "wandb", "validate_every", "validation_images", "patience"}
    )
    """Settings that a resumed run may change: they decide what is written, and when, and which update is the last."""

    def __post_init__(self) -> None:
        check_numbers(self)
        for name in ("updates", "images", "calibration_images", "validation_images", "checkpoint_every"):
            check(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("cache_images", "validate_every", "patience", "log_images_every"):
            check(self, name, getattr(self, name) >= 0, "at least 0")
        check(self, "patience", not self.patience or self.validate_every > 0, "0 with validate_every=0")


@dataclass(frozen=True)
class Settings:
    """Everything that the result of a run depends on, beside network and images."""

    budget: Budget
    learner: LearnerConfig
    reward: RewardFn
    run: RunConfig
    finetune: FinetuneConfig | None
    sites: Sequence[int | str | Site] | None
    actions: ActionKind
    start: TokenPolicy | MergePolicy | None = None

    def check(self, processes: Processes) -> None:
        """Refuse settings that do not fit together, before time is spent.

        Raises:
            TypeError: for an object of another type than expected, naming the setting.
            ValueError: for a value that does not fit, likewise.
        """
        check_reward(self.reward)
        check_type("budget", self.budget, Budget, "a budget, such as Share(0.35), or None")
        check_type("run", self.run, RunConfig, "a RunConfig")
        if self.finetune is not None:
            check_type("finetune", self.finetune, FinetuneConfig, "a FinetuneConfig or None")
        self.learner.check_reward(self.reward)
        self._check_start()
        if self.budget.fixed_counts and self.actions.count(num_agents=3) != 2:  # 3: some have as many as agents
            raise SettingsError(
                f"fixed_counts: expected False unless a token stays or leaves in one way, got True with actions "
                f"{self.actions.name}"
            )
        if self.run.images % (times := self.learner.games_per_image):
            raise SettingsError(
                f"images: expected a multiple of {times}, the games that {type(self.learner).__name__} plays of every "
                f"image, got {self.run.images}"
            )
        self.budget.check_fit(self.reward, self.learner.joint, self.finetune is not None)
        if self.finetune is not None and self.finetune.trainable == "all" and self.run.cache_images:
            raise SettingsError(
                "cache_images: expected 0 with trainable='all', because tokens before the first site that are kept do "
                f"not follow the blocks that make them, got {self.run.cache_images}"
            )
        counts = {"images": self.run.images}
        if self.finetune is not None:
            counts["batch_size"] = self.finetune.batch_size
        for name, count in counts.items():
            if count < processes.size:
                raise SettingsError(
                    f"{name}: expected at least one for each of {processes.size} processes, got {count}"
                )

    def _check_start(self) -> None:
        """Refuse a policy to start from that does not fit the other settings."""
        start, budget = self.start, self.budget
        if start is not None and budget.extra_features:
            raise SettingsError(f"start: expected None with {type(budget).__name__}, got a {type(start).__name__}")
        if isinstance(start, TokenPolicy) and start.actions != self.actions:
            raise SettingsError(f"actions: expected {start.actions.name}, as in start, got {self.actions.name}")
        if isinstance(start, MergePolicy):
            if self.actions != KeepActions():
                raise SettingsError(f"actions: expected keep for a policy that merges, got {self.actions.name}")
            if budget.sampled:
                raise SettingsError("sampled: expected False for a policy that merges and draws nothing, got True")
            if budget.fixed_counts:
                raise SettingsError("fixed_counts: expected False for a policy that merges, got True")
            if self.finetune is not None and self.finetune.when == "alternate":
                raise SettingsError("finetune: expected after or none for a policy that merges, got alternate")

    def as_json(self, sites: Sequence[Site]) -> dict[str, Any]:
        """As a checkpoint stores them: public names and JSON values.

        Args:
            sites: of the game, which are the backbone's own if the settings have none.
        """
        parts = {name: as_json(getattr(self, name)) for name in ("budget", "learner", "reward", "run", "finetune")}
        started = {} if self.start is None else {"start": digest(self.start.starting_actor().state_dict())}
        return {**parts, "sites": as_json(sites), "actions": self.actions.name, **started}

    @property
    def may_change(self) -> frozenset[str]:
        """Dotted names of the settings that a resumed run may change."""
        parts = {"learner": self.learner, "run": self.run, "finetune": self.finetune}
        return frozenset(f"{part}.{name}" for part, value in parts.items() if value for name in value.may_change)
