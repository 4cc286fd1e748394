"""Non-learning policies, one method per file; all play the same game."""

from .ats import ATS
from .calibrate import calibrate
from .diversity import diversity_score
from .dpc_knn import DPCKNN
from .dpc_merge import DPCMerge
from .evit import EViT
from .random_drop import RandomDrop
from .topk import TopK
from .tri_level import TriLevel

__all__ = ["ATS", "DPCKNN", "DPCMerge", "EViT", "RandomDrop", "TopK", "TriLevel", "calibrate", "diversity_score"]
