"""Non-learning policies, one method per file; all play the same game."""

from .calibrate import calibrate
from .evit import EViT
from .random_drop import RandomDrop
from .topk import TopK

__all__ = ["EViT", "RandomDrop", "TopK", "calibrate"]
