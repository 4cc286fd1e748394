"""Flags that commands have in common; those of training are in `flags.training`, which imports torch."""

from vitprune_env.cli.flags.common import (
    TEST_SEED,
    TUNE_SEED,
    VALIDATION_SEED,
    CommonFlags,
    DeviceFlags,
    ImageFlags,
    OutputFlags,
    ResumableFlags,
    TargetFlags,
    TaskName,
    lowered,
    named_sites,
    own_network,
)
from vitprune_env.cli.flags.ranges import check_ranges
from vitprune_env.cli.flags.reading import in_flags, read_flags
from vitprune_env.cli.flags.run_folder import make_way

__all__ = [
    "TEST_SEED",
    "TUNE_SEED",
    "VALIDATION_SEED",
    "CommonFlags",
    "DeviceFlags",
    "ImageFlags",
    "OutputFlags",
    "ResumableFlags",
    "TargetFlags",
    "TaskName",
    "check_ranges",
    "in_flags",
    "lowered",
    "make_way",
    "named_sites",
    "own_network",
    "read_flags",
]
