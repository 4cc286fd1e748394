"""Merging by clusters: decouple and merge (Long et al., 2023) with its variants, and DPC-KNN (Haurum et al., 2023)."""

from .diversity import diversity_score
from .dpc_knn import DPCKNN
from .dpc_merge import DPCMerge
from .mergers import KMeansMerge, PoolMerge
from .subsample import SubSampleMerge
from .subsample_fitting import MergerConfig, fit_merger

__all__ = [
    "DPCKNN",
    "DPCMerge",
    "KMeansMerge",
    "MergerConfig",
    "PoolMerge",
    "SubSampleMerge",
    "diversity_score",
    "fit_merger",
]
