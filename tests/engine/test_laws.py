"""Laws 1 to 4, 6, 7 and the engine's part of 8 (DESIGN), as properties over backbones, shapes, sites and seeds."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from helpers import (
    ROTARY,
    TIMM_MODELS,
    Fixed,
    evidence_of,
    keeps_to_decisions,
    key_weights,
    naive_pass,
    permuted,
    random_images,
    random_keeps,
    random_merges,
    spread_keeps,
    toy,
)
from vitprune_env.baselines import EViT, RandomDrop, TopK
from vitprune_env.engine.reduction import reduce_tokens
from vitprune_env.game.rollout import play
from vitprune_env.game.token_game import TokenGame
from vitprune_env.policy import KeepAll, Policy
from vitprune_env.types import Decision, Episode

BACKBONES = ["golden", *TIMM_MODELS]
every_backbone = pytest.mark.parametrize("name", BACKBONES)
seeds = st.integers(0, 2**31)
batches = st.integers(8, 12)


@st.composite
def site_lists(draw: st.DrawFn, depth: int = 4) -> list[str]:
    """One to four increasing sites, after blocks and inside them."""
    halves = draw(st.sets(st.integers(1, 2 * depth), min_size=1, max_size=4))
    return [str(half // 2) if half % 2 == 0 else f"{half // 2 + 1}.attn" for half in sorted(halves)]


# Law 1


@every_backbone
@given(sites=site_lists(), batch=st.integers(1, 4), seed=seeds, looks=st.booleans())
def test_keeping_all_is_timms_own_forward(name: str, sites: list[str], batch: int, seed: int, looks: bool) -> None:
    backbone = toy(name)
    images = random_images(backbone, batch, seed)
    game = TokenGame(backbone, sites, needs=evidence_of(backbone) if looks else frozenset())
    outcome = play(game, KeepAll(), images).outcome
    with torch.no_grad():
        torch.testing.assert_close(outcome.logits, backbone.model(images), atol=1e-5, rtol=1e-5)
    assert (outcome.n_kept == backbone.num_patches).all()


# Law 2


@every_backbone
@given(sites=site_lists(), batch=batches, seed=seeds)
def test_packed_is_masked_is_removed_one_by_one(name: str, sites: list[str], batch: int, seed: int) -> None:
    backbone = toy(name)
    images, keeps = random_images(backbone, batch, seed), spread_keeps(backbone, sites, batch, seed)
    decisions = keeps_to_decisions(keeps)
    episode = play(TokenGame(backbone, sites), Fixed(decisions), images)
    assert torch.equal(episode.keep, torch.stack(keeps))
    assert len(set(episode.outcome.n_kept[:, 0].tolist())) > 3, "the counts should be ragged"
    removed = [naive_pass(backbone, images[i], sites, decisions, i) for i in range(batch)]
    torch.testing.assert_close(episode.outcome.logits, torch.stack([r.logits for r in removed]), atol=1e-4, rtol=0)
    assert [r.tokens for r in removed] == [row.nonzero()[:, 0].tolist() for row in episode.outcome.alive]
    with torch.no_grad():
        masked, _ = backbone.forward_soft(images, key_weights(backbone, sites, keeps))
    torch.testing.assert_close(episode.outcome.logits, masked, atol=1e-4, rtol=0)


@every_backbone
@given(sites=site_lists(), seed=seeds, log_size=st.booleans())
def test_merging_is_merging_one_by_one(name: str, sites: list[str], seed: int, log_size: bool) -> None:
    backbone, batch = toy(name), 8
    images, decisions = random_images(backbone, batch, seed), random_merges(backbone, len(sites), batch, seed)
    bias = "log_size" if log_size else None
    episode = play(TokenGame(backbone, sites, attention_bias=bias), Fixed(decisions, attention_bias=bias), images)
    removed = [naive_pass(backbone, images[i], sites, decisions, i, log_size) for i in range(batch)]
    torch.testing.assert_close(episode.outcome.logits, torch.stack([r.logits for r in removed]), atol=1e-4, rtol=0)
    for image, expected in enumerate(removed):
        assert episode.outcome.alive[image].nonzero()[:, 0].tolist() == expected.tokens
        for token in expected.tokens:
            joined = (episode.outcome.source[image] == token).nonzero()[:, 0].tolist()
            assert set(joined) == expected.members[token]


# Law 3


@every_backbone
@given(sites=site_lists(), seed=seeds)
def test_an_image_does_not_see_its_batch(name: str, sites: list[str], seed: int) -> None:
    backbone, batch = toy(name), 8
    images, decisions = random_images(backbone, batch, seed), random_merges(backbone, len(sites), batch, seed)
    game = TokenGame(backbone, sites, needs=evidence_of(backbone))
    together = Fixed(decisions, game.needs)
    outcome = play(game, together, images).outcome
    for image in range(batch):
        alone = Fixed([_rows(decision, [image]) for decision in decisions], game.needs)
        single = play(game, alone, images[image : image + 1]).outcome
        torch.testing.assert_close(single.logits[0], outcome.logits[image], atol=1e-5, rtol=1e-5)
        assert torch.equal(single.source[0], outcome.source[image])
        assert single.macs[0] == outcome.macs[image]
        for one, all_ in zip(alone.seen, together.seen, strict=True):
            for evidence in game.needs:
                mine = all_.evidence[evidence][all_.image == image]
                torch.testing.assert_close(one.evidence[evidence], mine, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in BACKBONES if toy(name).has_class_token])
@pytest.mark.parametrize("policy", [EViT(0.6), EViT(0.5, fuse=False), TopK(0.7)], ids=repr)
@given(seed=seeds)
def test_decisions_do_not_depend_on_the_batch(name: str, policy: Policy, seed: int) -> None:
    backbone, batch = toy(name), 8
    images, game = random_images(backbone, batch, seed), TokenGame.for_policy(backbone, policy)
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(seed))
    first, second = play(game, policy, images), play(game, policy, images[order][:5])
    assert torch.equal(first.keep[:, order][:, :5], second.keep)
    torch.testing.assert_close(first.outcome.logits[order][:5], second.outcome.logits, atol=1e-5, rtol=1e-5)


def _rows(decision: Decision, rows: list[int]) -> Decision:
    """The decision of some images only."""
    fields = {field.name: getattr(decision, field.name) for field in dataclasses.fields(decision)}
    picked: dict[str, Any] = {key: None if value is None else value[rows] for key, value in fields.items()}
    return Decision(**picked)


# Law 4


@every_backbone
@given(sites=site_lists(), seed=seeds, looks=st.booleans(), log_size=st.booleans(), dense=st.booleans())
def test_closed_form_macs_are_counted_macs(
    name: str, sites: list[str], seed: int, looks: bool, log_size: bool, dense: bool
) -> None:
    backbone, batch = toy(name), 8
    images, decisions = random_images(backbone, batch, seed), random_merges(backbone, len(sites), batch, seed)
    needs = evidence_of(backbone) if looks else frozenset()
    bias = "log_size" if log_size else None
    policy = KeepAll() if dense else Fixed(decisions, needs, bias)
    policy.attention_bias = bias
    game = TokenGame(backbone, sites, needs=needs, attention_bias=bias)
    with FlopCounterMode(display=False) as counter:
        outcome = play(game, policy, images).outcome
    assert counter.get_total_flops() == 2 * outcome.macs.sum().item()
    assert (outcome.policy_macs > 0).all() if looks else (outcome.policy_macs == 0).all()
    if dense:
        with FlopCounterMode(display=False) as counter:
            backbone.model(images)
        assert counter.get_total_flops() == 2 * (outcome.macs - outcome.policy_macs).sum().item()
        assert game.cost.dense() == (outcome.macs - outcome.policy_macs)[0].item()


# Law 6


@every_backbone
@given(sites=site_lists(), batch=batches, seed=seeds)
def test_every_patch_is_accounted_for(name: str, sites: list[str], batch: int, seed: int) -> None:
    backbone = toy(name)
    game = TokenGame(backbone, sites)
    decisions = random_merges(backbone, len(sites), batch, seed)
    policy = Fixed(decisions)
    outcome = play(game, policy, random_images(backbone, batch, seed)).outcome
    source, alive = outcome.source, outcome.alive
    for image in range(batch):
        tokens = alive[image].nonzero()[:, 0].tolist()
        assert set(source[image].tolist()) - {-1} == set(tokens), "patches live in alive tokens, and in all of them"
        for token in tokens:
            assert source[image, token] == token, "a token that stays holds its own patch"
            assert outcome.size[image, token] == (source[image] == token).sum()
    assert torch.equal(outcome.size.sum(dim=1), (source >= 0).sum(dim=1).float())
    assert (outcome.size[~alive] == 0).all()
    for obs in policy.seen:
        assert torch.equal(obs.size > 0, obs.alive)


# Law 7


@every_backbone
@given(sites=site_lists(), batch=batches, seed=seeds)
def test_dead_tokens_stay_dead_and_prefix_tokens_never_leave(
    name: str, sites: list[str], batch: int, seed: int
) -> None:
    backbone = toy(name)
    keeps = random_keeps(len(sites), batch, backbone.num_patches, seed)  # the game itself saves the last token
    images, game = random_images(backbone, batch, seed), TokenGame(backbone, sites)
    obs = game.reset(images)
    alive = obs.alive
    for keep in keeps:
        assert torch.equal(obs.alive, alive)
        assert obs.cls.shape == (batch, backbone.embed_dim)
        following, _, terminated, _, info = game.step(Decision(keep=keep & obs.alive))
        assert not (info["alive"] & ~alive).any()
        assert (info["n_alive"] >= int(backbone.needs_patches)).all()
        gone = alive & ~info["alive"]
        assert torch.equal(terminated, alive if following is None else gone)
        alive, obs = info["alive"], following or obs
    assert torch.isfinite(game.outcome().logits).all()
    # Prefix tokens are paid for to the very end.
    empty = game.cost.forward(torch.zeros(1, len(sites)), game.sites)
    assert (game.outcome().macs >= empty).all()


def test_prefix_rows_are_there_when_all_patches_are_gone() -> None:
    backbone = toy("vit_small_patch14_reg4_dinov2")
    state = backbone.run(backbone.embed(random_images(backbone, 3)), 2)[0]
    gone = torch.zeros(3, backbone.num_patches, dtype=torch.bool)
    after = reduce_tokens(state, Decision(keep=gone))
    assert after.lengths == (5, 5, 5)
    assert torch.equal(after.prefix, state.prefix)


def check_permuted(episode: Episode, other: Episode, order: Tensor) -> None:
    """The two episodes are one, seen in another order of the patches."""
    torch.testing.assert_close(episode.outcome.logits, other.outcome.logits, atol=2e-5, rtol=1e-5)
    assert torch.equal(episode.keep[:, :, order], other.keep)
    torch.testing.assert_close(episode.outcome.macs, other.outcome.macs, rtol=0, atol=0)


@pytest.mark.parametrize("name", [name for name in BACKBONES if name not in ROTARY])
@given(sites=site_lists(), seed=seeds)
def test_permuting_patches_permutes_the_game(name: str, sites: list[str], seed: int) -> None:
    backbone, batch = toy(name), 8
    order = torch.randperm(backbone.num_patches, generator=torch.Generator().manual_seed(seed))
    inverse = order.argsort()
    decisions = random_merges(backbone, len(sites), batch, seed)
    game = TokenGame(backbone, sites)
    state = game.prepare(random_images(backbone, batch, seed))
    moved = []
    for decision in decisions:
        target, weight = decision.merge_into, decision.weight
        assert target is not None
        assert weight is not None
        target = torch.where(target >= 0, inverse[target.clamp(min=0)], -1)[:, order]
        moved.append(Decision(keep=decision.keep[:, order], merge_into=target, weight=weight[:, order]))
    episode = play(game, Fixed(decisions), state)
    other = play(game, Fixed(moved), permuted(state, order))
    check_permuted(episode, other, order)
    source = torch.where(episode.outcome.source >= 0, inverse[episode.outcome.source.clamp(min=0)], -1)
    assert torch.equal(source[:, order], other.outcome.source)
    assert torch.equal(episode.outcome.size[:, order], other.outcome.size)


@pytest.mark.parametrize("name", [name for name in BACKBONES if toy(name).has_class_token and name not in ROTARY])
@pytest.mark.parametrize("policy", [EViT(0.5, fuse=False), TopK(0.6)], ids=repr)
@given(seed=seeds)
def test_permuting_patches_permutes_token_wise_policies(name: str, policy: Policy, seed: int) -> None:
    backbone = toy(name)
    order = torch.randperm(backbone.num_patches, generator=torch.Generator().manual_seed(seed))
    game = TokenGame.for_policy(backbone, policy)
    state = game.prepare(random_images(backbone, 8, seed))
    check_permuted(play(game, policy, state), play(game, policy, permuted(state, order)), order)


# Law 8, the engine's part


@every_backbone
@given(sites=site_lists(), seed=seeds)
def test_same_seed_same_bits(name: str, sites: list[str], seed: int) -> None:
    backbone = toy(name)
    images = random_images(backbone, 8, seed)
    labels = torch.arange(8) % backbone.num_classes
    episodes = []
    for noise in (0, 1):
        torch.manual_seed(noise)  # nothing in the game may draw from the global stream
        before = torch.get_rng_state()
        episodes.append(play(TokenGame(backbone, sites), RandomDrop(0.6, seed), images, labels))
        assert torch.equal(before, torch.get_rng_state())
    first, second = episodes
    assert torch.equal(first.keep, second.keep)
    for field in dataclasses.fields(first.outcome):
        one, two = getattr(first.outcome, field.name), getattr(second.outcome, field.name)
        assert torch.equal(one, two), field.name
