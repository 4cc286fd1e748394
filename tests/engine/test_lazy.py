from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass, replace

import torch

from helpers import random_images, toy
from vitprune_env.game.token_game import TokenGame
from vitprune_env.lazy_fields import given, lazily, on_demand
from vitprune_env.types import Decision

calls: list[int] = []


def square(number: int) -> int:
    """Counts how often it is asked."""
    calls.append(number)
    return number**2


@lazily("square")
@dataclass(frozen=True)
class Number:
    """A number and its square."""

    number: int
    square: int


def test_a_field_is_worked_out_once_and_only_when_read() -> None:
    calls.clear()
    lazy = Number(3, on_demand(square, 3))
    assert callable(given(lazy, "square"))
    assert not calls
    assert (lazy.square, lazy.square, given(lazy, "square")) == (9, 9, 9)
    assert calls == [3]
    assert lazy == Number(3, 9)


def test_it_travels_like_any_other_field() -> None:
    lazy = Number(4, on_demand(square, 4))
    for other in (pickle.loads(pickle.dumps(lazy)), copy.deepcopy(lazy), copy.copy(lazy), replace(lazy)):
        assert other == Number(4, 16)
    assert replace(lazy, square=0).square == 0


def test_what_nobody_reads_is_never_worked_out() -> None:
    """A pass that drops by class attention touches neither sizes nor sources nor the order."""
    backbone = toy("deit_tiny_patch16_224")
    game = TokenGame(backbone, (1, 2), check=False)
    obs = game.reset(random_images(backbone, 2))
    obs = game.step(Decision(keep=obs.alive & (torch.arange(16) % 3 > 0)))[0]
    assert obs is not None
    for thing, names in ((obs, ("image", "token", "offsets", "size", "order")), (game.state, ("size", "source"))):
        assert all(callable(given(thing, name)) for name in names)
    assert obs.size.sum().item() == 20
    assert not callable(given(obs, "size"))


def test_a_recorded_observation_holds_values_only() -> None:
    backbone = toy("deit_tiny_patch16_224")
    obs = replace(TokenGame(backbone, (1,)).reset(random_images(backbone, 2)))
    assert all(isinstance(given(obs, name), torch.Tensor) for name in ("image", "token", "offsets", "size", "order"))
