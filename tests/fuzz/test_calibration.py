"""Budgets of all kinds: refused, or what is found costs what was asked for, as a game of its own says."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fuzzing import ODD, TIMES, attempt, inputs
from tiny import tiny_backbone, tiny_data
from vitprune_env import TokenGame, evaluate
from vitprune_env.agents import TokenActor, TokenPolicy, calibrate_threshold
from vitprune_env.baselines import TopK, calibrate

BACKBONE = tiny_backbone()
BATCHES = [tiny_data(4).tensors]
GAME = TokenGame(BACKBONE)
DENSE = GAME.cost.dense()
shares = st.one_of(st.floats(0.3, 1.1), st.sampled_from([value for value in ODD if not isinstance(value, str | bytes)]))


def asked(share: Any) -> Any:
    """A share of the dense cost as a budget in MACs; what is no number as it is."""
    return share * DENSE if isinstance(share, float) else share


@TIMES
def test_thresholds(times: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, logger="vitprune_env")  # of thresholds that cannot be met, which say so

    @inputs(10 * times)
    @given(shares, st.integers(0, 99))
    def check(share: Any, seed: int) -> None:
        actor = TokenActor(8, (3,), generator=torch.Generator().manual_seed(seed))
        policy = attempt(lambda: calibrate_threshold(GAME, TokenPolicy(actor), [BATCHES[0][0]], asked(share)))
        if policy is not None:
            cost = evaluate(GAME, policy, BATCHES).macs
            assert cost <= asked(share) * (1 + 1e-9)

    check()


@TIMES
def test_keep_rates(times: int) -> None:
    @inputs(60 * times)
    @given(shares, st.sampled_from([1, 6, 0, -1, 2.5]), st.sampled_from([0.0, 0.05, -1, 1.0, float("nan")]))
    def check(share: Any, steps: Any, tolerance: Any) -> None:
        gmacs = asked(share) / 1e9 if isinstance(share, float) else share
        policy = attempt(lambda: calibrate("topk", gmacs, BACKBONE, BATCHES, steps=steps, tolerance=tolerance))
        if policy is None:
            return
        assert isinstance(policy, TopK)
        assert isinstance(steps, int)
        assert steps >= 1
        assert 0 <= tolerance < 1
        assert evaluate(TokenGame.for_policy(BACKBONE, policy), policy, BATCHES).gmacs >= gmacs * (1 - 1e-9)

    check()
