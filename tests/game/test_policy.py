"""The policies that need no learning and the helpers they share."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from helpers import make_model, random_images, toy
from vitprune_env.baselines import EViT, RandomDrop, TopK
from vitprune_env.engine.backbone import Backbone
from vitprune_env.errors import EvidenceError
from vitprune_env.game.rollout import play
from vitprune_env.game.token_game import TokenGame
from vitprune_env.policy import BasePolicy, KeepAll, Policy, keep_top
from vitprune_env.types import Decision, Observation

rates = st.sampled_from([0.1, 0.3, 0.5, 0.55, 0.7, 0.9, 1.0])


def observe(policy: Policy, batch: int = 3, seed: int = 0, name: str = "golden") -> Observation:
    """What the policy sees first."""
    backbone = toy(name)
    return TokenGame.for_policy(backbone, policy).reset(random_images(backbone, batch, seed))


POLICIES = [KeepAll(), RandomDrop(0.5), TopK(0.5), EViT(0.5), BasePolicy()]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
def test_all_are_policies(policy: object) -> None:
    assert isinstance(policy, Policy)


def test_base_policy_does_not_decide() -> None:
    with pytest.raises(TypeError, match="BasePolicy does not say how to decide"):
        play(TokenGame(toy("golden")), BasePolicy(), random_images(toy("golden"), 1))


@given(counts=st.lists(st.integers(0, 20), min_size=3, max_size=3), seed=st.integers(0, 999))
def test_keep_top_keeps_the_best_of_each_image(counts: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    game = TokenGame(toy("vit_tiny_patch16_224"), (1, 2))
    game.reset(random_images(game.backbone, 3))
    obs = game.step(Decision(keep=torch.rand(3, 25, generator=generator) < 0.5))[0]
    assert obs is not None
    scores = torch.randint(0, 5, (len(obs.image),), generator=generator).float()
    scores[::4] = float("-inf")
    keep = keep_top(obs, scores, torch.tensor(counts))
    for image in range(3):
        mine = [(-float(s), int(t)) for s, t in zip(scores, obs.token, strict=True)]
        mine = [pair for pair, i in zip(mine, obs.image.tolist(), strict=True) if i == image]
        wanted = sorted(token for _, token in sorted(mine)[: counts[image]])
        assert keep[image].nonzero()[:, 0].tolist() == wanted


@pytest.mark.parametrize("make", [RandomDrop, TopK, EViT])
@pytest.mark.parametrize("rate", [0.0, -0.5, 1.01, float("nan")])
def test_keep_rates_out_of_range(make: Any, rate: float) -> None:
    with pytest.raises(ValueError, match="keep_rate: expected a number above 0 and at most 1, got"):
        make(rate)


@given(rate=rates, seed=st.integers(0, 99))
def test_random_drop_keeps_the_ceiling(rate: float, seed: int) -> None:
    backbone = toy("vit_tiny_patch16_224")
    kept = play(TokenGame(backbone), RandomDrop(rate, seed), random_images(backbone, 4)).outcome.n_kept
    expected, tokens = [], 25
    for _ in range(3):
        tokens = math.ceil(tokens * rate)
        expected.append(tokens)
    assert kept.tolist() == [expected] * 4


def test_random_drop_is_uniform_and_its_own() -> None:
    policy = RandomDrop(0.25, seed=1)
    obs = observe(policy, batch=400)
    before = torch.get_rng_state()
    keep = policy.decide(obs).keep
    assert torch.equal(torch.get_rng_state(), before)
    share = keep.float().mean(dim=0)
    assert (share - 0.25).abs().max() < 5 * math.sqrt(0.25 * 0.75 / 400)
    assert not torch.equal(policy.decide(obs).keep, keep)
    assert torch.equal(RandomDrop(0.25, seed=1).decide(obs).keep, keep)


@given(rate=rates, seed=st.integers(0, 99))
def test_evit_keeps_the_most_attended(rate: float, seed: int) -> None:
    policy = EViT(rate, fuse=False)
    obs = observe(policy, seed=seed)
    keep = policy.decide(obs).keep
    scores = obs.scatter(obs.evidence["cls_attention"])
    assert (keep.sum(dim=1) == math.ceil(64 * rate)).all()
    for image in range(3):
        if not keep[image].all():
            assert scores[image][keep[image]].min() >= scores[image][~keep[image]].max()


@given(rate=rates, seed=st.integers(0, 99))
def test_evit_fuses_the_rest_with_raw_attention(rate: float, seed: int) -> None:
    backbone, policy = toy("golden"), EViT(rate)
    game = TokenGame(backbone, ("4.attn", 5), needs=policy.needs)
    obs = game.reset(random_images(backbone, 3, seed))
    plain = EViT(rate, fuse=False).decide(obs).keep
    decision = policy.decide(obs)
    scores, tokens = obs.scatter(obs.evidence["cls_attention"]), obs.dense()
    game.step(decision)
    state = game._state
    assert state is not None
    for image in range(3):
        dropped = (~plain[image]).nonzero()[:, 0]
        extra = decision.keep[image] & ~plain[image]
        assert int(extra.sum()) == min(1, len(dropped))
        if len(dropped):
            slot = int(extra.nonzero())
            assert slot == dropped[0]
            assert set(decision.merge_into[image][dropped].tolist()) == {slot}
            fused = (scores[image, dropped, None] * tokens[image, dropped]).sum(dim=0)
            weight = decision.weight[image]
            torch.testing.assert_close((weight[dropped, None] * tokens[image, dropped]).sum(dim=0), fused)
            assert (weight[plain[image]] == 1).all()
            assert state.size[image, slot] == len(dropped)


def test_topk_counts_the_original_tokens() -> None:
    backbone = toy("golden")
    policy = TopK(0.7)
    kept = play(TokenGame.for_policy(backbone, policy), policy, random_images(backbone, 2)).outcome.n_kept
    assert kept.tolist() == [[44, 31, 21]] * 2


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 6, 12, 24])
def test_attention_sites_fit_networks_of_any_depth(depth: int) -> None:
    backbone = Backbone(make_model("vit_tiny_patch16_224", depth=depth))
    policy = EViT(0.5)
    game = TokenGame.for_policy(backbone, policy, sites="published")
    sites = game.sites
    assert all(site.inside for site in sites)
    expected = {12: [4, 7, 10], 24: [7, 13, 19], 4: [2, 3, 4], 1: [1]}
    if depth in expected:
        assert [site.block for site in sites] == expected[depth]
    assert torch.isfinite(play(game, policy, random_images(backbone, 2)).outcome.logits).all()


def test_class_attention_needs_a_class_token() -> None:
    with pytest.raises(EvidenceError, match="vit_medium_patch16_gap_240"):
        TokenGame.for_policy(toy("vit_medium_patch16_gap_240"), TopK(0.5))


def test_policies_survive_images_without_tokens() -> None:
    backbone = toy("deit_tiny_patch16_224")
    nobody: Tensor = torch.zeros(2, 16, dtype=torch.bool)
    for rest in (nobody, nobody.index_fill(0, torch.tensor([1]), True)):
        for policy in (EViT(0.5), EViT(0.5, fuse=False), TopK(0.5), RandomDrop(0.5), KeepAll()):
            game = TokenGame(backbone, (1, "3.attn"), needs=policy.needs)
            game.reset(random_images(backbone, 2))
            obs = game.step(Decision(keep=rest))[0]
            assert obs is not None
            game.step(policy.decide(obs))
            assert game.outcome().n_kept[0].tolist() == [0, 0]
            assert torch.isfinite(game.outcome().logits).all()
