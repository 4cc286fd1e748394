"""Policies that take part in a benchmark, and how each is brought to a budget."""

from vitprune_env.benchmarking.contestants.entries import DENSE, Entries, contestants_of
from vitprune_env.benchmarking.contestants.methods import of_method
from vitprune_env.benchmarking.contestants.own_files import is_own, label_of, load_object
from vitprune_env.benchmarking.contestants.task import Contestant, Fits, Task
from vitprune_env.benchmarking.contestants.trained import untrained_policies

__all__ = [
    "DENSE",
    "Contestant",
    "Entries",
    "Fits",
    "Task",
    "contestants_of",
    "is_own",
    "label_of",
    "load_object",
    "of_method",
    "untrained_policies",
]
