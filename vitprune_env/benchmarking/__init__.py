"""Policies compared at equal cost: `benchmark` and what it is made of."""

from vitprune_env.benchmarking.comparison import benchmark
from vitprune_env.benchmarking.contestants import Fits
from vitprune_env.benchmarking.intervals import difference, interval, standard_error
from vitprune_env.benchmarking.measurement import Row, Timing, measure
from vitprune_env.benchmarking.result import BenchmarkResult

__all__ = [
    "BenchmarkResult",
    "Fits",
    "Row",
    "Timing",
    "benchmark",
    "difference",
    "interval",
    "measure",
    "standard_error",
]
