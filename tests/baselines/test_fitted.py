"""Fitted policies: better than unfitted ones, at the budget asked for, the same bits again; kept on disk."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from games import OwnLabels
from helpers import everyday, rewrite, toy
from vitprune_env import PrunedViT, TokenGame, evaluate, load_backbone
from vitprune_env.baselines import EViT, RandomDrop, calibrate, describe, load_fitted, save_fitted
from vitprune_env.baselines.dynamicvit.fitting import DynamicViTConfig, fit_dynamicvit
from vitprune_env.baselines.dynamicvit.policy import DynamicViT
from vitprune_env.baselines.life_regression.fitting import LifeConfig, finetune_life_regression, fit_life_regression
from vitprune_env.baselines.life_regression.policy import LifeRegression
from vitprune_env.baselines.token_scores import (
    DistillationConfig,
    MasksConfig,
    TokenScores,
    fit_distilled_attention,
    fit_masks,
)
from vitprune_env.data import Digits, batches_of
from vitprune_env.engine.backbone import Backbone
from vitprune_env.errors import BudgetError, CheckpointError
from vitprune_env.files import save_state

NAME = "vit_tiny_patch16_224"
METHODS: dict[str, tuple[type, Callable[..., Any], Any]] = {
    "dynamicvit": (DynamicViT, fit_dynamicvit, DynamicViTConfig()),
    "life_regression": (LifeRegression, fit_life_regression, LifeConfig()),
    "distilled_attention": (TokenScores, fit_distilled_attention, DistillationConfig()),
    "masks": (TokenScores, fit_masks, MasksConfig()),
}
every_method = pytest.mark.parametrize("method", METHODS)


def dense_gmacs(backbone: Backbone) -> float:
    return TokenGame(backbone).cost.dense() / 1e9


def weights(policy: Any) -> torch.Tensor:
    return torch.cat([value.flatten() for value in policy.state_dict().values()])


def quick_fit(method: str, **options: Any) -> Any:
    _, fit, config = METHODS[method]
    backbone = toy(NAME)
    options = {"sites": (1, 2, 3), "config": config.quick(), **options}
    return fit(backbone, OwnLabels(48), 0.6 * dense_gmacs(backbone), **options)


def check_worth(method: str, share: float, config: Any, train: int, images: int, margin: float) -> None:
    """A fit of the built-in task beats its unfitted self and random pruning, at the budget."""
    kind, fit, _ = METHODS[method]
    backbone = load_backbone("vit_digits")
    target, sites = share * dense_gmacs(backbone), backbone.default_sites
    batches = batches_of(Digits("validation", images, seed=1), 256)
    fitted = fit(backbone, Digits("train", train, seed=1), target, sites=sites, config=config)

    def measured(policy: Any) -> Any:
        return evaluate(TokenGame.for_policy(backbone, policy, sites=sites), policy, batches)

    result = measured(fitted)
    assert result.gmacs == pytest.approx(target, rel=0.03)
    game = TokenGame(backbone, sites)
    unfitted = calibrate(kind, target, backbone, batches, sites, knob=describe(method).fitted_knob)
    for other in (unfitted, RandomDrop(game.cost.keep_rate_for(1.03e9 * target, game.sites))):
        assert result.accuracy > measured(other).accuracy + margin, f"better than {other}"


@pytest.mark.parametrize("method", everyday(METHODS, "dynamicvit"))
def test_a_short_fit_already_beats_no_fit(method: str) -> None:
    config = METHODS[method][2]
    short = replace(config.fit, steps=12, batch_size=16, validation=32)
    check_worth(method, 0.25, replace(config, fit=short), train=320, images=128, margin=0.1)


@pytest.mark.slow
@every_method
@pytest.mark.parametrize("share", [0.25, 0.35, 0.5])
def test_the_default_fit_is_worth_it(method: str, share: float) -> None:
    check_worth(method, share, METHODS[method][2], train=4096, images=2000, margin=0.005)


@pytest.mark.parametrize("method", everyday(METHODS, "dynamicvit", "masks"))
def test_same_seed_same_bits_and_the_backbone_stays(method: str) -> None:
    before = [parameter.clone() for parameter in toy(NAME).parameters()]
    fits = [quick_fit(method, seed=seed) for seed in (3, 3, 4)]
    assert torch.equal(weights(fits[0]), weights(fits[1]))
    assert not torch.equal(weights(fits[0]), weights(fits[2]))
    assert not torch.equal(weights(fits[0]), weights(METHODS[method][0](0.5, 3, 48, (1, 2, 3)))), "something was learnt"
    assert all(torch.equal(a, b) for a, b in zip(before, toy(NAME).parameters(), strict=True))
    assert all(parameter.requires_grad for parameter in toy(NAME).parameters())


class Killed(OwnLabels):
    """Images that stop coming in step 4, in the middle of an epoch: after three steps and one validation."""

    calls = 0

    def __init__(self, size: int, before: int) -> None:
        super().__init__(size)
        self.allowed = 5 + before  # one image tells this data set from others

    def batch(self, indices: torch.Tensor) -> Any:
        self.calls += 1
        if self.calls > self.allowed:
            raise KeyboardInterrupt
        return super().batch(indices)


@pytest.mark.parametrize("method", everyday(METHODS, "dynamicvit"))
def test_resumed_is_uninterrupted(method: str, tmp_path: Path) -> None:
    _, fit, config = METHODS[method]
    config = replace(config.quick(), images=0)
    config = replace(config, fit=replace(config.fit, checkpoint_every=3, validate_every=2))
    whole = quick_fit(method, config=config)
    before = int(METHODS[method][0] is not TokenScores)  # one image to find the keep rate of the budget
    target, options = 0.6 * dense_gmacs(toy(NAME)), {"sites": (1, 2, 3), "config": config, "output": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        fit(toy(NAME), Killed(48, before), target, **options)
    resumed = quick_fit(method, config=config, output=tmp_path, resume=True)
    assert torch.equal(weights(resumed), weights(whole))
    with pytest.raises(CheckpointError, match="another"):
        quick_fit(method, config=config, output=tmp_path, resume=True, seed=9)
    with pytest.raises(CheckpointError, match=r"another \['first_image'\]"):
        fit(toy(NAME), OwnLabels(48, seed=1), target, **options, resume=True)
    other = deepcopy(toy(NAME))
    other.model.norm.bias.data += 0.1
    with pytest.raises(CheckpointError, match=r"another \['network'\]"):
        fit(other, OwnLabels(48), target, **options, resume=True)


@every_method
def test_budgets_out_of_reach_are_refused(method: str) -> None:
    _, fit, config = METHODS[method]
    with pytest.raises(BudgetError, match=r"^(target_gmacs|budget): "):
        fit(toy(NAME), OwnLabels(48), 1e-6, config=config.quick())


@every_method
def test_files_bring_back_the_policy(method: str, tmp_path: Path) -> None:
    backbone, policy, images = toy(NAME), quick_fit(method), OwnLabels(4).images
    again = load_fitted(save_fitted(policy, tmp_path / "policy.safetensors"))
    assert type(again) is type(policy)
    assert again.config() == policy.config()  # type: ignore[attr-defined]
    assert torch.equal(weights(again), weights(policy))
    with torch.no_grad():
        logits = PrunedViT(backbone, policy)(images)
        assert torch.equal(PrunedViT(backbone, again)(images), logits)
        fresh = METHODS[method][0](0.5)  # not built yet
        blank = load_fitted(save_fitted(fresh, tmp_path / "fresh.safetensors"))
        assert torch.equal(PrunedViT(backbone, blank)(images), PrunedViT(backbone, fresh)(images))


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    policy = quick_fit("life_regression")
    path = save_state({"policy": 1}, tmp_path / "state.safetensors")
    with pytest.raises(CheckpointError, match="expected a policy file, got a training file"):
        load_fitted(path)
    path = save_fitted(policy, tmp_path / "policy.safetensors")
    rewrite(path, b"life_regression", b"life_regressiom")
    with pytest.raises(CheckpointError, match="policy: 'life_regressiom' is not registered"):
        load_fitted(path)


def test_a_policy_without_parameters_is_kept_in_the_same_way(tmp_path: Path) -> None:
    policy = EViT(0.5, fuse=False)
    assert load_fitted(save_fitted(policy, tmp_path / "policy.safetensors")) == policy


def test_the_second_stage_trains_a_copy_of_the_network(tmp_path: Path) -> None:
    backbone, policy, config = toy(NAME), quick_fit("life_regression"), LifeConfig().quick()
    before = [parameter.clone() for parameter in backbone.parameters()]
    predictor = weights(policy).clone()
    tuned = finetune_life_regression(backbone, policy, OwnLabels(48), config=config, output=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(before, backbone.parameters(), strict=True))
    assert torch.equal(weights(policy), predictor)
    assert not torch.equal(tuned.block(1).attn.qkv.weight, backbone.block(1).attn.qkv.weight)  # type: ignore[union-attr]
    again = finetune_life_regression(backbone, policy, OwnLabels(48), config=config, output=tmp_path, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(tuned.parameters(), again.parameters(), strict=True))
