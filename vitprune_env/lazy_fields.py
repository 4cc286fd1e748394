"""Fields of frozen dataclasses that are computed only when they are read.

A site of the game has to be cheap: most policies read few of the things that an observation or a token state can
say, and on a single small image each of them costs about as much as a layer norm.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")


class _Later:
    """A field that holds its value, or a function that gives it when the field is first read."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            return self
        value = vars(instance)[self.name]
        if callable(value):
            value = vars(instance)[self.name] = value()
        return value

    def __set__(self, instance: Any, value: Any) -> None:
        vars(instance)[self.name] = value


def lazily(*names: str) -> Callable[[type[T]], type[T]]:
    """Decorate a frozen dataclass some of whose fields are computed only when they are read.

    The constructor takes the value of such a field, or what `on_demand` makes. `given` says what it took.
    """

    def decorate(cls: type[T]) -> type[T]:
        for name in names:
            setattr(cls, name, _Later(name))
        return cls

    return decorate


def on_demand(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The value of `function(*args, **kwargs)`, for a field that is computed only when it is read."""
    return partial(function, *args, **kwargs)  # unlike a lambda it can be pickled


def given(instance: Any, name: str) -> Any:
    """What the constructor took for a field, or its value once it has been read."""
    return vars(instance)[name]
