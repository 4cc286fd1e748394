"""Non-learning policies, one method per file; all play the same game."""

from .ats import ATS
from .calibrate import calibrate
from .diversity import diversity_score
from .dpc_knn import DPCKNN
from .dpc_merge import DPCMerge
from .evit import EViT
from .mergers import KMeansMerge, PoolMerge
from .random_drop import RandomDrop
from .subsample import SubSampleMerge
from .subsample_fit import MergerConfig, fit_merger
from .topk import TopK
from .tri_level import TriLevel

__all__ = [
    "ATS",
    "DPCKNN",
    "DPCMerge",
    "EViT",
    "KMeansMerge",
    "MergerConfig",
    "PoolMerge",
    "RandomDrop",
    "SubSampleMerge",
    "TopK",
    "TriLevel",
    "calibrate",
    "diversity_score",
    "fit_merger",
]
