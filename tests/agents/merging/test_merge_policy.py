"""A policy that merges what a score says can be merged: decisions, their cost, files, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from games import NAME
from helpers import random_images, toy
from merging import random_merging
from vitprune_env import PrunedViT, check_policy, load_policy, save_policy
from vitprune_env.agents import MergePolicy, PairActor
from vitprune_env.errors import EvidenceError
from vitprune_env.game.rollout import play
from vitprune_env.game.token_game import TokenGame

HEADLESS = "vit_medium_patch16_gap_240"  # no class token


@pytest.mark.parametrize("name", [NAME, HEADLESS])
def test_it_is_a_proper_policy_and_the_deployed_model_equals_the_game(name: str) -> None:
    backbone, policy = toy(name), random_merging(toy(name))
    images = random_images(backbone, 5)
    check_policy(policy, backbone, images)
    episode = play(TokenGame.for_policy(backbone, policy), policy, images)
    merged = backbone.num_patches - episode.outcome.n_kept[:, -1]
    assert 0 < int(merged.min()) < int(merged.max()), "images keep different numbers of tokens"
    assert (episode.outcome.source >= 0).all(), "nothing is dropped"
    with torch.no_grad():
        torch.testing.assert_close(PrunedViT(backbone, policy).eval()(images), episode.outcome.logits)


def test_an_image_does_not_depend_on_the_others() -> None:
    backbone, policy = toy(NAME), random_merging(toy(NAME))
    game, images = TokenGame.for_policy(backbone, policy), random_images(backbone, 6)
    keep = play(game, policy, images).keep
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    assert torch.equal(play(game, policy, images[order]).keep, keep[:, order])
    for index in range(6):
        assert torch.equal(play(game, policy, images[index : index + 1]).keep[:, 0], keep[:, index])


def test_a_higher_threshold_is_cheaper_down_to_half_the_tokens_at_each_site() -> None:
    backbone, policy = toy(NAME), random_merging(toy(NAME))
    game, images = TokenGame.for_policy(backbone, policy), random_images(backbone, 4)
    outcomes = [play(game, policy.with_threshold(value), images).outcome for value in (-40.0, -1.0, 0.0, 1.0, 40.0)]
    macs = [float(outcome.macs.mean()) for outcome in outcomes]
    assert macs == sorted(macs, reverse=True)
    assert len(set(macs)) == 5
    assert outcomes[0].n_kept.unique().tolist() == [25]
    # Of 25 the 12 at even positions merge; of 13 six, of 7 three, of 4 two.
    assert outcomes[-1].n_kept.tolist() == [[13, 7, 4, 2]] * 4


def test_macs_by_hand() -> None:
    """25 tokens behind a class token: 12 senders, 13 receivers, keys of width 16, tokens of width 48, 6 features."""
    backbone, policy = toy(NAME), random_merging(toy(NAME))
    obs = TokenGame.for_policy(backbone, policy).reset(random_images(backbone, 2))
    macs = policy.decide(obs).macs
    assert macs is not None
    assert macs.tolist() == [12 * 13 * 16 + 12 * (48 + 6)] * 2


def test_the_score_by_hand() -> None:
    """Two sites; at the second, features (1, 2, ...) with mean 1 and deviation 2 count as (0, 0.5, ...)."""
    actor = PairActor(2, 8, 5)
    with torch.no_grad():
        actor.mean[1], actor.deviation[1] = 1.0, 2.0
        actor.weight[1], actor.bias[1] = torch.tensor([7.0, 4.0, 0.0, 0.0, -1.0]), 0.25
    features = torch.tensor([[1.0, 2.0, 9.0, 9.0, 5.0]])  # standardised 0, 0.5, 4, 4, 2
    assert actor(features, 1).tolist() == [4 * 0.5 - 2 + 0.25]
    noise = torch.tensor([[9.0, 2.0, 0.25, 0.0, 0.0, 10.0]])
    assert actor(features, 1, noise).tolist() == [4 * 0.5 - 2 + 0.25 + 2 * 0.5 + 0.25 * 4 + 10]
    assert actor(features, 0).tolist() == [0]
    assert actor.macs_per_token == 8 + 5


def test_training_goes_on_from_the_same_decisions() -> None:
    backbone, policy = toy(NAME), random_merging(toy(NAME)).with_threshold(0.7)
    actor = policy.starting_actor()
    game, images = TokenGame.for_policy(backbone, policy), random_images(backbone, 4)
    keep = play(game, policy, images).keep
    assert torch.equal(play(game, MergePolicy(actor, sites=policy.sites), images).keep, keep)
    with torch.no_grad():
        actor.weight.zero_()
    assert torch.equal(play(game, policy, images).keep, keep), "the actor is a copy"


def test_a_file_brings_the_same_decisions(tmp_path: Path) -> None:
    backbone, policy = toy(HEADLESS), random_merging(toy(HEADLESS), (1, "3.attn")).with_threshold(0.3)
    policy.info["backbone"] = HEADLESS
    loaded = load_policy(save_policy(policy, tmp_path / "policy.safetensors"))
    assert isinstance(loaded, MergePolicy)
    assert (loaded.config(), loaded.needs, loaded.width) == (policy.config(), policy.needs, 48)
    game, images = TokenGame.for_policy(backbone, policy), random_images(backbone, 4)
    assert torch.equal(play(game, loaded, images).keep, play(game, policy, images).keep)


def test_what_does_not_fit_is_refused_by_name() -> None:
    backbone, policy = toy(NAME), random_merging(toy(NAME))
    game = TokenGame(backbone, (1, 2, 3), needs=policy.needs, attention_bias="log_size")
    with pytest.raises(ValueError, match=r"sites: expected 4, those of the policy, got 3"):
        policy.decide(game.reset(random_images(backbone, 1)))
    with pytest.raises(ValueError, match=r"num_features: expected 5 or 6, got 4"):
        PairActor(2, 8, 4)
    with pytest.raises(EvidenceError, match=r"'cls_attention' asks for a class token"):
        TokenGame.for_policy(toy(HEADLESS), policy)
