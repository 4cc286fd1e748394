"""Rivals that score each token by itself with a small network, like a learned agent, but are fitted otherwise."""

from .distillation import DistillationConfig, fit_distilled_attention
from .masks import MasksConfig, fit_masks
from .policy import TokenScores

__all__ = ["DistillationConfig", "MasksConfig", "TokenScores", "fit_distilled_attention", "fit_masks"]
