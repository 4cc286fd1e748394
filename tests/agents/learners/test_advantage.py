"""Generalised advantage estimation with deaths."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vitprune_env.agents.learners.advantage import generalized_advantage


def table(*agents: tuple[float, float, float]) -> torch.Tensor:
    """Three numbers for each of some agents of one image, as `[T, 1, N]`."""
    return torch.tensor(agents).T[:, None, :]


def test_three_fates_by_hand() -> None:
    # Agent 0 lives to the end, agent 1 is pruned at the second step, agent 2 at the first.
    alive = table((1, 1, 1), (1, 1, 0), (1, 0, 0)).bool()
    terminated = table((0, 0, 1), (0, 1, 0), (1, 0, 0)).bool()
    reward = table((1.0, 2.0, 3.0), (1.0, 2.0, 99.0), (5.0, 99.0, 99.0))
    value = table((0.5, 1.0, 2.0), (0.5, 1.0, 77.0), (4.0, 77.0, 77.0))
    advantage = generalized_advantage(reward, value, alive, terminated, discount=0.5, trace=0.8)
    # delta of agent 0: 1 + .5 * 1 - .5 = 1;  2 + .5 * 2 - 1 = 2;  3 - 2 = 1;  decay .4
    # delta of agent 1: 1;  2 - 1 = 1 (no bootstrap);  agent 2: 5 - 4 = 1
    expected = table((1 + 0.4 * 2.4, 2 + 0.4 * 1, 1.0), (1 + 0.4 * 1, 1.0, 0.0), (1.0, 0.0, 0.0))
    assert torch.allclose(advantage, expected)


def test_with_full_trace_and_no_discount_the_target_is_the_return() -> None:
    alive = table((1, 1, 1), (1, 1, 0)).bool()
    terminated = table((0, 0, 1), (0, 1, 0)).bool()
    reward = table((1.0, 2.0, 3.0), (1.0, 2.0, 50.0))
    value = torch.rand(3, 1, 2)
    advantage = generalized_advantage(reward, value, alive, terminated, 1.0, 1.0)
    assert torch.allclose((advantage + value)[alive], table((6.0, 5.0, 3.0), (3.0, 2.0, 0.0))[alive])


def test_without_trace_it_is_the_one_step_error() -> None:
    reward, value = table((1.0, 2.0, 3.0)), table((0.5, 1.0, 2.0))
    alive = torch.ones(3, 1, 1, dtype=torch.bool)
    terminated = table((0, 0, 1)).bool()
    advantage = generalized_advantage(reward, value, alive, terminated, 0.9, 0.0)
    assert advantage.flatten().tolist() == pytest.approx([1 + 0.9 - 0.5, 2 + 1.8 - 1, 1.0])


@given(st.integers(0, 2**31), st.floats(0, 1), st.floats(0, 1))
def test_nobody_feels_what_happens_after_death_or_to_others(seed: int, discount: float, trace: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    keep = (torch.rand(3, 4, 5, generator=generator) < 0.6).cummin(dim=0).values
    alive = torch.cat([torch.ones(1, 4, 5, dtype=torch.bool), keep[:-1]])
    terminated = alive & ~keep
    terminated[-1] = alive[-1]
    reward, value, noise = torch.randn(3, 3, 4, 5, generator=generator)
    advantage = generalized_advantage(reward, value, alive, terminated, discount, trace)
    elsewhere = ~alive
    again = generalized_advantage(
        reward + elsewhere * noise, value + elsewhere * noise, alive, terminated, discount, trace
    )
    assert torch.equal(advantage, again)
    assert not advantage[elsewhere].any()
    one = generalized_advantage(reward[:, :1], value[:, :1], alive[:, :1], terminated[:, :1], discount, trace)
    assert torch.equal(advantage[:, :1], one)


def test_an_end_bars_the_way_even_if_the_table_goes_on() -> None:
    alive = torch.ones(3, 1, 1, dtype=torch.bool)
    terminated = table((1, 0, 1)).bool()
    reward, value = table((1.0, 2.0, 3.0)), table((0.5, 1.0, 2.0))
    advantage = generalized_advantage(reward, value, alive, terminated, 1.0, 1.0)
    assert advantage.flatten().tolist() == pytest.approx([0.5, 4.0, 1.0])
