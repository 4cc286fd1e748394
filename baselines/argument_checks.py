"""Checks of the parameters of methods and of their fits; every error names the parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import isfinite
from numbers import Integral, Real
from typing import Any

from ..types import Observation


def check_fields(settings: object, names: Iterable[str], is_fine: Callable[[Any], bool], expected: str) -> None:
    """Refuse settings whose fields `names` are not as they should be.

    Args:
        settings: an object with these fields.
        names: of the fields.
        is_fine: whether a value is allowed.
        expected: what is allowed, for the message.

    Raises:
        ValueError: naming the first such field.
    """
    for name in names:
        value = getattr(settings, name)
        if not is_fine(value):
            raise ValueError(f"{name}: expected {expected}, got {value!r}")


def whole_number(name: str, number: Any, least: int | None = None) -> int:
    """A whole number of any type as an int.

    Raises:
        ValueError: naming the parameter, if it is not a whole number or less than `least`.
    """
    if not _is_whole(number) or (least is not None and number < least):
        bound = "" if least is None else f" of at least {least}"
        raise ValueError(f"{name}: expected a whole number{bound}, got {number!r}")
    return int(number)


def whole_numbers(name: str, numbers: Any, least: int = 0) -> int | tuple[int, ...]:
    """A whole number of any type as an int; one per site (a sequence, a tensor, an array) as a tuple of ints.

    Raises:
        ValueError: naming the parameter, if it is anything else, empty, or holds a number below `least`.
    """
    values = numbers.tolist() if hasattr(numbers, "tolist") else numbers
    several = tuple(values) if isinstance(values, Iterable) else (values,)
    if not several or not all(_is_whole(value) and value >= least for value in several):
        raise ValueError(f"{name}: expected whole numbers of at least {least}, one or one per site, got {numbers!r}")
    whole = tuple(map(int, several))
    return whole if isinstance(values, Iterable) else whole[0]


def check_range(name: str, value: Any, low: float, high: float, open_low: bool = False) -> None:
    """Refuse what is not a number from `low` to `high`, `low` excluded if `open_low`.

    Raises:
        ValueError: naming the parameter.
    """
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not low <= float(value) <= high or (open_low and value == low):
        bounds = f"above {low} and at most {high}" if open_low else f"from {low} to {high}"
        raise ValueError(f"{name}: expected a number {bounds}, got {value!r}")


def check_number(name: str, value: Any) -> None:
    """Refuse what is not a finite number.

    Raises:
        ValueError: naming the parameter.
    """
    if not isinstance(value, Real) or isinstance(value, bool) or not isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value!r}")


def check_flag(name: str, value: Any) -> None:
    """Refuse anything but True and False.

    Raises:
        TypeError: naming the parameter.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {value!r}")


def per_site(name: str, value: Any, obs: Observation) -> Any:
    """The value for the current site: `value` itself, or its entry for this site where it is a tuple.

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
