"""What `--help` says about each flag: the docstring under its field, broken where the terminal ends."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import is_dataclass
from typing import cast, get_type_hints

from docstring_parser import parse_from_object

LIST = "\n\nAttributes:\n"


def join_lines(flags: type) -> None:
    """Give the fields of flags, and of the groups inside them, help texts without the line breaks of the source.

    tyro shows docstrings under fields as they are written, indentation included. What it finds under "Attributes" in
    the docstring of the class comes first, so the same texts go there, one line each.

    Args:
        flags: a dataclass of flags.
    """
    for kind in _dataclasses(flags):
        text = kind.__doc__ or ""
        if LIST in text:
            continue
        said = [(each.arg_name, " ".join((each.description or "").split())) for each in parse_from_object(kind).params]
        if said:
            kind.__doc__ = text.rstrip() + LIST + "".join(f"    {name}: {what}\n" for name, what in said)


def _dataclasses(flags: type) -> Iterator[type]:
    """The dataclass, those that it is derived from, and those of its fields."""
    yield from (kind for kind in flags.__mro__ if is_dataclass(kind))
    for hint in get_type_hints(flags).values():
        if is_dataclass(hint):
            yield from _dataclasses(cast(type, hint))
