"""How baselines are fitted: the training loop, its inputs, and the recipe that a method brings."""

from .inputs import ImageInputs, PreparedTokens
from .keep_rate import KeepRateConfig, KeepRateRecipe, KeepRateTask
from .loop import FitConfig, FitResult, fit_task
from .recipe import Problem, Recipe, fit_policy
from .task import FitTask, ModuleTask, frozen

__all__ = [
    "FitConfig",
    "FitResult",
    "FitTask",
    "ImageInputs",
    "KeepRateConfig",
    "KeepRateRecipe",
    "KeepRateTask",
    "ModuleTask",
    "PreparedTokens",
    "Problem",
    "Recipe",
    "fit_policy",
    "fit_task",
    "frozen",
]
