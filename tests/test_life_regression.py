"""Life regression: lives, order and logits of the reference, its equations by hand, both stages of its training."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from helpers import golden
from vitprune_env.backbone import Backbone
from vitprune_env.baselines.life_fit import forward_soft_lives
from vitprune_env.baselines.life_regression import LifeRegression
from vitprune_env.game import TokenGame
from vitprune_env.rollout import play
from vitprune_env.soft import run_soft, start_soft


def reference(keep_rate: float) -> LifeRegression:
    policy = LifeRegression(keep_rate, embed_dim=48)
    policy.load_state_dict({"weight": golden("life_ref")["W"]}, strict=False)
    return policy


@pytest.mark.parametrize("keep_rate", [0.7, 0.5])
def test_lives_decisions_and_logits_of_the_reference(
    keep_rate: float, golden_backbone: Backbone, golden_images: Tensor
) -> None:
    prefix = f"rho0{round(10 * keep_rate)}."
    file = {key.removeprefix(prefix): value for key, value in golden("life_ref").items() if key.startswith(prefix)}
    policy = reference(keep_rate)
    game = TokenGame.for_policy(golden_backbone, policy)
    assert [site.label for site in game.sites] == ["4", "7", "10"]
    episode = play(game, policy, golden_images)
    torch.testing.assert_close(episode.outcome.logits, file["logits_hard"], atol=1e-4, rtol=0)
    for step, site in enumerate(game.sites):
        count = int(file["n_t"][site.block])  # of the block after the site
        keep = torch.zeros(8, 64, dtype=torch.bool).scatter(1, file["order_by_life"][:, :count], True)
        assert torch.equal(episode.keep[step], keep)
    with torch.no_grad():
        state, _ = run_soft(golden_backbone, start_soft(golden_backbone, golden_images), game.sites[0].half)
        importance = policy.importance(state.tokens, state.prefix[:, 0])
        lives = policy.lives(importance, game.sites, golden_backbone.depth)
        torch.testing.assert_close(lives, file["tau"], atol=1e-4, rtol=1e-4)
        for sharpness in (1.5, 30):
            logits = forward_soft_lives(golden_backbone, state, lives, sharpness)
            expected = file[f"logits_soft_U{sharpness}"]
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
