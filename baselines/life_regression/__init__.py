"""Life regression (Chen et al.): the policy, and its two stages of training."""

from .fitting import LifeConfig, finetune_life_regression, fit_life_regression, train_life_regression
from .policy import LifeRegression

__all__ = [
    "LifeConfig",
    "LifeRegression",
    "finetune_life_regression",
    "fit_life_regression",
    "train_life_regression",
]
