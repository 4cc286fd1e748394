"""What the methods' parameters may be: checked when a policy is made, by name; one number, or one per site."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

from ..types import Observation


def whole_number(name: str, number: Any, least: int | None = None) -> int:
    """A whole number as a Python one.

    Raises:
        ValueError: naming the parameter, for anything else, or less than `least`.
    """
    if not _is_whole(number) or (least is not None and number < least):
        bound = "" if least is None else f" of at least {least}"
        raise ValueError(f"{name}: expected a whole number{bound}, got {number!r}")
    return int(number)


def whole_numbers(name: str, numbers: Any, least: int = 0) -> int | tuple[int, ...]:
    """A whole number as a Python one; one per site (a sequence, a tensor, an array) as a tuple of them.

    Raises:
        ValueError: naming the parameter, for anything else, for nothing, or for a number below `least`.
    """
    values = numbers.tolist() if hasattr(numbers, "tolist") else numbers
    several = tuple(values) if isinstance(values, Iterable) else (values,)
    if not several or not all(_is_whole(value) and value >= least for value in several):
        raise ValueError(f"{name}: expected whole numbers of at least {least}, one or one per site, got {numbers!r}")
    whole = tuple(map(int, several))
    return whole if isinstance(values, Iterable) else whole[0]


def check_range(name: str, value: Any, low: float, high: float, open_low: bool = False) -> None:
    """Refuse what is no number from `low` to `high`, `low` left out if `open_low`.

    Raises:
        ValueError: naming the parameter.
    """
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not low <= float(value) <= high or (open_low and value == low):
        bounds = f"above {low} and at most {high}" if open_low else f"from {low} to {high}"
        raise ValueError(f"{name}: expected a number {bounds}, got {value!r}")


def check_flag(name: str, value: Any) -> None:
    """Refuse what is neither True nor False.

    Raises:
        TypeError: naming the parameter.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {value!r}")


def per_site(name: str, value: Any, obs: Observation) -> Any:
    """The number meant for the current site: the same for all sites, or one per site.

    Raises:
        ValueError: naming the parameter, if there are not as many numbers as sites.
    """
    if not isinstance(value, tuple):
        return value
    if len(value) != obs.num_steps:
        raise ValueError(f"{name}: expected one number or one per site ({obs.num_steps}), got {len(value)} of them")
    return value[obs.step]


def _is_whole(number: Any) -> bool:
    return isinstance(number, Integral) and not isinstance(number, bool)
