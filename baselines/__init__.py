"""Non-learning policies, one method per file; all play the same game."""

from .evit import EViT
from .random_drop import RandomDrop
from .topk import TopK

__all__ = ["EViT", "RandomDrop", "TopK"]
