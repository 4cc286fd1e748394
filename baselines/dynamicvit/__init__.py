"""DynamicViT (Rao et al., 2021): the policy, and the fit of its predictors."""

from .fitting import DynamicViTConfig, fit_dynamicvit
from .policy import DynamicViT

__all__ = ["DynamicViT", "DynamicViTConfig", "fit_dynamicvit"]
