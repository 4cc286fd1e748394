"""Settings of fine-tuning, and a keep rate that falls while the network adapts."""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, pi
from typing import ClassVar, Literal

from timm.optim import list_optimizers

from ...policy import check_keep_rate
from ..shared.settings import check, check_numbers

OPTIMISERS = (*list_optimizers(), *(f"lookahead_{name}" for name in list_optimizers()))
SCHEDULES = ("cosine", "tanh", "poly", "step", "multistep")  # of timm; its others ask for more than steps


@dataclass(frozen=True)
class CosineKeepRate:
    """Keep rate that falls from 1 to the target along a half cosine, then stays (EViT, section 3; Long et al., 2023).

    Args:
        target: the keep rate in the end, above 0 and at most 1.
        part: part of the training over which it falls, 0 to 1; the papers take 100 of 300 epochs.
    """

    target: float
    part: float = 1 / 3

    def __post_init__(self) -> None:
        check_keep_rate(self.target)
        if not 0 <= self.part <= 1:
            raise ValueError(f"part: expected 0 to 1, got {self.part!r}")

    def __call__(self, progress: float) -> float:
        """The rate when `progress` (0 to 1) of the training is done."""
        if progress >= self.part:
            return self.target
        return self.target + (1 - self.target) * (1 + cos(pi * progress / self.part)) / 2


@dataclass(frozen=True)
class LastBlocks:
    """Lets the last blocks of a network learn, the earlier ones of them more slowly (layer-wise decay, as in BEiT).

    Args:
        count: how many blocks; what follows the last block learns, too.
        layer_decay: factor between the learning rates of a block and the one behind it, above 0 and at most 1.
    """

    count: int
    layer_decay: float = 1.0

    def __post_init__(self) -> None:
        check_numbers(self)
        check(self, "count", self.count >= 1, "at least 1 block")
        check(self, "layer_decay", 0 < self.layer_decay <= 1, "above 0 and at most 1")


@dataclass(frozen=True)
class FinetuneConfig:
    """Settings of fine-tuning; the defaults suit a converged network and a few hundred steps."""

    when: Literal["after", "alternate"] = "after"
    """In `train`: whether the network learns once the policy is trained, or in turn with it (RL4EViT, Algorithm 1)."""
    every: int = 10
    """In `train`, with `alternate`: updates of the policy between two phases."""
    steps: int = 300
    """Gradient steps in all."""
    batch_size: int = 64
    """Images per gradient step."""
    trainable: Literal["after_first_site", "all"] | LastBlocks = "after_first_site"
    """Which blocks learn. What comes before the first site is the same with and without pruning; left as it is, its
    tokens can be computed once and kept."""
    opt: str = "adamw"
    """Optimiser, by timm's name."""
    lr: float = 2e-4
    """Learning rate after the warm-up."""
    min_lr: float = 1e-6
    """Learning rate at the end."""
    sched: str = "cosine"
    """Learning-rate schedule, by timm's name."""
    warmup_steps: int = 20
    """Steps over which the learning rate rises."""
    weight_decay: float = 0.01
    """Weight decay of matrices."""
    max_grad_norm: float | None = 1.0
    """Largest norm of the gradient; None: no clipping."""
    label_smoothing: float = 0.0
    """Share of the target spread over all classes."""
    distill: float = 0.0
    """Weight of the dense model's soft labels against the true class, 0 to 1."""
    temperature: float = 1.0
    """Softens both sides of the distillation."""
    cache_images: int = 2048
    """Training images whose tokens up to the first site are kept; 0: none. Not used when all blocks learn, nor with
    `alternate`, where the images are those that the policy plays."""
    amp: bool = False
    """Whether the network runs in bfloat16 where that is safe (autocast); weights and losses stay in full precision."""
    checkpoint_every: int = 100
    """Steps between checkpoints."""
    seed: int = 0
    """Of the order of images and of stochastic depth."""

    may_change: ClassVar[frozenset[str]] = frozenset({"checkpoint_every"})
    """Settings that a resumed run may change."""

    def __post_init__(self) -> None:
        check_numbers(self)
        check(self, "when", self.when in ("after", "alternate"), "'after' or 'alternate'")
        for name in ("steps", "batch_size", "checkpoint_every", "every"):
            check(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("warmup_steps", "cache_images", "weight_decay", "min_lr"):
            check(self, name, getattr(self, name) >= 0, "at least 0")
        for name in ("lr", "temperature"):
            check(self, name, getattr(self, name) > 0, "above 0")
        check(self, "min_lr", self.min_lr <= self.lr, f"at most lr ({self.lr:g})")
        for name in ("label_smoothing", "distill"):
            check(self, name, 0 <= getattr(self, name) <= 1, "0 to 1")
        check(self, "max_grad_norm", self.max_grad_norm is None or self.max_grad_norm > 0, "above 0 or None")
        check(self, "opt", self.opt in OPTIMISERS, "an optimiser of timm, such as adamw or sgd")
        check(self, "sched", self.sched in SCHEDULES, f"one of {', '.join(SCHEDULES)}")
        named = self.trainable in ("after_first_site", "all")
        fine = named or isinstance(self.trainable, LastBlocks)
        check(self, "trainable", fine, "'after_first_site', 'all' or LastBlocks(count)")
