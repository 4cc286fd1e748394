"""Settings of the papers for ImageNet, with what they printed: nothing here has been measured by us."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from training_flags import FLAGS, TrainingFlags

IMAGENET_TRAIN = 1_281_167  # images


@dataclass(frozen=True)
class Training:
    """A training run: which network, with which settings."""

    config: TrainingFlags
    model: str | None = None  # name in timm; None: the built-in backbone
    pretrained: bool = False


@dataclass(frozen=True)
class Published:
    """A method without training on a stock network, and what a paper printed of it."""

    model: str
    policy: Literal["evit"]
    keep_rate: float
    gmacs: float
    top1: float  # per cent


def _rl4evit(hidden: tuple[int, ...], gmacs: float) -> TrainingFlags:
    """RL4EViT, section III-D: sites 3, 6, 9, printed network sizes, K = 15, learning rate 5e-5; one epoch.

    The paper names neither the number of epochs nor the images per update; the latter is that of its code.
    """
    config = FLAGS["rl4evit"]
    return replace(
        config,
        target_gmacs=gmacs,
        sites=("3", "6", "9"),
        paper_sizes=False,
        actor_hidden=hidden,
        critic_hidden=hidden,
        lr=5e-5,
        lr_final=1.0,
        updates=IMAGENET_TRAIN // config.images,
        checkpoint_every=200,
        cache_images=0,
        calibration_images=2048,
    )


TRAINING: dict[str, Training] = {
    **{name: Training(config) for name, config in FLAGS.items()},
    "rl4evit-deit-s": Training(_rl4evit((1536, 256, 64), gmacs=3.0), "deit_small_patch16_224", pretrained=True),
    "rl4evit-deit-b": Training(_rl4evit((3072, 256, 64), gmacs=11.6), "deit_base_patch16_224", pretrained=True),
}

# Table I of RL4EViT (no fine-tuning), except the last: Table 2 of Long et al. (2023), fine-tuned weights.
PUBLISHED: dict[str, Published] = {
    "evit-deit-s-0.8": Published("deit_small_patch16_224", "evit", 0.8, 3.5, 79.2),
    "evit-deit-s-0.7": Published("deit_small_patch16_224", "evit", 0.7, 3.0, 78.5),
    "evit-deit-s-0.6": Published("deit_small_patch16_224", "evit", 0.6, 2.6, 76.8),
    "evit-deit-b-0.9": Published("deit_base_patch16_224", "evit", 0.9, 15.3, 81.7),
    "evit-deit-b-0.79": Published("deit_base_patch16_224", "evit", 0.79, 13.1, 81.3),
    "evit-deit-b-0.7": Published("deit_base_patch16_224", "evit", 0.7, 11.6, 80.5),
    "evit-lv-vit-s-0.7": Published("lv_vit_s", "evit", 0.7, 4.7, 83.0),
}
