"""Settings of a training run that have nothing to do with what is learnt or how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..shared.settings import check


@dataclass(frozen=True)
class RunConfig:
    """How long a run is, on which images, and what it writes."""

    updates: int = 80
    """Number of updates; each plays one batch of games."""
    images: int = 128
    """Images (games) per update."""
    seed: int = 0
    """Of weights, images, exploration and minibatches."""
    cache_images: int = 2048
    """Training images whose tokens up to the first site are computed once and kept in memory; 0: none, every image is
    run through the first blocks whenever it is drawn."""
    calibration_images: int = 512
    """Training images on which the threshold is set at the end."""
    checkpoint_every: int = 10
    """Updates between checkpoints."""
    amp: bool = False
    """Whether the backbone plays in bfloat16 (autocast); actor, critic and calibration stay in full precision."""
    log_images_every: int = 0
    """Updates between pictures of what is pruned, in TensorBoard; 0: none."""
    wandb: str | None = None
    """Project of Weights & Biases to log to, beside TensorBoard; needs the package wandb."""

    may_change: ClassVar[frozenset[str]] = frozenset({"checkpoint_every", "log_images_every", "wandb"})
    """Settings that a resumed run may change: they decide what is written, and when."""

    def __post_init__(self) -> None:
        for name in ("updates", "images", "calibration_images", "checkpoint_every"):
            check(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("cache_images", "log_images_every"):
            check(self, name, getattr(self, name) >= 0, "at least 0")
