"""Training runs with the settings of RL4EViT, on the built-in task and for ImageNet."""

from __future__ import annotations

from dataclasses import dataclass, replace

from vitprune_env.agents import TrainConfig
from vitprune_env.agents.runs.config import PRESETS as BUILT_IN
from vitprune_env.agents.runs.config import rl4evit

IMAGENET_TRAIN = 1_281_167  # images


@dataclass(frozen=True)
class Training:
    """A training run: which network, with which settings."""

    config: TrainConfig
    model: str | None = None  # name in timm; None: the built-in backbone
    pretrained: bool = False


def _rl4evit(hidden: tuple[int, ...], gmacs: float) -> TrainConfig:
    """RL4EViT, section III-D: sites 3, 6, 9, printed network sizes, K = 15, learning rate 5e-5; one epoch.

    The paper names neither the number of epochs nor the images per update; the latter is that of its code.
    """
    config = rl4evit()
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
    **{name: Training(config) for name, config in BUILT_IN.items()},
    "rl4evit-deit-s": Training(_rl4evit((1536, 256, 64), gmacs=3.0), "deit_small_patch16_224", pretrained=True),
    "rl4evit-deit-b": Training(_rl4evit((3072, 256, 64), gmacs=11.6), "deit_base_patch16_224", pretrained=True),
}
