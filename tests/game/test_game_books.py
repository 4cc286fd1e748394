"""What the game keeps book of: how far a state has run, and which blocks a kept token buys."""

from __future__ import annotations

import pytest
import torch

from helpers import random_images, toy
from vitprune_env.engine.reduction import reduce_tokens
from vitprune_env.game.rollout import play
from vitprune_env.game.token_game import TokenGame
from vitprune_env.policy import KeepAll
from vitprune_env.types import Decision


def test_a_kept_token_pays_for_the_blocks_it_buys() -> None:
    """Sites 1, "2.attn" and 3 of four blocks: 1, 3 and 2 of the 8 half-blocks lie between them and after the last."""
    backbone = toy("deit_tiny_patch16_224")
    game = TokenGame(backbone, (1, "2.attn", 3))
    play(game, KeepAll(), random_images(backbone, 2))
    halves = 2 * backbone.depth
    assert [step.share for step in game.steps] == [1 / halves, 3 / halves, (halves - 6) / halves]


def test_a_state_that_ran_too_far_or_was_pruned_is_refused() -> None:
    backbone = toy("deit_tiny_patch16_224")
    images = random_images(backbone, 2)
    early, late = TokenGame(backbone, (1, 2)), TokenGame(backbone, (2, 3))
    with pytest.raises(ValueError, match=r"state: expected all tokens, 2 half-blocks .* after 4; prepare it with"):
        early.start(late.prepare(images))
    torch.testing.assert_close(
        play(late, KeepAll(), early.prepare(images)).outcome.logits, backbone(images), atol=1e-5, rtol=0
    )
    state = early.prepare(images)
    keep = torch.ones_like(state.alive)
    keep[0, 0] = False
    with pytest.raises(ValueError, match="state: expected all tokens"):
        early.start(reduce_tokens(state, Decision(keep=keep)))
