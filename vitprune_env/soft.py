"""Masked execution under the names that earlier versions promised; it is `engine.masked`."""

from vitprune_env.engine.masked import MaskedState as SoftState
from vitprune_env.engine.masked import classify_masked as classify_soft
from vitprune_env.engine.masked import run_masked as run_soft
from vitprune_env.engine.masked import start_masked as start_soft

__all__ = ["SoftState", "classify_soft", "run_soft", "start_soft"]
