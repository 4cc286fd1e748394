"""Life regression: lives, order and logits of the reference, its equations by hand, both stages of its training."""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from games import OwnLabels
from helpers import Fixed, golden, keeps_to_decisions, random_images, random_keeps, toy
from vitprune_env.baselines.life_regression.fitting import (
    LifeConfig,
    fit_life_regression,
    forward_soft_lives,
    train_life_regression,
)
from vitprune_env.baselines.life_regression.policy import LifeRegression, LifeTable
from vitprune_env.engine.backbone import Backbone
from vitprune_env.engine.masked import run_masked, start_masked
from vitprune_env.game.policy_contract import check_policy
from vitprune_env.game.rollout import play
from vitprune_env.game.token_game import TokenGame
from vitprune_env.types import parse_sites


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
    game = TokenGame.for_policy(golden_backbone, policy, sites="published")
    assert [site.label for site in game.sites] == ["4", "7", "10"]
    episode = play(game, policy, golden_images)
    torch.testing.assert_close(episode.outcome.logits, file["logits_hard"], atol=1e-4, rtol=0)
    for step, site in enumerate(game.sites):
        count = int(file["n_t"][site.block])  # of the block after the site
        keep = torch.zeros(8, 64, dtype=torch.bool).scatter(1, file["order_by_life"][:, :count], True)
        assert torch.equal(episode.keep[step], keep)
    with torch.no_grad():
        state, _ = run_masked(golden_backbone, start_masked(golden_backbone, golden_images), game.sites[0].half)
        importance = policy.importance(state.tokens, state.prefix[:, 0])
        lives = policy.lives(importance, game.sites, golden_backbone.depth)
        torch.testing.assert_close(lives, file["tau"], atol=1e-4, rtol=1e-4)
        for sharpness in (1.5, 30):
            logits = forward_soft_lives(golden_backbone, state, lives, sharpness)
            expected = file[f"logits_soft_U{sharpness}"]
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_counts_mean_and_spread_by_hand() -> None:
    policy = LifeRegression(0.7)
    counts = [policy.count(step, 196) for step in range(3)]
    assert counts == [137, 96, 67]
    table = LifeTable.of(counts, 196, parse_sites((4, 7, 10), 12), 12)
    assert (table.lives, table.leaving) == ((4, 7, 10, 12), (59, 41, 29, 67))
    mean = (59 * 4 + 41 * 7 + 29 * 10 + 67 * 12) / 196
    assert table.mean == pytest.approx(mean) == pytest.approx(8.25, abs=0.01)
    square = (59 * (4 - mean) ** 2 + 41 * (7 - mean) ** 2 + 29 * (10 - mean) ** 2 + 67 * (12 - mean) ** 2) / 196
    assert table.spread == pytest.approx(square**0.5) == pytest.approx(3.32, abs=0.01)
    assert LifeTable.of([2], 4, parse_sites(["2.attn"], 3), 3).lives == (2, 3), "block 2 still uses it as a key"


@given(scale=st.floats(0.01, 100), shift=st.floats(-5, 5), rate=st.floats(0.1, 1))
def test_lives_have_the_wanted_mean_and_spread_whatever_the_importance(scale: float, shift: float, rate: float) -> None:
    policy, sites = LifeRegression(rate), parse_sites((1, 3, 5), 8)
    importance = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    lives = policy.lives(importance * scale + shift, sites, 8)
    table = LifeTable.of([policy.count(step, 50) for step in range(3)], 50, sites, 8)
    torch.testing.assert_close(lives.mean(dim=1), torch.full((3,), table.mean), atol=1e-4, rtol=0)
    torch.testing.assert_close(lives.std(dim=1, correction=0), torch.full((3,), table.spread), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(lives, policy.lives(importance, sites, 8), atol=1e-3, rtol=1e-3)


def test_importance_is_the_bilinear_form() -> None:
    policy = LifeRegression(0.5, embed_dim=2)
    policy.load_state_dict({"weight": torch.tensor([[1.0, 2], [3, 4]])}, strict=False)
    cls, tokens = torch.tensor([[5.0, 3.0]]), torch.tensor([[[1.0, 2.0], [9.0, 4.0]]])
    # LayerNorm makes (1, -1) of the class token and (-1, 1), (1, -1) of the others; (1, -1) W = (-2, -2)
    torch.testing.assert_close(policy.importance(tokens, cls), torch.zeros(1, 2), atol=1e-4, rtol=0)
    policy.load_state_dict({"weight": torch.tensor([[1.0, 2], [3, 5]])}, strict=False)  # (1, -1) W = (-2, -3)
    torch.testing.assert_close(policy.importance(tokens, cls), torch.tensor([[-1.0, 1.0]]), atol=1e-3, rtol=0)


@pytest.mark.parametrize("sites", [(4, 7, 10), ("4.attn", 6)])
def test_sharp_weights_of_distinct_lives_are_removal(
    sites: tuple, golden_backbone: Backbone, golden_images: Tensor
) -> None:
    parsed = parse_sites(sites, 12)
    keeps = random_keeps(len(sites), 8, 64, seed=0, least=1)
    lives = torch.full((8, 64), 12.5)
    for site, keep in reversed(list(zip(parsed, keeps, strict=True))):
        lives = lives.masked_fill(~keep, site.block + 0.5)
    packed = play(TokenGame(golden_backbone, sites), Fixed(keeps_to_decisions(keeps)), golden_images).outcome.logits
    with torch.no_grad():
        state, _ = run_masked(golden_backbone, start_masked(golden_backbone, golden_images), parsed[0].half)
        torch.testing.assert_close(forward_soft_lives(golden_backbone, state, lives, 100), packed, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["golden", "vit_medium_patch16_gap_240", "vit_small_patch14_reg4_dinov2"])
@pytest.mark.parametrize("rate", [0.01, 0.6, 1.0])
def test_contract_and_cost(name: str, rate: float) -> None:
    backbone, policy = toy(name), LifeRegression(rate)
    images = random_images(backbone, 3)
    check_policy(policy, backbone, images)
    with FlopCounterMode(display=False) as counter:
        outcome = play(TokenGame.for_policy(backbone, policy, sites=(1, "2.attn", 3)), policy, images).outcome
    assert counter.get_total_flops() == 2 * outcome.macs.sum().item()
    width = backbone.embed_dim
    assert outcome.policy_macs.tolist() == [width * width + backbone.num_patches * width] * 3


def test_mistakes_are_named(golden_backbone: Backbone, golden_images: Tensor) -> None:
    for rate in (0, 1.5, -1):
        with pytest.raises(ValueError, match="keep_rate: expected"):
            LifeRegression(rate)
    with pytest.raises(ValueError, match="embed_dim: expected a whole number of at least 1, got 0"):
        LifeRegression(0.5, embed_dim=0)
    wide = LifeRegression(0.5, embed_dim=64)
    with pytest.raises(ValueError, match="made for width 64, got 48"):
        play(TokenGame.for_policy(golden_backbone, wide, sites="published"), wide, golden_images)
    policy = LifeRegression(0.5)
    game = TokenGame.for_policy(golden_backbone, policy, sites="published")
    game.reset(golden_images)
    obs = game.step(policy.decide(game.observation()))[0]
    policy.reset(8, 64)
    with pytest.raises(ValueError, match="obs: expected games that LifeRegression saw at their first site"):
        policy.decide(obs)
    for name in ("sharpness", "images"):
        with pytest.raises(ValueError, match=f"{name}: expected"):
            replace(LifeConfig(), **{name: -1})


def trained(scheme: Any, config: LifeConfig | None = None, **options: Any) -> tuple[LifeRegression, Backbone]:
    backbone = toy("vit_tiny_patch16_224")
    gmacs = 0.6 * TokenGame(backbone).cost.dense() / 1e9
    config = LifeConfig().quick() if config is None else config
    return train_life_regression(backbone, OwnLabels(48), gmacs, scheme, config=config, sites=(1, 2, 3), **options)


def values(*modules: torch.nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for module in modules for parameter in module.parameters()])


def test_two_stages_are_the_fit_and_then_the_network(tmp_path: Path) -> None:
    backbone = toy("vit_tiny_patch16_224")
    before = values(backbone)
    policy, tuned = trained("two_stages", output=tmp_path)
    gmacs = 0.6 * TokenGame(backbone).cost.dense() / 1e9
    alone = fit_life_regression(backbone, OwnLabels(48), gmacs, config=LifeConfig().quick(), sites=(1, 2, 3))
    assert torch.equal(values(policy), values(alone)), "the second stage leaves the predictor as it is"
    assert not torch.equal(values(tuned), before)
    assert torch.equal(values(backbone), before), "a copy was trained"
    again = trained("two_stages", output=tmp_path, resume=True)
    assert torch.equal(values(*again), values(policy, tuned))


def test_in_a_single_stage_both_learn_at_once(tmp_path: Path) -> None:
    """For as many steps as both stages, each at its own learning rate: Adam's first step is as long as that."""
    backbone = toy("vit_tiny_patch16_224")
    before = values(backbone)
    quick = LifeConfig().quick()
    loops = {
        name: replace(getattr(quick, name), lr=lr, steps=1, schedule="constant", clip_norm=None, validation=0)
        for name, lr in (("fit", 1e-2), ("finetune", 1e-4))
    }
    policy, tuned = trained("single_stage", replace(quick, **loops), output=tmp_path)
    start = LifeRegression(policy.keep_rate, 0, backbone.embed_dim, (1, 2, 3))
    assert 1e-2 < float((values(policy) - values(start)).abs().max()) <= 2.01e-2
    assert 1e-4 < float((values(tuned) - before).abs().max()) <= 2.01e-4
    assert torch.equal(values(backbone), before), "a copy was trained"
    assert [site.label for site in policy.default_sites(4)] == ["1", "2", "3"]  # type: ignore[union-attr]
    again = trained("single_stage", replace(quick, **loops), output=tmp_path, resume=True)
    assert torch.equal(values(*again), values(policy, tuned))


@pytest.mark.parametrize("scheme", ["two_stages", "single_stage"])
def test_u_is_heard(scheme: str) -> None:
    flat, steep = (trained(scheme, replace(LifeConfig().quick(), sharpness=sharpness)) for sharpness in (0.5, 3.0))
    assert not torch.allclose(values(flat[0]), values(steep[0]), atol=1e-3)
    assert not torch.allclose(values(flat[1]), values(steep[1]), atol=1e-6)


def test_schemes_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="scheme: expected 'two_stages' or 'single_stage', got 'both'"):
        trained("both")
    quick = LifeConfig().quick()
    mixed = replace(quick, fit=replace(quick.fit, steps=None))
    with pytest.raises(
        ValueError, match="config: expected steps, or epochs, in both loops, got steps=None and steps=4"
    ):
        trained("single_stage", mixed)


def test_copies_from_before_the_predictor_is_made_share_it(golden_backbone: Backbone, golden_images: Tensor) -> None:
    """Fine-tuning plays copies at other keep rates."""
    policy = LifeRegression(0.7)
    first, second = copy(policy), copy(policy)
    for other in (first, second, policy):
        play(TokenGame.for_policy(golden_backbone, other, sites="published"), other, golden_images[:1])
    assert policy.weight is not None
    assert policy.weight is first.weight is second.weight
    assert policy.norm is first.norm is second.norm
