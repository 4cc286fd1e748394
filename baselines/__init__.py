"""Non-learning policies, one method per file; all play the same game."""

from .ats import ATS
from .calibrate import calibrate
from .diversity import diversity_score
from .dpc_knn import DPCKNN
from .dpc_merge import DPCMerge
from .evit import EViT
from .evo_vit import EvoViT, read_from_patches
from .knobs import Knob
from .random_drop import RandomDrop
from .registry import Method, available, describe, make
from .topk import TopK
from .tri_level import TriLevel

__all__ = [
    "ATS",
    "DPCKNN",
    "DPCMerge",
    "EViT",
    "EvoViT",
    "Knob",
    "Method",
    "RandomDrop",
    "TopK",
    "TriLevel",
    "available",
    "calibrate",
    "describe",
    "diversity_score",
    "make",
    "read_from_patches",
]
