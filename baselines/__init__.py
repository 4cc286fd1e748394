"""Non-learning policies, one method per file; all play the same game."""

from ..deploy.policy_files import load_policy as load_fitted
from ..deploy.policy_files import save_policy as save_fitted
from .ats import ATS
from .calibration import calibrate
from .clusters.diversity import diversity_score
from .clusters.dpc_knn import DPCKNN
from .clusters.dpc_merge import DPCMerge
from .clusters.mergers import KMeansMerge, PoolMerge
from .clusters.subsample import SubSampleMerge
from .clusters.subsample_fit import MergerConfig, fit_merger
from .dynamicvit.fitting import DynamicViTConfig, fit_dynamicvit
from .dynamicvit.policy import DynamicViT
from .evit import EViT
from .evo_vit import EvoViT, read_from_patches
from .knobs import Knob
from .life_regression.fitting import LifeConfig, finetune_life_regression, fit_life_regression
from .life_regression.policy import LifeRegression
from .ltmp.fitting import LTMPFitConfig, fit_ltmp
from .ltmp.policy import LTMP
from .random_drop import RandomDrop
from .registry import Method, available, describe, make
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
