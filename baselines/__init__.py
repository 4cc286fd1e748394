"""Non-learning policies, one method per file; all play the same game."""

from .calibrate import calibrate
from .evit import EViT
from .evo_vit import EvoViT, read_from_patches
from .random_drop import RandomDrop
from .topk import TopK

__all__ = ["EViT", "EvoViT", "RandomDrop", "TopK", "calibrate", "read_from_patches"]
