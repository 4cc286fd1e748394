"""Non-learning policies, one method per file; all play the same game."""

from .ats import ATS
from .calibrate import calibrate
from .diversity import diversity_score
from .dpc_knn import DPCKNN
from .dpc_merge import DPCMerge
from .dynamicvit import DynamicViT
from .dynamicvit_fit import DynamicViTConfig, fit_dynamicvit
from .evit import EViT
from .evo_vit import EvoViT, read_from_patches
from .fitted import load_fitted, save_fitted
from .knobs import Knob
from .life_fit import LifeConfig, finetune_life_regression, fit_life_regression
from .life_regression import LifeRegression
from .ltmp import LTMP
from .ltmp_fit import LTMPFitConfig, fit_ltmp
from .mergers import KMeansMerge, PoolMerge
from .random_drop import RandomDrop
from .registry import Method, available, describe, make
from .subsample import SubSampleMerge
from .subsample_fit import MergerConfig, fit_merger
from .tome import ToMe
from .topk import TopK
from .tri_level import TriLevel

__all__ = [
    "ATS",
    "DPCKNN",
    "LTMP",
    "DPCMerge",
    "DynamicViT",
    "DynamicViTConfig",
    "EViT",
    "EvoViT",
    "KMeansMerge",
    "Knob",
    "LTMPFitConfig",
    "LifeConfig",
    "LifeRegression",
    "MergerConfig",
    "Method",
    "PoolMerge",
    "RandomDrop",
    "SubSampleMerge",
    "ToMe",
    "TopK",
    "TriLevel",
    "available",
    "calibrate",
    "describe",
    "diversity_score",
    "finetune_life_regression",
    "fit_dynamicvit",
    "fit_life_regression",
    "fit_ltmp",
    "fit_merger",
    "load_fitted",
    "make",
    "read_from_patches",
    "save_fitted",
]
