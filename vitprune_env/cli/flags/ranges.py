"""What the numbers of flags may be, whatever command has them; the settings of training check their own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, is_dataclass
from math import inf, isfinite
from typing import Any


@dataclass(frozen=True)
class Range:
    """Finite numbers from `least` to `most`, without `least` itself if `above`."""

    least: float
    most: float = inf
    above: bool = False

    def __contains__(self, number: float) -> bool:
        return (
            isfinite(number)
            and (number > self.least or (number == self.least and not self.above))
            and (number <= self.most)
        )

    def __str__(self) -> str:
        if self.most == inf:
            return f"a number above {self.least:g}" if self.above else f"{self.least:g} or more"
        first = f"above {self.least:g} and at most" if self.above else f"from {self.least:g} to"
        return f"a number {first} {self.most:.10g}"


COUNT, POSITIVE, PART = Range(1), Range(0, above=True), Range(0, 1, above=True)
RANGES = {
    "seed": Range(0, 2**32 - 1),  # the largest that numpy takes
    "threads": Range(1, 1024),  # the system kills a process that asks for very many
    "workers": Range(0, 1024),
    "port": Range(0, 65535),
    "smallest_view": PART,
    "keep_rate": PART,
    "keep": PART,
    "target_share": PART,
    "target_keep": PART,
    "views": Range(0),
    "spread": Range(0),
    "drop_path": Range(0, 0.99),
    **dict.fromkeys(("target_gmacs", "ratios", "seconds"), POSITIVE),
    **dict.fromkeys(
        (
            "images",
            "tune_images",
            "fit_images",
            "fit_steps",
            "seeds",
            "batch_size",
            "batch_sizes",
            "pairs",
            "timed_images",
            "test_images",
            "untrained_actors",
            "train_images",
            "validate_images",
            "img_size",
            "num_classes",
            "max_batch",
            "train",
            "val",
            "size",
        ),
        COUNT,
    ),
}
FILLED = ("models", "dtypes", "batch_sizes", "keep", "ratios", "forms")  # lists without which there is nothing to do


def check_ranges(flags: Any, usual: Any) -> None:
    """Refuse numbers out of range, and empty lists, among the flags of a command line and the groups in it.

    Args:
        flags: a dataclass of flags.
        usual: the same with the defaults, which stand as they are.

    Raises:
        SettingsError: naming the flag.
    """
    from vitprune_env.errors import SettingsError

    for name, value in _given(flags, usual):
        values = value if isinstance(value, tuple) else (value,)
        if not values and name in FILLED:
            raise SettingsError(f"{name}: expected at least one, got none")
        numbers = [each for each in values if isinstance(each, int | float)]  # `views` of analyse are words
        wrong = [each for each in numbers if name in RANGES and each not in RANGES[name]]
        if wrong:
            raise SettingsError(f"{name}: expected {RANGES[name]}, got {wrong[0]}")


def _given(flags: Any, usual: Any) -> Iterator[tuple[str, Any]]:
    """Names and values of the flags that are not the usual ones, those of groups included."""
    for name, value in vars(flags).items():
        if is_dataclass(value):
            yield from _given(value, getattr(usual, name))
        elif value != getattr(usual, name):
            yield name, value
