"""Settings objects as JSON values: how a checkpoint stores them, and how two sets of settings are compared."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from hashlib import sha256
from math import isfinite
from numbers import Integral, Real
from typing import Any

from torch import Tensor

from ...types import Site

PLAIN: dict[str, tuple[type, str]] = {
    "int": (Integral, "a whole number"),
    "float": (Real, "a number"),
    "bool": (bool, "True or False"),
    "str": (str, "a string"),
}
PAIR, SEVERAL = r"tuple\[(\w+), \w+\]", r"tuple\[(\w+), \.\.\.\]"  # types of fields
NAME = "name"  # the key under which the public name of an object's class is stored


def check(settings: object, name: str, fine: bool, expected: str) -> None:
    """Refuse a value of a settings object.

    Raises:
        ValueError: unless `fine`; it gives the name, what was expected and the value.
    """
    if not fine:
        raise ValueError(f"{name}: expected {expected}, got {getattr(settings, name)!r}")


def check_numbers(settings: Any) -> None:
    """Refuse fields that are declared as numbers, flags, strings or tuples of them, and hold something else.

    Raises:
        TypeError: naming the first such field.
        ValueError: for a number that is infinite or NaN.
    """
    for each in fields(settings):
        declared = each.type if isinstance(each.type, str) else getattr(each.type, "__name__", str(each.type))
        name, _, other = declared.partition(" | ")
        value = getattr(settings, each.name)
        if other == "None" and value is None:
            continue
        if found := re.fullmatch(PAIR, declared) or re.fullmatch(SEVERAL, declared):
            name, pair = found[1], found.re.pattern == PAIR
            if not isinstance(value, tuple | list) or (pair and len(value) != 2):
                raise TypeError(f"{each.name}: expected {'two values' if pair else 'a tuple'}, got {value!r}")
        for part in value if found else (value,):
            if name in PLAIN:
                _check_plain(each.name, part, name, other)


def _check_plain(field: str, value: Any, name: str, other: str) -> None:
    """Refuse a value that is not of the type of this name."""
    kind, expected = PLAIN[name]
    if not isinstance(value, kind) or (name != "bool" and isinstance(value, bool)):
        raise TypeError(f"{field}: expected {expected}{other and ' or None'}, got {value!r}")
    if isinstance(value, Real) and not isfinite(value):
        raise ValueError(f"{field}: expected a finite number{other and ' or None'}, got {value!r}")


def check_type(name: str, value: object, kind: type, expected: str) -> None:
    """Refuse an argument of another type.

    Raises:
        TypeError: unless `value` is a `kind`; it gives the name, what was expected and the value.
    """
    if not isinstance(value, kind):
        raise TypeError(f"{name}: expected {expected}, got {value!r}")


def as_json(value: Any) -> Any:
    """A settings object as JSON values.

    Objects become a dict of their fields with the public name of their class, functions become their name. No module
    path is stored, so that files stay readable when code moves.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Site):
        return value.label
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(name): as_json(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(each) for each in value]
    if is_dataclass(value) and not isinstance(value, type):
        return {NAME: type(value).__name__, **{each.name: as_json(getattr(value, each.name)) for each in fields(value)}}
    if isinstance(value, partial):
        return {NAME: as_json(value.func), "args": as_json(value.args), "keywords": as_json(value.keywords)}
    if hasattr(value, "__name__"):
        return value.__name__
    plain = {name: each for name, each in vars(value).items() if isinstance(each, bool | int | float | str)}
    return {NAME: type(value).__name__, **plain}


def differences(here: Any, there: Any, may_change: frozenset[str] = frozenset(), path: str = "") -> dict[str, str]:
    """What differs between two results of `as_json`.

    Args:
        here: settings of this run.
        there: settings of the other one.
        may_change: dotted names that are not compared, such as `learner.lr`.
        path: where both are found; used in the recursion.

    Returns:
        For each difference its dotted name, and a sentence such as `learner.clip was 0.2, now is 0.1`.
    """
    if path in may_change or here == there:
        return {}
    if isinstance(here, dict) and isinstance(there, dict) and here.get(NAME) == there.get(NAME):
        found: dict[str, str] = {}
        for name in sorted(here.keys() | there.keys()):
            inner = f"{path}.{name}" if path else name
            found |= differences(here.get(name), there.get(name), may_change, inner)
        return found
    return {path: f"{path} was {_short(there)}, now is {_short(here)}"}


def _short(value: Any) -> str:
    """An object by its name alone."""
    return str(value[NAME]) if isinstance(value, dict) and NAME in value else repr(value)


def digest(tensors: Mapping[str, Tensor]) -> str:
    """A short name for the values of tensors: of other values it is another."""
    content = sha256()
    for name, tensor in sorted(tensors.items()):
        content.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return content.hexdigest()[:16]
