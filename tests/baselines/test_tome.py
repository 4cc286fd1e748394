"""ToMe: the original's decisions, its schedules, and what it does at the edges."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from helpers import TIMM_MODELS, random_images, toy
from matching import check_against_the_original, naive_match, observe, random_observation
from vitprune_env.baselines.tome import ToMe
from vitprune_env.deploy.export import export_program
from vitprune_env.deploy.pruned_vit import PrunedViT
from vitprune_env.engine.backbone import Backbone
from vitprune_env.game.policy_contract import check_policy
from vitprune_env.game.rollout import play
from vitprune_env.game.token_game import TokenGame
from vitprune_env.types import Decision


def test_the_originals_decisions(golden_backbone: Backbone, golden_images: Tensor) -> None:
    check_against_the_original("tome_r4", ToMe(4), golden_backbone, golden_images)
    check_against_the_original("tome_r4", ToMe([4] * 12), golden_backbone, golden_images)


@pytest.mark.parametrize(
    ("r", "inflect", "schedule"),
    [
        (4, 0.0, [4] * 12),
        (4, -1.0, [8, 7, 6, 5, 5, 4, 3, 2, 2, 1, 0, 0]),  # int(8 - 8/11 * i)
        (4, 1.0, [0, 0, 1, 2, 2, 3, 4, 5, 5, 6, 7, 8]),
        (4, 0.25, [3, 3, 3, 3, 3, 3, 4, 4, 4, 4, 4, 5]),
        ([3, 0, 0, 0, 0, 9, 0, 0, 0, 0, 0, 1], 0.0, [3, 0, 0, 0, 0, 9, 0, 0, 0, 0, 0, 1]),
        (0, 0.0, [0] * 12),
        (99, 0.0, [32, 16, 8, 4, 2, 1, 0, 0, 0, 0, 0, 0]),  # half of what there is
    ],
)  # fmt: skip
def test_schedules(r: Any, inflect: float, schedule: list[int], golden_backbone: Backbone) -> None:
    policy = ToMe(r, inflect=inflect)
    outcome = play(TokenGame.for_policy(golden_backbone, policy), policy, random_images(golden_backbone, 2)).outcome
    expected = 64 - torch.tensor(schedule).cumsum(0)
    assert torch.equal(outcome.n_kept, expected.expand(2, 12))
    assert (outcome.size.sum(dim=1) == 64).all(), "nothing is lost"


def test_counts_of_deit_small() -> None:
    """From 197: r = 8 ends with 101, r = 13 with 41; with r = 16 the limit binds in the last block (21, then 11)."""
    keys = torch.randn(1, 196, 5, generator=torch.Generator().manual_seed(0))
    for r, last in ((8, [109, 101]), (13, [54, 41]), (16, [21, 11])):
        alive, counts = torch.ones(1, 196, dtype=torch.bool), []
        for _ in range(12):
            decision = ToMe(r).decide(observe(alive, keys))
            alive = decision.keep
            counts.append(int(alive.sum()) + 1)
            assert decision.count == counts[-1] - 1
        assert counts[-2:] == last


@given(seed=st.integers(0, 2**31), tokens=st.integers(1, 14), num_prefix=st.integers(0, 3), r=st.integers(1, 8))
def test_the_best_pairs_merge(seed: int, tokens: int, num_prefix: int, r: int) -> None:
    obs = random_observation(seed, 3, tokens, num_prefix, ragged=False)
    decision = ToMe(r).decide(obs)
    assert decision.merge_into is not None
    for image in range(3):
        pairs = naive_match(obs, image)
        best = sorted(pairs, key=lambda sender: -pairs[sender][1])[: min(r, tokens // 2)]
        expected = [pairs[token][0] if token in best else token for token in range(tokens)]
        assert decision.merge_into[image].tolist() == expected
        assert decision.keep[image].tolist() == [token not in best for token in range(tokens)]


@pytest.mark.parametrize("name", sorted(TIMM_MODELS))
def test_every_kind_of_vit(name: str) -> None:
    backbone, policy = toy(name), ToMe(2)
    images = random_images(backbone, 3)
    check_policy(policy, backbone, images)
    game = TokenGame.for_policy(backbone, policy)
    with FlopCounterMode(display=False) as counter:
        outcome = play(game, policy, images).outcome
    assert counter.get_total_flops() == 2 * int(outcome.macs.sum())
    assert (outcome.policy_macs > 0).all()
    tokens = backbone.num_patches
    left = [tokens := tokens - min(2, tokens // 2) for _ in range(backbone.depth)]
    assert outcome.n_kept[0].tolist() == left


def test_proportional_attention_matters_and_can_be_off(golden_backbone: Backbone, golden_images: Tensor) -> None:
    with_it, without = (
        play(TokenGame.for_policy(golden_backbone, policy), policy, golden_images).outcome
        for policy in (ToMe(4), ToMe(4, proportional_attention=False))
    )
    assert with_it.n_kept.equal(without.n_kept)
    assert (with_it.logits - without.logits).abs().max() > 0.01
    assert torch.equal(with_it.source >= 0, torch.ones(8, 64, dtype=torch.bool))


def test_it_can_be_exported() -> None:
    backbone = toy("deit_tiny_patch16_224")
    model, images = PrunedViT(backbone, ToMe(3), sites=("1.attn", "2.attn")).eval(), random_images(backbone, 3)
    graph = export_program(model).module()
    for batch in (1, 3):
        torch.testing.assert_close(graph(images[:batch]), model(images[:batch]), atol=1e-5, rtol=0)


def test_after_whole_blocks_too(golden_backbone: Backbone, golden_images: Tensor) -> None:
    policy = ToMe((20, 10, 5))
    game = TokenGame.for_policy(golden_backbone, policy, sites=(3, 6, 9))
    assert play(game, policy, golden_images).outcome.n_kept[0].tolist() == [44, 34, 29]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"r": -1}, "r: expected whole numbers of at least 0, one or one per site, got -1"),
        ({"r": True}, "r: expected whole numbers"),
        ({"r": []}, "r: expected whole numbers"),
        ({"r": 2.5}, "r: expected whole numbers"),
        ({"r": [1, 0.5]}, "r: expected whole numbers"),
        ({"r": "12"}, "r: expected whole numbers"),
        ({"r": 4, "inflect": 1.5}, "inflect: expected a number from -1 to 1, got 1.5"),
        ({"r": [4, 4], "inflect": 1.0}, "inflect: expected 0 with one r per site, got 1.0"),
    ],
)
def test_senseless_parameters_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ToMe(**arguments)


def test_as_many_numbers_as_sites(golden_backbone: Backbone, golden_images: Tensor) -> None:
    policy = ToMe([4, 4])
    with pytest.raises(ValueError, match=r"r: expected one number or one per site \(12\), got 2"):
        play(TokenGame.for_policy(golden_backbone, policy), policy, golden_images)


def test_nothing_to_merge_is_nothing_to_do() -> None:
    obs = random_observation(0, 2, 6, 1, ragged=False)
    decision = ToMe(0).decide(obs)
    assert isinstance(decision, Decision)
    assert decision.merge_into is None, "the sequence stays as it was, as in the original"
    assert decision.order is None
    assert decision.macs is None
