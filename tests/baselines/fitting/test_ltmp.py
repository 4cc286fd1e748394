"""LTMP's inference form: the original's decisions, a plain Python reading of the method, and its edges."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from helpers import TIMM_MODELS, golden, random_images, toy
from matching import check_against_the_original, naive_match, random_observation
from vitprune_env.baselines.ltmp.policy import LTMP
from vitprune_env.deploy.descriptions import build_policy, describe_policy
from vitprune_env.engine.backbone import Backbone
from vitprune_env.errors import CheckpointError
from vitprune_env.game.policy_contract import check_policy
from vitprune_env.game.rollout import play
from vitprune_env.game.token_game import TokenGame
from vitprune_env.policy import KeepAll
from vitprune_env.types import Observation

seeds = st.integers(0, 2**31)


@pytest.mark.parametrize("name", ["ltmp_prune", "ltmp_mergeprune"])
def test_the_originals_decisions(name: str, golden_backbone: Backbone, golden_images: Tensor) -> None:
    file = golden(name)
    policy = LTMP(file.get("merge_thresholds"), file.get("prune_thresholds"))
    check_against_the_original(name, policy, golden_backbone, golden_images)


def with_attention(obs: Observation, seed: int) -> Observation:
    """The same tokens, each with some attention received."""
    attention = torch.rand(len(obs.image), generator=torch.Generator().manual_seed(seed))
    return replace(obs, evidence={**obs.evidence, "mean_attention": attention})


@given(
    seed=seeds,
    tokens=st.integers(1, 14),
    num_prefix=st.integers(0, 3),
    merging=st.floats(0, 1),
    pruning=st.floats(0, 1),
)
def test_merging_then_pruning(seed: int, tokens: int, num_prefix: int, merging: float, pruning: float) -> None:
    obs = with_attention(random_observation(seed, 5, tokens, num_prefix), seed)
    decision = LTMP(merging, pruning).decide(obs)
    assert decision.merge_into is not None
    attention = obs.scatter(obs.evidence["mean_attention"])
    for image in range(5):
        alive = obs.alive[image].nonzero()[:, 0].tolist()
        target = {token: token for token in alive}
        for sender, (receiver, score) in naive_match(obs, image).items():
            if score > merging:
                target[sender] = receiver
        for token in range(tokens):
            group = [other for other in alive if target[other] == token]
            stays = bool(group) and max(float(attention[image, other]) for other in group) > pruning
            assert decision.keep[image, token] == stays
            assert decision.merge_into[image, token] == target.get(token, -1)


def test_both_comparisons_are_strict() -> None:
    obs = random_observation(1, 1, 6, 1, ragged=False)
    attention = torch.tensor([0.1, 0.5, 0.2, 0.5, 0.7, 0.5])
    obs = replace(obs, evidence={"keys": torch.ones(6, 4), "mean_attention": attention})  # similarities of 1
    assert LTMP(None, 0.5).decide(obs).keep.tolist() == [[False, False, False, False, True, False]]
    assert LTMP(1.0).decide(obs).keep.all(), "nothing is more similar than that"
    assert LTMP(0.99).decide(obs).keep.sum() == 3, "no limit: every sender merges"


def test_a_group_is_as_important_as_its_best_member() -> None:
    """Token 1 (position 2) merges into the first receiver, token 0; the pair stays because of token 1."""
    obs = random_observation(1, 1, 3, 1, ragged=False)
    obs = replace(
        obs,
        order=torch.tensor([[0, 1, 2]]),
        evidence={"keys": torch.tensor([[1.0, 0], [1, 0.1], [0, 1]]), "mean_attention": torch.tensor([0.1, 0.9, 0.2])},
    )
    decision = LTMP(0.9, 0.5).decide(obs)
    assert decision.keep.tolist() == [[True, False, False]]
    assert decision.merge_into is not None
    assert decision.merge_into.tolist() == [[0, 0, 2]]


def test_only_what_is_needed_is_computed() -> None:
    assert LTMP(0.9, 0.01).needs == {"keys", "mean_attention"}
    assert (LTMP(None, 0.01).needs, LTMP(None, 0.01).attention_bias) == ({"mean_attention"}, None)
    assert (LTMP(0.9).needs, LTMP(0.9).attention_bias) == ({"keys"}, "log_size")


@pytest.mark.parametrize("name", sorted(TIMM_MODELS))
def test_every_kind_of_vit(name: str) -> None:
    backbone = toy(name)
    policy, images = LTMP(0.6, 0.4 / backbone.num_patches), random_images(backbone, 8)
    check_policy(policy, backbone, images)
    game = TokenGame.for_policy(backbone, policy)
    with FlopCounterMode(display=False) as counter:
        outcome = play(game, policy, images).outcome
    assert counter.get_total_flops() == 2 * int(outcome.macs.sum()), "also where the images are ragged"
    assert (outcome.n_kept[:, -1] < backbone.num_patches).all()


def test_thresholds_that_do_nothing(golden_backbone: Backbone, golden_images: Tensor) -> None:
    dense = play(TokenGame(golden_backbone), KeepAll(), golden_images).outcome.logits
    policy = LTMP(1.0, 0.0)
    outcome = play(TokenGame.for_policy(golden_backbone, policy), policy, golden_images).outcome
    assert (outcome.n_kept == 64).all()
    torch.testing.assert_close(outcome.logits, dense, atol=1e-5, rtol=0)


def test_an_offset_moves_the_budget() -> None:
    policy = LTMP((0.9, 0.7), 0.02, sites=("1.attn", "2.attn"))
    assert policy.at(0.0) == policy
    assert policy.at(2).at(-3) == replace(policy, offset=-1)
    backbone = toy("vit_tiny_patch16_224")
    images = random_images(backbone, 8)
    kept = [
        play(TokenGame.for_policy(backbone, p), p, images).outcome.n_kept.sum() for p in map(policy.at, (-1, 0, 0.5))
    ]
    assert kept[0] > kept[1] > kept[2]
    # Twice as far from no effect: 0.9 and 0.7 become 0.8 and 0.4, and 0.02 becomes 0.04.
    for moved, plain in (
        (policy.at(math.log10(2)), LTMP((0.8, 0.4), 0.04, policy.sites)),
        (policy.at(9), LTMP((0.0, 0.0), 1.0, policy.sites)),
        (LTMP(0.8).at(-1), LTMP(0.98)),
    ):
        found = [play(TokenGame.for_policy(backbone, p), p, images).outcome for p in (moved, plain)]
        assert torch.equal(found[0].alive, found[1].alive)
        assert torch.equal(found[0].logits, found[1].logits)


@pytest.mark.parametrize("offset", [float("nan"), float("inf"), "1", True])
def test_an_offset_is_a_finite_number(offset: Any) -> None:
    with pytest.raises(ValueError, match="offset: expected a finite number"):
        LTMP(0.9, offset=offset)


def test_thresholds_on_disk(tmp_path: Path) -> None:
    for policy in (LTMP((0.9, 0.8), 0.01, ("1.attn", 3)), LTMP(0.25), LTMP(None, [0.1])):
        policy.save(tmp_path / "thresholds.safetensors")
        assert LTMP.load(tmp_path / "thresholds.safetensors") == policy
        assert build_policy(describe_policy(policy)) == policy
    with pytest.raises(CheckpointError, match="found none"):
        LTMP.load(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "merge_thresholds, prune_thresholds: expected at least one"),
        ({"merge_thresholds": 1.1}, ValueError, r"merge_thresholds: expected 0 to 1, got 1.1"),
        ({"prune_thresholds": [0.1, -0.1]}, ValueError, "prune_thresholds: expected 0 to 1"),
        ({"prune_thresholds": float("nan")}, ValueError, "prune_thresholds: expected 0 to 1"),
        ({"prune_thresholds": "much"}, TypeError, "prune_thresholds: expected None, a number"),
        ({"prune_thresholds": []}, TypeError, "prune_thresholds: expected None, a number"),
        ({"merge_thresholds": True}, TypeError, "merge_thresholds: expected None, a number"),
        ({"merge_thresholds": [[0.1]]}, TypeError, "merge_thresholds: expected None, a number"),
    ],
)
def test_senseless_thresholds_are_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LTMP(**arguments)


def test_as_many_thresholds_as_sites(golden_backbone: Backbone, golden_images: Tensor) -> None:
    policy = LTMP(None, (0.1, 0.1))
    with pytest.raises(ValueError, match=r"prune_thresholds: expected one number or one per site \(12\), got 2"):
        play(TokenGame.for_policy(golden_backbone, policy), policy, golden_images)
