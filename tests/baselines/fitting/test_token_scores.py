"""Token scores: targets of the distillation and the masked training form by hand and against the game."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from games import OwnLabels
from helpers import random_images, toy
from vitprune_env import TokenGame, check_policy, play
from vitprune_env.baselines import describe, fit
from vitprune_env.baselines.fitting import Problem
from vitprune_env.baselines.token_scores import DistillationConfig, MasksConfig, TokenScores
from vitprune_env.baselines.token_scores.distillation import AttendedTokens
from vitprune_env.baselines.token_scores.masks import MASKS_RECIPE, MasksTask, rescued, sample
from vitprune_env.engine.backbone import Backbone
from vitprune_env.engine.masked import start_masked
from vitprune_env.types import parse_sites

NAME = "vit_tiny_patch16_224"
WITHOUT_CLASS_TOKEN = "vit_medium_patch16_gap_240"
SITES = (1, "2.attn", "3.attn")


def masks_task(backbone: Backbone, share: float = 0.6, **settings: Any) -> MasksTask:
    """The task of a fit, on four images of noise."""
    target, sites = share * TokenGame(backbone).cost.dense() / 1e9, parse_sites(SITES, backbone.depth)
    data = [(image, 0) for image in random_images(backbone, 4)]
    task = MASKS_RECIPE.task(Problem(backbone, data, target, sites, SITES, 0, MasksConfig(images=0, **settings)))
    assert isinstance(task, MasksTask)
    return task


@pytest.mark.parametrize("name", [NAME, WITHOUT_CLASS_TOKEN])
@torch.no_grad()
def test_targets_are_the_late_attention_and_inputs_the_tokens_at_the_sites(name: str) -> None:
    backbone = toy(name)
    images, sites = random_images(backbone, 2), parse_sites(SITES, backbone.depth)
    data = AttendedTokens(backbone, [(image, 7) for image in images], sites, images=2)
    found, labels = data.batch([0, 1])
    prefix, patches, late = backbone.num_prefix, backbone.num_patches, []
    x = backbone.embed(images).x.view(2, -1, backbone.embed_dim)
    for number in range(1, backbone.depth + 1):
        block = backbone.block(number)
        if number > backbone.depth // 2:
            q, k, _ = block.attn.qkv(block.norm1(x)).unflatten(2, (3, backbone.num_heads, -1)).unbind(2)
            weights = torch.einsum("bqhd,bkhd->bhqk", block.attn.q_norm(q), block.attn.k_norm(k)) * block.attn.scale
            rows = weights.softmax(dim=-1).mean(dim=1)  # [B, n, n]
            late.append((rows[:, 0] if backbone.has_class_token else rows.mean(dim=1))[:, prefix:])
        x = block(x)
    share = torch.stack(late).mean(dim=0)
    expected = (share * patches / share.sum(dim=1, keepdim=True)).log()
    for step, site in enumerate(sites):
        torch.testing.assert_close(found[:, step, :, -1], expected, atol=1e-5, rtol=1e-4)
        tokens = backbone.run(backbone.embed(images), site.half)[0].tokens.view(2, patches, -1)
        torch.testing.assert_close(found[:, step, :, :-1], tokens, atol=1e-5, rtol=1e-5)
    assert labels.tolist() == [7, 7]
    again = AttendedTokens(backbone, [(image, 7) for image in images], sites, images=0)
    torch.testing.assert_close(again.batch([1, 0])[0], found.flip(0))
    assert (len(data.kept), len(again.kept)) == (2, 0)


@pytest.mark.parametrize("name", [NAME, WITHOUT_CLASS_TOKEN])
@torch.no_grad()
def test_the_training_form_is_what_is_deployed(name: str) -> None:
    """Same decisions, logits and MACs where decisions are taken by the threshold instead of being drawn."""
    backbone = toy(name)
    task, images = masks_task(backbone), random_images(backbone, 3, seed=4)
    tokens = backbone.embed(images).tokens
    scores = task.policy.scorer(tokens)(tokens)
    for threshold in (scores.median().item(), 100.0):  # at 100 every token goes, where the class needs none
        policy = task.policy.at(threshold)
        episode = play(task.game, policy, images)
        start = start_masked(backbone, images)
        logits, keep, macs = task.masked(start, lambda found, least=threshold: (found > least).float())
        assert torch.equal(torch.stack(keep).bool(), episode.keep)
        torch.testing.assert_close(logits, episode.outcome.logits, atol=1e-4, rtol=0)
        assert torch.equal(macs, episode.outcome.macs)


def test_decisions_are_drawn_with_their_odds_and_gradients_are_those_of_the_soft_ones() -> None:
    scores = torch.full((1, 20_000), 2.0).requires_grad_()
    keep = sample(scores, torch.Generator().manual_seed(0))
    assert set(keep.unique().tolist()) == {0.0, 1.0}
    assert keep.mean().item() == pytest.approx(1 / (1 + torch.tensor(-2.0).exp().item()), abs=0.01)
    (gradient,) = torch.autograd.grad(keep.sum(), scores)
    noise = torch.empty(scores.shape).uniform_(generator=torch.Generator().manual_seed(0)).logit(eps=1e-6)
    soft = (2 + noise).sigmoid()
    torch.testing.assert_close(gradient, soft * (1 - soft))


def test_an_image_keeps_the_strongest_of_its_last_tokens() -> None:
    tokens = torch.tensor([[[1.0], [-5], [9]], [[1], [2], [3]]])
    alive, keep = torch.tensor([[1.0, 1, 0], [1, 1, 1]]), torch.tensor([[0.0, 0, 0], [0, 1, 0]])
    assert rescued(keep, alive, tokens).tolist() == [[0, 1, 0], [0, 1, 0]]


def test_the_loss_charges_the_price_and_the_price_follows_the_budget() -> None:
    task = masks_task(toy(NAME), share=0.6, price=2.0, price_rate=0.5)
    images, labels = task.data.batch(range(4))
    loss, row = task.loss(images, labels, torch.Generator().manual_seed(1))
    assert loss.item() == pytest.approx(row["class"] + 2 * row["share"], rel=1e-5)
    gradients = torch.autograd.grad(loss, list(task.module.parameters()))
    assert all(gradient.abs().sum() > 0 for gradient in gradients)
    task.after_step()
    assert task.price == pytest.approx(2 + 0.5 * (row["share"] - 0.6))
    task.excess = -100.0
    task.after_step()
    assert task.price == 0
    other = masks_task(toy(NAME), price=3.0)
    other.load_state_dict(task.state_dict())
    assert other.price == 0


@pytest.mark.parametrize("sites", [(1,), ("1.attn", 1, 2, "4.attn")])
@pytest.mark.parametrize("name", [NAME, WITHOUT_CLASS_TOKEN, "vit_small_patch14_reg4_dinov2"])
@pytest.mark.parametrize("method", ["distilled_attention", "masks"])
def test_it_is_fitted_at_any_sites_of_any_network(method: str, name: str, sites: tuple[Any, ...]) -> None:
    backbone, data = toy(name), OwnLabels(40, name)
    config = describe(method).fit_config().quick()
    target = 0.7 * TokenGame(backbone).cost.dense() / 1e9
    policy: Any = fit(method, backbone, data, target, sites=sites, config=config, progress=False)
    assert [site.label for site in policy.default_sites(4)] == [str(site) for site in sites]
    assert policy.threshold == 0, "not calibrated"


def test_contract_and_cost() -> None:
    backbone = toy(NAME)
    policy, images = TokenScores(0.0, seed=3), random_images(backbone, 3)
    check_policy(policy, backbone, images)
    with FlopCounterMode(display=False) as counter:
        outcome = play(TokenGame.for_policy(backbone, policy), policy, images).outcome
    assert counter.get_total_flops() == 2 * outcome.macs.sum().item()
    width = backbone.embed_dim
    looked_at = outcome.n_kept[:, :-1].sum(dim=1) + backbone.num_patches
    assert outcome.policy_macs.tolist() == (looked_at * (width * (width // 2) + width // 2)).tolist()
    assert policy.at(1.0).network is policy.network
    wide = TokenScores(embed_dim=64)
    with pytest.raises(ValueError, match="tokens: TokenScores was made for width 64, got 48"):
        play(TokenGame(backbone), wide, images)


def test_mistakes_in_settings_are_named() -> None:
    for name in ("price", "price_rate", "calibration", "images"):
        with pytest.raises(ValueError, match=f"{name}: expected"):
            replace(MasksConfig(), **{name: -1})
    with pytest.raises(ValueError, match="calibration: expected at least 0"):
        DistillationConfig(calibration=-1)
