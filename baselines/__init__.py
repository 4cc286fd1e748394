"""Non-learning policies, one method per file; all play the same game."""

from .calibrate import calibrate
from .evit import EViT
from .knobs import Knob
from .random_drop import RandomDrop
from .registry import Method, available, describe, make
from .topk import TopK

__all__ = ["EViT", "Knob", "Method", "RandomDrop", "TopK", "available", "calibrate", "describe", "make"]
