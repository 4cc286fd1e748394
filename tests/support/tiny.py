"""A network so small that a whole game takes a millisecond, and images for it."""

from __future__ import annotations

import torch
from timm.models.vision_transformer import VisionTransformer
from torch.utils.data import TensorDataset

from vitprune_env.engine.backbone import Backbone


def tiny_backbone() -> Backbone:
    """4 patches, 2 blocks, 3 classes; the same weights every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = VisionTransformer(img_size=8, patch_size=4, embed_dim=8, depth=2, num_heads=2, num_classes=3)
    return Backbone(model.eval(), "tiny", (1, 2))


def tiny_data(size: int = 5) -> TensorDataset:
    """Images and labels of all classes."""
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(size, 3, 8, 8, generator=generator), torch.arange(size) % 3)
