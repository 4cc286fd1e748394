from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vitprune_env.engine.reduction import reduce_tokens
from vitprune_env.engine.tokens import TokenState, segment_mean, start_state
from vitprune_env.types import Decision


def numbered_state(batch: int, tokens: int, prefix: int) -> TokenState:
    """Row r of image b holds the number 100 b + r."""
    x = 100.0 * torch.arange(batch)[:, None] + torch.arange(prefix + tokens)
    return start_state(x[..., None], prefix)


def test_start_state_holds_everybody() -> None:
    state = numbered_state(2, 3, 1)
    assert state.x.shape == (8, 1)
    assert state.lengths == (4, 4)
    assert state.alive.all()
    assert state.size.tolist() == [[1, 1, 1], [1, 1, 1]]
    assert state.source.tolist() == [[0, 1, 2], [0, 1, 2]]
    assert state.order.tolist() == [[0, 1, 2], [0, 1, 2]]
    assert state.tokens[:, 0].tolist() == [1, 2, 3, 101, 102, 103]
    assert state.prefix[..., 0].tolist() == [[0], [100]]


@given(prefix=st.integers(0, 3), seed=st.integers(0, 999), uniform=st.booleans())
def test_rows_are_where_the_state_says(prefix: int, seed: int, uniform: bool) -> None:
    state = numbered_state(4, 6, prefix)
    keep = torch.rand(4, 6, generator=torch.Generator().manual_seed(seed)) < 0.5
    keep = keep[:1].expand(4, 6).clone() if uniform else keep
    state = reduce_tokens(state, Decision(keep=keep))
    rows, place = state.x[:, 0].tolist(), 0
    for image in state.layout or range(4):
        alive = keep[image].nonzero()[:, 0].tolist()
        assert state.lengths[image] == prefix + len(alive)
        assert rows[place : place + prefix] == [100.0 * image + r for r in range(prefix)]
        place += prefix
        assert rows[place : place + len(alive)] == [100.0 * image + prefix + token for token in alive]
        place += len(alive)
    assert place == len(rows)
    assert torch.equal(state.x[state.patch_rows], state.tokens)
    assert torch.equal(state.x[state.prefix_rows], state.prefix)
    assert state.tokens[:, 0].tolist() == (100.0 * state.image + prefix + state.token).tolist()
    assert state.offsets.diff().tolist() == keep.sum(dim=1).tolist()
    assert state.is_uniform == (len(set(state.lengths)) == 1)
    assert len(state.groups) == len(set(state.lengths)), "equally long images lie together"
    assert state.row_offsets.tolist()[-1] == len(rows)
    assert state.count == (state.lengths[0] - prefix if state.is_uniform else None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_segment_mean(dtype: torch.dtype) -> None:
    values = torch.tensor([[2.0], [4.0], [9.0]], dtype=dtype)
    mean = segment_mean(values, torch.tensor([0, 0, 2]), 4)
    assert mean.dtype == dtype
    assert mean[:, 0].tolist() == [3, 0, 9, 0]


def test_segment_mean_of_many_half_precision_rows_does_not_drift() -> None:
    values = torch.full((4096, 1), 1.5, dtype=torch.bfloat16)
    assert segment_mean(values, torch.zeros(4096, dtype=torch.int64), 1).item() == 1.5


def test_order_follows_the_rank_of_the_alive() -> None:
    state = numbered_state(1, 4, 0)
    state = reduce_tokens(
        state, Decision(keep=torch.tensor([[True, True, False, True]]), order=torch.tensor([[9, 4, 0, 4]]))
    )
    assert state.order.tolist() == [[2, 0, -1, 1]], "ties go to the lower patch number, the dead have no rank"
    state = reduce_tokens(state, Decision(keep=torch.tensor([[True, False, False, True]])))
    assert state.order.tolist() == [[1, -1, -1, 0]], "the order lasts when the next decision does not change it"
