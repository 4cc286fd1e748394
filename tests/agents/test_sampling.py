"""A learnt policy that draws its actions, as the authors' code of RL4EViT evaluates."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from games import NAME, OwnLabels
from helpers import toy
from vitprune_env.agents import AdaptivePolicy, ExploringPolicy, TokenActor, TokenPolicy, load_policy, save_policy
from vitprune_env.game.rollout import play
from vitprune_env.game.token_game import TokenGame

IMAGES = OwnLabels(12).images
GAME = TokenGame(toy(NAME), (1, 2, 3))


def constant(width: int = 48, logit: float = 1.0) -> TokenActor:
    """An actor that keeps every token with the same probability."""
    actor = TokenActor(width, (4,), keep_bias=logit)
    torch.nn.init.zeros_(actor.last.weight)
    return actor


def kept(policy: TokenPolicy, images: torch.Tensor = IMAGES) -> torch.Tensor:
    """`[T, B, N]`, tokens alive after each site."""
    return play(GAME, policy, images).keep


def test_tokens_stay_with_their_probability() -> None:
    """Log-odds 1: 73.1 %, over 12 x 16 tokens within three standard errors of 3.2 %; the threshold moves the odds."""
    assert float(kept(TokenPolicy(constant())).double().mean()) == 1.0
    assert float(kept(TokenPolicy(constant(), seed=0))[0].double().mean()) == pytest.approx(0.731, abs=0.096)
    even = TokenPolicy(constant(), seed=0).with_threshold(1.0)
    assert float(kept(even)[0].double().mean()) == pytest.approx(0.5, abs=0.108)
    assert not kept(even.with_threshold(40.0)).any()


def test_it_plays_as_in_training() -> None:
    actor = constant()
    explorer = ExploringPolicy(actor, torch.Generator().manual_seed(3))
    assert torch.equal(kept(TokenPolicy(actor, 2.0).sampling(3)), play(GAME, explorer, IMAGES).keep)


def test_draws_follow_from_the_seed_and_the_images_seen_before() -> None:
    policy = TokenPolicy(constant(), seed=1)
    whole, parts = kept(policy), TokenPolicy(constant(), seed=1)
    assert torch.equal(whole, torch.cat([kept(parts, IMAGES[:5]), kept(parts, IMAGES[5:])], dim=1))
    assert not torch.equal(whole, kept(policy))  # the same images again
    assert not torch.equal(whole, kept(TokenPolicy(constant(), seed=2)))


def test_it_is_saved(tmp_path: Path) -> None:
    policy = TokenPolicy(constant(), 0.5, seed=7)
    again = load_policy(save_policy(policy, tmp_path / "policy.safetensors"))
    assert isinstance(again, TokenPolicy)
    assert (again.seed, again.threshold) == (7, 0.5)
    assert torch.equal(kept(again), kept(policy))
    assert "seed" not in TokenPolicy(constant()).config()


def test_one_for_many_budgets_draws_too(tmp_path: Path) -> None:
    policy = AdaptivePolicy(constant(49), (0.4, 0.8), (0.0, 0.0), 0.5).sampling(4)
    assert (policy.share, policy.at(0.6).seed, policy.with_threshold(3.0).seed) == (0.5, 4, 4)
    saved = AdaptivePolicy(constant(49), (0.4, 0.8), (1.0, 0.0), seed=4)
    again = load_policy(save_policy(saved, tmp_path / "policy.safetensors"))
    assert torch.equal(kept(again), kept(saved))
    assert 0.5 < float(kept(policy)[0].double().mean()) < 0.9
