"""Decisions that change what tokens are before they merge."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import Fixed, random_images, random_merge, toy
from ragged import ragged_keep
from vitprune_env.deploy.pruned_vit import PrunedViT
from vitprune_env.engine.reduction import reduce_tokens
from vitprune_env.engine.tokens import TokenState
from vitprune_env.errors import DecisionError
from vitprune_env.game.rollout import play
from vitprune_env.game.token_game import TokenGame
from vitprune_env.policy import BasePolicy
from vitprune_env.types import Decision, Observation

NAME = "deit_tiny_patch16_224"


def ragged_state(seed: int) -> TokenState:
    """Eight images after a block, from hardly any token to all of them."""
    backbone = toy(NAME)
    state = backbone.run(backbone.embed(random_images(backbone, 8, seed)), 2)[0]
    return reduce_tokens(state, Decision(keep=ragged_keep(backbone, 8, seed)))


@given(seed=st.integers(0, 2**31), merges=st.booleans())
def test_they_take_the_place_of_the_tokens(seed: int, merges: bool) -> None:
    state = ragged_state(seed)
    generator = torch.Generator().manual_seed(seed)
    decision = random_merge(state.alive, generator) if merges else Decision(keep=state.alive)
    features = torch.randn(state.tokens.shape, generator=generator)
    expected = reduce_tokens(state.with_rows(state.x.index_copy(0, state.patch_rows, features)), decision)
    after = reduce_tokens(state, replace(decision, features=features))
    torch.testing.assert_close(after.tokens, expected.tokens)
    assert torch.equal(after.prefix, state.prefix)
    assert torch.equal(after.source, expected.source)
    assert torch.equal(after.size, expected.size)


def test_the_tokens_themselves_change_nothing() -> None:
    state = ragged_state(3)
    decision = random_merge(state.alive, torch.Generator().manual_seed(3))
    first, second = reduce_tokens(state, decision), reduce_tokens(state, replace(decision, features=state.tokens))
    assert torch.equal(first.x, second.x)


class Doubling(BasePolicy):
    """Doubles every token, and drops some."""

    def decide(self, obs: Observation) -> Decision:
        return Decision(keep=obs.alive & (obs.position.sum(dim=1) < 1.5 - obs.step), features=2 * obs.tokens)


def test_the_pruned_model_plays_the_same_game() -> None:
    backbone = toy(NAME)
    images = random_images(backbone, 4)
    outcome = play(TokenGame(backbone, (1, 3)), Doubling(), images).outcome
    with torch.no_grad():
        logits = PrunedViT(backbone, Doubling(), sites=(1, 3))(images)
    torch.testing.assert_close(logits, outcome.logits)
    plain = play(TokenGame(backbone, (1, 3)), Fixed([Decision(k) for k in _keeps()]), images).outcome
    assert (plain.logits - outcome.logits).abs().max() > 0.01, "doubling should matter"


def _keeps() -> list[Any]:
    position = toy(NAME).position.sum(dim=1)
    return [(position < 1.5 - step).expand(4, -1) for step in (0, 1)]


@pytest.mark.parametrize(
    "features",
    [torch.zeros(6, 48), torch.zeros(7, 47), torch.zeros(7), torch.zeros(7, 48, dtype=torch.int64), [[0.0]], "zeros"],
    ids=["rows", "width", "dimensions", "dtype", "list", "text"],
)
def test_what_does_not_fit_is_refused(features: Any) -> None:
    backbone = toy(NAME)
    game = TokenGame(backbone, (1, 2))
    obs = game.reset(random_images(backbone, 1))
    game.step(Decision(keep=obs.alive & (torch.arange(16) < 7)))
    with pytest.raises(DecisionError, match=r"^features: expected a floating-point tensor \[7, 48\]"):
        game.step(Decision(keep=game.observation().alive, features=features))
