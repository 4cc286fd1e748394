"""Drop and merge by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from helpers import random_merge
from vitprune_env.engine.reduction import check_decision, reduce_tokens, rescue_empty, survivors
from vitprune_env.engine.tokens import TokenState, start_state
from vitprune_env.errors import DecisionError
from vitprune_env.types import Decision


def state_of(*images: list[float], prefix: int = 1) -> TokenState:
    """One feature per row; the prefix rows hold -1."""
    rows = torch.tensor([[-1.0] * prefix + image for image in images], dtype=torch.float32)
    return start_state(rows[..., None], prefix)


def rows_of(state: TokenState) -> Tensor:
    """Rows `[rows, D]` image by image, wherever the images lie."""
    starts = state.first_row.tolist()
    return torch.cat([state.x[start : start + rows] for start, rows in zip(starts, state.lengths, strict=True)])


def flags(*rows: str) -> Tensor:
    """'x.x' as [[True, False, True]]."""
    return torch.tensor([[letter == "x" for letter in row] for row in rows])


def test_drop() -> None:
    state = reduce_tokens(state_of([1, 2, 3], [4, 5, 6]), Decision(keep=flags("x.x", "...")))
    assert rows_of(state)[:, 0].tolist() == [-1, 1, 3, -1]
    assert state.lengths == (3, 1)
    assert state.source.tolist() == [[0, -1, 2], [-1, -1, -1]]
    assert state.size.tolist() == [[1, 0, 1], [0, 0, 0]]


def test_keeping_everybody_copies_nothing() -> None:
    before = state_of([1, 2])
    after = reduce_tokens(before, Decision(keep=flags("xx")))
    assert after.x.data_ptr() == before.x.data_ptr()


def test_merge_is_the_weighted_sum_with_weights_as_given() -> None:
    decision = Decision(
        keep=flags("x..x", "x..."),
        merge_into=torch.tensor([[0, 0, -1, 3], [0, 0, 0, 0]]),
        weight=torch.tensor([[0.5, 0.25, 9.0, 2.0], [1.0, 1.0, 0.0, 0.1]]),
    )
    state = reduce_tokens(state_of([8, 4, 100, 7], [1, 2, 3, 40]), decision)
    assert rows_of(state)[:, 0].tolist() == pytest.approx([-1, 0.5 * 8 + 0.25 * 4, 2 * 7, -1, 1 + 2 + 0.1 * 40])
    assert state.size.tolist() == [[2, 0, 0, 1], [4, 0, 0, 0]]
    assert state.source.tolist() == [[0, 0, -1, 3], [0, 0, 0, 0]]


def test_weight_alone_scales_the_kept() -> None:
    state = reduce_tokens(state_of([1, 2]), Decision(keep=flags("x."), weight=torch.tensor([[3.0, 5.0]])))
    assert state.x[:, 0].tolist() == [-1, 3]
    assert state.source.tolist() == [[0, -1]]


def test_merge_without_weight_adds_up() -> None:
    state = reduce_tokens(state_of([1, 2, 3]), Decision(keep=flags(".x."), merge_into=torch.tensor([[1, 1, 1]])))
    assert state.x[:, 0].tolist() == [-1, 6]


def test_a_group_whose_target_is_not_kept_leaves_whole() -> None:
    state = reduce_tokens(state_of([1, 2, 3]), Decision(keep=flags("..x"), merge_into=torch.tensor([[0, 0, 2]])))
    assert state.x[:, 0].tolist() == [-1, 3]
    assert state.source.tolist() == [[-1, -1, 2]]


def test_merge_into_wins_over_keep() -> None:
    decision = Decision(keep=flags("xxx"), merge_into=torch.tensor([[0, 0, -1]]))
    assert survivors(decision, flags("xxx")).tolist() == [[True, False, False]]
    assert reduce_tokens(state_of([1, 2, 3]), decision).x[:, 0].tolist() == [-1, 3]


def test_members_follow_their_token_through_two_merges() -> None:
    state = reduce_tokens(state_of([1, 2, 3, 4]), Decision(keep=flags("x.x."), merge_into=torch.tensor([[0, 0, 2, 2]])))
    state = reduce_tokens(state, Decision(keep=flags("..x."), merge_into=torch.tensor([[2, -1, 2, -1]])))
    assert state.source.tolist() == [[2, 2, 2, 2]]
    assert state.size.tolist() == [[0, 0, 4, 0]]
    assert state.x[:, 0].tolist() == [-1, 10]


def test_what_a_decision_says_of_the_dead_is_ignored() -> None:
    state = reduce_tokens(state_of([1, 2, 3]), Decision(keep=flags("x.x")))
    decision = Decision(
        keep=flags("x.x"), merge_into=torch.tensor([[0, 99, 2]]), weight=torch.tensor([[1.0, 7.0, 1.0]])
    )
    check_decision(decision, state.alive)
    after = reduce_tokens(state, decision)
    assert after.x[:, 0].tolist() == [-1, 1, 3]
    assert after.source.tolist() == [[0, -1, 2]]
    joined = reduce_tokens(state, Decision(keep=flags("x.."), merge_into=torch.tensor([[0, 0, 0]])))
    assert joined.size.tolist() == [[2, 0, 0]]
    assert joined.x[:, 0].tolist() == [-1, 4]


def test_the_strongest_token_is_saved_where_one_is_needed() -> None:
    before = state_of([1, -5, 3], [1, 2, 3], prefix=0)
    after = reduce_tokens(before, Decision(keep=flags("...", "x..")), keep_one=True)
    assert after.x[:, 0].tolist() == [-5, 1]
    assert rescue_empty(flags("...", "x.."), before).tolist() == flags(".x.", "x..").tolist()


def test_a_saved_token_stays_as_it_is() -> None:
    merge = Decision(keep=flags("..."), merge_into=torch.tensor([[1, 1, 1]]), weight=torch.zeros(1, 3))
    after = reduce_tokens(state_of([1, -5, 3], prefix=0), merge, keep_one=True)
    assert after.x[:, 0].tolist() == [-5]
    assert after.source.tolist() == [[-1, 1, -1]]
    assert after.size.tolist() == [[0, 1, 0]]


def test_only_an_alive_token_is_saved() -> None:
    state = reduce_tokens(state_of([9, 1, 2], prefix=0), Decision(keep=flags(".xx")))
    after = reduce_tokens(state, Decision(keep=flags("...")), keep_one=True)
    assert after.alive.tolist() == [[False, False, True]]


@given(seed=st.integers(0, 9999), prefix=st.integers(0, 2))
def test_random_decisions_against_a_table(seed: int, prefix: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, prefix + 7, 4, generator=generator)
    decision = random_merge(torch.ones(3, 7, dtype=torch.bool), generator)
    check_decision(decision, torch.ones(3, 7, dtype=torch.bool))
    target, weight = decision.merge_into, decision.weight
    after = reduce_tokens(start_state(x, prefix), decision)
    rows = []
    for image in range(3):
        rows += list(x[image, :prefix])
        for token in range(7):
            if decision.keep[image, token]:
                group = [other for other in range(7) if target[image, other] == token]
                rows.append(sum(weight[image, other] * x[image, prefix + other] for other in group))
    torch.testing.assert_close(rows_of(after), torch.stack(rows) if rows else after.x)


def test_features_are_differentiable_through_a_merge() -> None:
    x = torch.tensor([[[0.0], [1.0], [2.0], [3.0]]], requires_grad=True)
    weight = torch.tensor([[1.0, 0.5, 9.0]], requires_grad=True)
    decision = Decision(keep=flags("x.."), merge_into=torch.tensor([[0, 0, -1]]), weight=weight)
    reduce_tokens(start_state(x, 1), decision).x.sum().backward()
    assert x.grad is not None
    assert x.grad.flatten().tolist() == [1, 1, 0.5, 0]
    assert weight.grad is not None
    assert weight.grad.tolist() == [[1, 2, 0]]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"keep": [[True]]}, "keep: expected a tensor of shape .2, 3., got list"),
        ({"keep": flags("xx", "xx")}, r"keep: expected shape \[B, N\] = \(2, 3\), got \(2, 2\)"),
        ({"keep": torch.ones(2, 3)}, "keep: expected dtype torch.bool, got torch.float32"),
        (
            {"keep": torch.ones(2, 3, dtype=torch.bool, device="meta")},
            "keep: expected a tensor on cpu, got one on meta",
        ),
        ({"keep": flags("xxx", "xxx")}, "keep: token 2 of image 1 is dead and cannot be kept"),
        ({"order": torch.zeros(2, 3, dtype=torch.bool)}, "order: expected dtype"),
        ({"weight": torch.ones(2, 3, dtype=torch.int64)}, "weight: expected dtype"),
        ({"weight": torch.ones(2, 1)}, "weight: expected shape"),
        ({"merge_into": torch.zeros(2, 3)}, "merge_into: expected dtype torch.int64"),
        ({"merge_into": torch.tensor([[0, 1, 3], [0, 1, 2]])}, "merge_into: expected -1 to 2, got -1 to 3"),
        ({"merge_into": torch.tensor([[0, 1, -2], [0, 1, 2]])}, "merge_into: expected -1 to 2, got -2 to 1"),
        ({"merge_into": torch.tensor([[1, 2, 2], [0, 1, 2]])}, "token 0 of image 0 goes into token 1, which is dead"),
        ({"merge_into": torch.tensor([[0, 1, 2], [0, 2, 2]])}, "token 1 of image 1 goes into token 2, which is dead"),
        ({"macs": torch.ones(3)}, r"macs: expected shape \[B\] = \(2,\), got \(3,\)"),
        ({"macs": [1.0, 1.0]}, r"macs: expected shape \[B\] = \(2,\), got list"),
        ({"macs": torch.tensor([1.0, -1.0])}, r"macs: expected what was computed, finite and not negative"),
        ({"macs": torch.tensor([1.0, float("nan")])}, r"macs: expected what was computed"),
        ({"macs": torch.tensor([1.0, float("inf")])}, r"macs: expected what was computed"),
    ],
)
def test_wrong_decisions_are_refused(wrong: dict[str, Any], message: str) -> None:
    alive = flags("xxx", "xx.")
    with pytest.raises(DecisionError, match=message):
        check_decision(Decision(**({"keep": alive} | wrong)), alive)


def test_something_else_than_a_decision_is_refused() -> None:
    with pytest.raises(DecisionError, match="decision: expected a Decision, got Tensor"):
        check_decision(flags("xxx"), flags("xxx"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"count": "3"}, "count: expected None or a whole number"),
        ({"park_count": 2.0}, "park_count: expected None or a whole number"),
        ({"weight": torch.ones(2, 4).to_sparse()}, "weight: expected a plain tensor"),
        ({"macs": torch.ones(2).to_sparse()}, "macs: expected a plain tensor"),
        ({"macs": torch.ones(2, dtype=torch.complex64)}, "macs: expected real numbers"),
        ({"features": torch.ones(8, 3).to_sparse()}, "features: expected a plain tensor"),
        ({"order": torch.full((2, 4), float("nan"))}, "order: expected numbers that can be sorted"),
        ({"keep": torch.ones(2, 4).bool().to_sparse()}, "keep: expected a plain tensor"),
    ],
)
def test_odd_fields_are_refused(wrong: dict[str, Any], said: str) -> None:
    alive = torch.ones(2, 4, dtype=torch.bool)
    with pytest.raises(DecisionError, match=said):
        check_decision(Decision(**{"keep": alive, **wrong}), alive)
