"""LTMP (Bonnaerens & Dambre, 2023): the policy, its training form, and the fit of its thresholds."""

from .fitting import LTMPFitConfig, fit_ltmp
from .policy import LTMP

__all__ = ["LTMP", "LTMPFitConfig", "fit_ltmp"]
