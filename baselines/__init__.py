"""Methods to compare with: fixed and fitted token-reduction policies, one file or folder per method."""

from ..deploy.policy_files import load_policy as load_fitted
from ..deploy.policy_files import save_policy as save_fitted
from .ats import ATS
from .brightness import Brightness
from .calibration import Knob
from .clusters import (
    DPCKNN,
    DPCMerge,
    KMeansMerge,
    MergerConfig,
    PoolMerge,
    SubSampleMerge,
    diversity_score,
    fit_merger,
)
from .dynamicvit import DynamicViT, DynamicViTConfig, fit_dynamicvit
from .evit import EViT, TriLevel
from .evo_vit import EvoViT, read_from_patches
from .fitting import FitConfig, Recipe
from .life_regression import (
    LifeConfig,
    LifeRegression,
    finetune_life_regression,
    fit_life_regression,
    train_life_regression,
)
from .ltmp import LTMP, LTMPFitConfig, fit_ltmp
from .random_drop import RandomDrop
from .registry import Method, available, calibrate, describe, fit, make, parsed
from .token_scores import DistillationConfig, MasksConfig, TokenScores, fit_distilled_attention, fit_masks
from .tome import ToMe, ToMeShare
from .topk import TopK

__all__ = [
    "ATS",
    "DPCKNN",
    "LTMP",
    "Brightness",
    "DPCMerge",
    "DistillationConfig",
    "DynamicViT",
    "DynamicViTConfig",
    "EViT",
    "EvoViT",
    "FitConfig",
    "KMeansMerge",
    "Knob",
    "LTMPFitConfig",
    "LifeConfig",
    "LifeRegression",
    "MasksConfig",
    "MergerConfig",
    "Method",
    "PoolMerge",
    "RandomDrop",
    "Recipe",
    "SubSampleMerge",
    "ToMe",
    "ToMeShare",
    "TokenScores",
    "TopK",
    "TriLevel",
    "available",
    "calibrate",
    "describe",
    "diversity_score",
    "finetune_life_regression",
    "fit",
    "fit_distilled_attention",
    "fit_dynamicvit",
    "fit_life_regression",
    "fit_ltmp",
    "fit_masks",
    "fit_merger",
    "load_fitted",
    "make",
    "parsed",
    "read_from_patches",
    "save_fitted",
    "train_life_regression",
]
