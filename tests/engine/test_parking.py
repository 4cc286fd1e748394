"""Parking by hand: who waits, who comes back, who dies, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from test_reduction import flags

from helpers import Fixed, random_images, toy
from vitprune_env.engine.reduction import check_decision, park, recall, reduce_tokens
from vitprune_env.engine.tokens import start_state
from vitprune_env.errors import DecisionError
from vitprune_env.game.rewards import PaperReward, SharedOutcome
from vitprune_env.game.rollout import play
from vitprune_env.game.token_game import TokenGame
from vitprune_env.types import Decision


def test_waiting_coming_back_and_dying() -> None:
    rows = torch.tensor([[-1.0, 1, 2, 3, 4], [-1.0, 5, 6, 7, 8]])
    state = start_state(rows[..., None], 1)
    state = reduce_tokens(state, Decision(keep=flags("xxx.", "xxxx"), park=flags("xx..", "...x")))
    assert state.x[:, 0].tolist() == [-1, 3, -1, 5, 6, 7]
    assert state.parked is not None
    assert state.parked.tokens[:, 0].tolist() == [1, 2, 8]
    assert state.size.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert state.source.tolist() == [[0, 1, 2, -1], [0, 1, 2, 3]]
    state = state.with_rows(10 * state.x)
    # Token 0 comes back, token 1 waits on, token 3 of the other image dies waiting.
    state = reduce_tokens(state, Decision(keep=flags("xxx.", "xx.."), park=flags(".x..", "....")))
    assert state.alive.tolist() == flags("x.x.", "xx..").tolist()
    assert state.x[:, 0].tolist() == [-10, 1, 30, -10, 50, 60]
    assert state.waiting.tolist() == flags(".x..", "....").tolist()
    assert state.order[0].tolist() == [1, -1, 0, -1]
    assert state.source.tolist() == [[0, 1, 2, -1], [0, 1, -1, -1]]
    assert reduce_tokens(state, Decision(keep=state.alive)).parked is None, "a decision without park wants nobody to"


def test_a_waiting_token_may_be_merged_into() -> None:
    state = start_state(torch.tensor([[[1.0], [2.0], [4.0]]]), 0)
    state = reduce_tokens(state, Decision(keep=flags("xxx"), park=flags("x.x")))
    merged = Decision(keep=flags("x.x"), merge_into=torch.tensor([[0, 0, 2]]), park=flags("x.."))
    check_decision(merged, state.alive, state.waiting)
    state = reduce_tokens(state, merged)
    assert recall(state).tokens[:, 0].tolist() == [3, 4]
    assert state.size.tolist() == [[2, 0, 1]]


def test_one_goes_on_where_one_is_needed() -> None:
    state = start_state(torch.tensor([[[1.0], [-5.0], [4.0]]]), 0)
    for counts in ({}, {"count": 0, "park_count": 3}):
        after = reduce_tokens(state, Decision(keep=flags("xxx"), park=flags("xxx"), **counts), keep_one=True)
        assert after.alive.tolist() == flags(".x.").tolist()
        assert after.waiting.tolist() == flags("x.x").tolist()


def test_nothing_is_copied_when_nobody_moves() -> None:
    state = start_state(torch.randn(2, 4, 3), 1)
    assert park(state, flags("...", "...")) is state
    state = reduce_tokens(state, Decision(keep=flags("xxx", "xxx"), park=flags("x..", ".x.")))
    same = Decision(keep=state.present, park=state.waiting, count=2, park_count=1)
    assert reduce_tokens(state, same) is state
    assert reduce_tokens(state, replace(same, park_count=None)) is not state


def test_evidence_of_who_was_not_there_is_zero() -> None:
    backbone, keep = toy("deit_tiny_patch16_224"), torch.ones(2, 16, dtype=torch.bool)
    waits = keep.cumsum(dim=1) > 9
    policy = Fixed([Decision(keep, park=waits), Decision(keep)] + [Decision(keep)] * 2, frozenset({"value_norms"}))
    play(TokenGame(backbone, ("1", "2.attn", "2", "3"), needs=policy.needs), policy, random_images(backbone, 2))
    _, before, after, later = (obs.scatter(obs.evidence["value_norms"], fill=-1.0) for obs in policy.seen)
    assert torch.equal(after[~waits], before[~waits])
    assert (before[waits] == -1).all()
    assert (after[waits] == 0).all()
    assert (later > 0).all()


def test_who_waits_is_not_dead_and_pays_nothing() -> None:
    backbone, keep = toy("deit_tiny_patch16_224"), torch.ones(2, 16, dtype=torch.bool)
    waits = keep.cumsum(dim=1) > 9
    for reward in (SharedOutcome(price=1.0), PaperReward(keep_cost=1.0)):
        game = TokenGame(backbone, (1, 3), reward=reward)
        game.reset(random_images(backbone, 2), torch.zeros(2, dtype=torch.int64))
        _, pay, terminated, _, info = game.step(Decision(keep, park=waits))
        assert not terminated.any()
        assert (pay[waits] == 0).all()
        assert (pay[~waits] < 0).all()
        assert torch.equal(info["alive"], ~waits)
        assert torch.equal(info["parked"], waits)
        *_, terminated, _, info = game.step(Decision(keep & ~waits))
        assert terminated.all(), "it is the last step"
        assert "parked" not in info
        assert torch.equal(game.outcome().alive, ~waits)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"park": [[True]]}, "park: expected a tensor of shape .2, 3., got list"),
        ({"park": torch.ones(2, 3)}, "park: expected dtype torch.bool, got torch.float32"),
        ({"park": flags("xxx", "xxx")}, "park: token 2 of image 0 does not stay and cannot wait; use park & keep"),
        ({"keep": flags("xx.", "..."), "merge_into": torch.tensor([[1, 1, -1]] * 2), "park": flags("x..", "...")},
         "park: token 0 of image 0 does not stay"),
        ({"keep": flags("xxx", "xxx")}, r"token 2 of image 0 is dead .* use keep & \(obs.alive \| obs.parked\)"),
        ({"count": 2, "park": flags("x..", ".xx")}, "count: expected tokens that go on in every image, got 2"),
        ({"park_count": 2, "park": flags("x..", ".xx")}, "park_count: expected tokens that wait in every image, got 2"),
    ],
)  # fmt: skip
def test_wrong_decisions_are_refused(wrong: dict[str, Any], message: str) -> None:
    alive, parked = flags("xx.", "xx."), flags("...", "..x")
    check_decision(Decision(keep=alive | parked, park=parked), alive, parked)
    with pytest.raises(DecisionError, match=message):
        check_decision(Decision(**({"keep": alive | parked} | wrong)), alive, parked)


@pytest.mark.parametrize("name", ["vit_medium_patch16_gap_240", "deit_tiny_patch16_224"])
def test_the_counterfactual_lets_them_wait_to_the_end(name: str) -> None:
    backbone, labels = toy(name), torch.zeros(2, dtype=torch.int64)
    keep = torch.ones(2, backbone.num_patches, dtype=torch.bool)
    waiting = Decision(keep, park=keep.cumsum(dim=1) > 5)
    game = TokenGame(backbone, (1, 3), reward=SharedOutcome(outcome=lambda logits, _: logits[:, 0]))
    game.reset(random_images(backbone, 2), labels)
    game.step(waiting)
    counterfactual = game.score_if_kept()
    game.step(waiting)
    torch.testing.assert_close(counterfactual, game.outcome().logits[:, 0])
