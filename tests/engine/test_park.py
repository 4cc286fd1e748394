"""Laws 2 to 4, 6 and 7 (DESIGN) with tokens that wait."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from helpers import (
    ROTARY,
    TIMM_MODELS,
    Fixed,
    evidence_of,
    key_weights,
    naive_pass,
    permuted,
    random_images,
    random_merge,
    toy,
)
from vitprune_env import PrunedViT
from vitprune_env.engine.backbone import Backbone
from vitprune_env.engine.reduction import recall, reduce_tokens
from vitprune_env.game.rollout import play
from vitprune_env.game.token_game import TokenGame
from vitprune_env.types import Decision

SITES = ("1", "2.attn", "2", "3.attn")  # two of them share one attention
every_backbone = pytest.mark.parametrize("name", ["golden", *TIMM_MODELS])
seeds = st.integers(0, 2**31)


def random_parks(backbone: Backbone, batch: int, seed: int, merges: bool = True) -> list[Decision]:
    """A game's worth of decisions by which tokens leave, merge, wait, wait on and come back."""
    generator = torch.Generator().manual_seed(seed)
    present, decisions = torch.ones(batch, backbone.num_patches, dtype=torch.bool), []
    for _ in SITES:
        decision = random_merge(present, generator, least=int(backbone.needs_patches))
        if not merges:
            decision = Decision(keep=decision.keep)
        present = decision.keep
        waits = present & (torch.rand(present.shape, generator=generator) < torch.rand(batch, 1, generator=generator))
        if backbone.needs_patches:  # one goes on, or the engine would choose one
            waits &= present.cumsum(dim=1) > 1
        decisions.append(replace(decision, park=waits))
    return decisions


def waits_of(decision: Decision) -> Tensor:
    """Tokens that wait by a decision."""
    assert decision.park is not None
    return decision.park


def goes_of(decision: Decision) -> Tensor:
    """Tokens that go on."""
    return decision.keep & ~waits_of(decision)


def pick(decision: Decision, index: Any) -> Decision:
    """Some images of a decision, or its tokens in another order."""
    values = {field.name: getattr(decision, field.name) for field in fields(decision)}
    return Decision(**{name: value[index] if isinstance(value, Tensor) else value for name, value in values.items()})


@every_backbone
@given(seed=seeds, merges=st.booleans(), log_size=st.booleans())
@settings(max_examples=5)
def test_packed_is_one_by_one(name: str, seed: int, merges: bool, log_size: bool) -> None:
    """Law 2, and law 6: who waited is accounted for."""
    backbone, batch, bias = toy(name), 6, "log_size" if log_size else None
    images, decisions = random_images(backbone, batch, seed), random_parks(backbone, batch, seed, merges)
    policy = Fixed(decisions, attention_bias=bias)
    outcome = play(TokenGame.for_policy(backbone, policy, sites=SITES), policy, images).outcome
    for image in range(batch):
        expected = naive_pass(backbone, images[image], SITES, decisions, image, log_size)
        torch.testing.assert_close(outcome.logits[image], expected.logits, atol=1e-4, rtol=0)
        assert outcome.alive[image].nonzero()[:, 0].tolist() == expected.tokens
        for token in expected.tokens:
            joined = (outcome.source[image] == token).nonzero()[:, 0].tolist()
            assert set(joined) == expected.members[token]
            assert outcome.size[image, token] == len(joined)
    assert torch.equal(outcome.size.sum(dim=1), (outcome.source >= 0).sum(dim=1).float())
    assert (outcome.size[~outcome.alive] == 0).all()
    for obs, previous in zip(policy.seen[1:], decisions, strict=False):
        assert torch.equal(waits_of(previous), torch.zeros_like(obs.alive) if obs.parked is None else obs.parked)
        assert torch.equal(obs.alive, goes_of(previous))
        assert torch.equal(obs.size > 0, previous.keep)
        assert torch.equal(obs.order >= 0, obs.alive)


@every_backbone
@given(seed=seeds, merges=st.booleans())
@settings(max_examples=3)
def test_macs_are_those_of_the_tokens_that_go_on(name: str, seed: int, merges: bool) -> None:
    """Law 4, with the evidence."""
    backbone = toy(name)
    policy = Fixed(random_parks(backbone, 6, seed, merges), evidence_of(backbone))
    game = TokenGame(backbone, SITES, needs=policy.needs)
    with FlopCounterMode(display=False) as counter:
        outcome = play(game, policy, random_images(backbone, 6, seed)).outcome
    assert counter.get_total_flops() == 2 * outcome.macs.sum().item()
    goes = torch.stack([goes_of(decision).sum(dim=1) for decision in policy.decisions], dim=1)
    assert torch.equal(outcome.n_kept, goes)


@every_backbone
@given(seed=seeds, merges=st.booleans())
@settings(max_examples=3)
@torch.no_grad()
def test_the_model_plays_the_same_game_and_an_image_does_not_see_its_batch(name: str, seed: int, merges: bool) -> None:
    """Law 3, and PrunedViT."""
    backbone, batch = toy(name), 6
    images, decisions = random_images(backbone, batch, seed), random_parks(backbone, batch, seed, merges)
    policy = Fixed(decisions, evidence_of(backbone))
    outcome = play(TokenGame(backbone, SITES, needs=policy.needs), policy, images).outcome
    deployed = Fixed(decisions, evidence_of(backbone))
    features = PrunedViT(backbone, deployed, SITES).forward_features(images)
    assert features.parked is None
    assert torch.equal(features.alive, outcome.alive)
    assert torch.equal(features.source, outcome.source)
    assert torch.equal(features.size, outcome.size)
    torch.testing.assert_close(backbone.classify(features), outcome.logits, atol=1e-6, rtol=1e-5)
    for mine, theirs in zip(policy.seen, deployed.seen, strict=True):
        for evidence in policy.needs:
            torch.testing.assert_close(mine.evidence[evidence], theirs.evidence[evidence], atol=1e-6, rtol=1e-5)
    for image in range(0, batch, 2):
        alone = Fixed([pick(decision, [image]) for decision in decisions])
        logits = PrunedViT(backbone, alone, SITES)(images[image : image + 1])
        torch.testing.assert_close(logits[0], outcome.logits[image], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in ["golden", *TIMM_MODELS] if name not in ROTARY])
@given(seed=seeds)
@settings(max_examples=3)
def test_permuting_patches_permutes_the_game(name: str, seed: int) -> None:
    """Law 7."""
    backbone, batch = toy(name), 4
    order = torch.randperm(backbone.num_patches, generator=torch.Generator().manual_seed(seed))
    decisions = random_parks(backbone, batch, seed, merges=False)
    game = TokenGame(backbone, SITES)
    state = game.prepare(random_images(backbone, batch, seed))
    first = play(game, Fixed(decisions), state)
    second = play(game, Fixed([pick(d, (slice(None), order)) for d in decisions]), permuted(state, order))
    torch.testing.assert_close(first.outcome.logits, second.outcome.logits, atol=2e-5, rtol=1e-5)
    assert torch.equal(first.keep[:, :, order], second.keep)
    assert torch.equal(first.parked[:, :, order], second.parked)


@every_backbone
@given(seed=seeds, halves=st.integers(0, 5), uniform=st.booleans())
@torch.no_grad()
def test_parked_tokens_come_back_as_they_left(name: str, seed: int, halves: int, uniform: bool) -> None:
    """Law 7, to the bit: whatever the others go through, and however often it is said that they wait on."""
    backbone, generator = toy(name), torch.Generator().manual_seed(seed)
    before = backbone.run(backbone.embed(random_images(backbone, 5, seed)), 2)[0]
    waits = torch.rand(before.alive.shape, generator=generator) < 0.5
    waits = waits[:1].expand_as(waits) if uniform else waits
    state = reduce_tokens(before, Decision(keep=before.alive, park=waits))
    for half in range(halves):
        state = backbone.run(state, 3 + half)[0]
        if half % 2:  # others leave meanwhile
            leaving = state.alive & (torch.rand(waits.shape, generator=generator) < 0.3)
            state = reduce_tokens(state, Decision(keep=state.present & ~leaving, park=state.waiting))
    back = recall(state)
    assert torch.equal(back.alive, state.present)
    assert torch.equal(back.alive & waits, waits)
    assert torch.equal(back.x[back.row_of[waits]], before.x[before.row_of[waits]])
    assert torch.equal(back.x[back.row_of[state.alive]], state.x[state.row_of[state.alive]])
    assert torch.equal(back.prefix, state.prefix)
    first_back = back.order.masked_fill(~waits, 999).amin(dim=1)
    last_updated = back.order.masked_fill(~state.alive, -1).amax(dim=1)
    assert (first_back > last_updated).all(), "behind the others of the sequence"


@pytest.mark.parametrize("name", [name for name in TIMM_MODELS if not toy(name).needs_patches])
@given(seed=seeds)
@torch.no_grad()
def test_waiting_to_the_end_is_dropping_for_who_reads_the_class_token(name: str, seed: int) -> None:
    """Law 2's masked oracle: nobody attends to those who wait."""
    backbone, batch = toy(name), 6
    images, decisions = random_images(backbone, batch, seed), random_parks(backbone, batch, seed, merges=False)
    goes, nested = torch.ones_like(decisions[0].keep), []
    for decision in decisions:  # once parked, for ever parked
        goes = goes & goes_of(decision)
        nested.append(goes)
    everybody = torch.ones_like(goes)
    waiting = Fixed([Decision(keep=everybody, park=~goes) for goes in nested])
    outcome = play(TokenGame(backbone, SITES), waiting, images).outcome
    masked, _ = backbone.forward_soft(images, key_weights(backbone, SITES, nested))
    torch.testing.assert_close(outcome.logits, masked, atol=1e-4, rtol=0)
    assert outcome.alive.all()
    assert torch.equal(outcome.source, torch.arange(goes.shape[1]).expand_as(goes))


@pytest.mark.parametrize("execution", ["nested", "masked", "auto"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@torch.no_grad()
def test_every_execution_lets_tokens_wait(execution: str) -> None:
    backbone = toy("vit_base_patch16_224")
    images, decisions = random_images(backbone, 6), random_parks(backbone, 6, 1, merges=False)
    expected = PrunedViT(backbone, Fixed(decisions), SITES, "packed")(images)
    logits = PrunedViT(backbone, Fixed(decisions), SITES, execution)(images)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["vit_medium_patch16_gap_240", "deit_tiny_patch16_224"])
def test_gradients_are_those_of_the_naive_pass(name: str) -> None:
    backbone = toy(name)
    images, decisions = random_images(backbone, 2), random_parks(backbone, 2, 3)
    weights = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
    packed = torch.autograd.grad(PrunedViT(backbone, Fixed(decisions), SITES)(images).square().sum(), weights)
    naive: Any = naive_pass
    logits = [naive.__wrapped__(backbone, images[i], SITES, decisions, i).logits for i in range(2)]
    for ours, theirs in zip(packed, torch.autograd.grad(torch.stack(logits).square().sum(), weights), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)
