"""Baselines on stock networks as papers printed them: settings to measure with, and the numbers that were printed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """A method without training on a stock network, and what a paper printed of it."""

    model: str  # name in timm
    policy: str  # name in the registry of baselines
    keep_rate: float
    gmacs: float
    top1: float  # per cent


# RL4EViT, Table I (no fine-tuning), except the last: Long et al., 2023, Table 2, fine-tuned weights.
PUBLISHED: dict[str, Published] = {
    "evit-deit-s-0.8": Published("deit_small_patch16_224", "evit", 0.8, 3.5, 79.2),
    "evit-deit-s-0.7": Published("deit_small_patch16_224", "evit", 0.7, 3.0, 78.5),
    "evit-deit-s-0.6": Published("deit_small_patch16_224", "evit", 0.6, 2.6, 76.8),
    "evit-deit-b-0.9": Published("deit_base_patch16_224", "evit", 0.9, 15.3, 81.7),
    "evit-deit-b-0.79": Published("deit_base_patch16_224", "evit", 0.79, 13.1, 81.3),
    "evit-deit-b-0.7": Published("deit_base_patch16_224", "evit", 0.7, 11.6, 80.5),
    "evit-lv-vit-s-0.7": Published("lv_vit_s", "evit", 0.7, 4.7, 83.0),
}
