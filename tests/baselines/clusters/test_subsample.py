"""The mergers with weights: what their layers compute, and what training makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from games import OwnLabels
from helpers import random_images, toy
from ragged import ragged_keep
from vitprune_env.baselines import MergerConfig, PoolMerge, SubSampleMerge, fit_merger, load_fitted, save_fitted
from vitprune_env.baselines.clusters import subsample_fitting
from vitprune_env.baselines.clusters.subsample import SubSample
from vitprune_env.baselines.clusters.token_lists import TokenLists
from vitprune_env.baselines.fitting.loop import FitConfig
from vitprune_env.engine.backbone import Backbone
from vitprune_env.errors import BudgetError, CheckpointError
from vitprune_env.game.rollout import evaluate, play
from vitprune_env.game.token_game import TokenGame
from vitprune_env.policy import KeepAll

KINDS = ("convolution", "mlp")
NAME = "vit_tiny_patch16_224"


def layers(kernel: int) -> SubSample:
    """Layers with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(kernel)
        module = SubSample(48, 24, kernel)
        nn.init.normal_(module.out.weight)
        nn.init.normal_(module.out.bias)
    return module.requires_grad_(False)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("is_ragged", [False, True])
def test_layers_are_convolutions(kernel: int, is_ragged: bool) -> None:
    backbone, module = toy(NAME), layers(kernel)
    obs = TokenGame(backbone, [1]).reset(random_images(backbone, 8))
    members = ragged_keep(backbone, 8, seed=4) if is_ragged else obs.alive
    lists = TokenLists.of(obs, members, None if is_ragged else obs.num_agents)
    new = module(lists)
    weight = module.window.weight.view(24, 48, kernel)
    for image in range(8):
        tokens = obs.dense()[image, members[image]]
        if not len(tokens):
            continue
        first = F.conv1d(module.norm(tokens).T[None], weight, module.window.bias, padding=kernel // 2)
        second = F.conv1d(F.gelu(first), module.out.weight[..., None], module.out.bias)
        torch.testing.assert_close(new[image, : len(tokens)], tokens + second[0].T, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_fresh_layers_are_average_pooling(kind: Any, golden_backbone: Backbone, golden_images: Tensor) -> None:
    policy, pooling = SubSampleMerge(0.6, 48, 3, kind), PoolMerge(0.6)
    with torch.no_grad():
        first = play(TokenGame.for_policy(golden_backbone, policy, sites="published"), policy, golden_images)
    second = play(TokenGame.for_policy(golden_backbone, pooling, sites="published"), pooling, golden_images)
    assert torch.equal(first.keep, second.keep)
    torch.testing.assert_close(first.outcome.logits, second.outcome.logits)


def test_attentive_tokens_are_left_alone(golden_backbone: Backbone, golden_images: Tensor) -> None:
    policy = SubSampleMerge(0.6, 48, 1, "mlp", clusters=3, pairs=0)
    nn.init.ones_(cast(SubSample, policy.layers[0]).out.bias)
    policy.requires_grad_(False)
    game = TokenGame(golden_backbone, ["4.attn"], needs=policy.needs)
    obs = game.reset(golden_images)
    decision = policy.decide(obs)
    assert decision.features is not None
    attention = obs.scatter(obs.evidence["cls_attention"])
    attentive = obs.gather(attention.argsort(dim=1, descending=True).argsort(dim=1) < 39)
    assert torch.equal(decision.features[attentive], obs.tokens[attentive])
    torch.testing.assert_close(decision.features[~attentive], obs.tokens[~attentive] + 1)


@pytest.mark.parametrize("kind", KINDS)
def test_training_helps_and_meets_the_budget(kind: Any) -> None:
    backbone, data = toy(NAME), OwnLabels(160)
    dense = TokenGame(backbone).cost.dense() / 1e9
    config = MergerConfig(FitConfig(steps=24, batch_size=32, lr=5e-3, validation=32, validate_every=8), images=160)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    policy = fit_merger(backbone, data, 0.5 * dense, kind=kind, config=config)
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    assert all(parameter.requires_grad for parameter in backbone.parameters())
    fresh = SubSampleMerge(policy.keep_rate, backbone.embed_dim, policy.num_sites, kind, sites=policy.sites)
    images = [(data.images, data.labels)]
    with torch.no_grad():
        found = [evaluate(TokenGame.for_policy(backbone, p), p, images) for p in (policy, fresh)]
        logits = [play(TokenGame.for_policy(backbone, p), p, data.images).outcome.logits for p in (policy, fresh)]
    trained, untrained = (float(F.cross_entropy(x, data.labels)) for x in logits)
    assert trained < untrained
    assert 0.5 * dense <= found[0].gmacs < 0.55 * dense, "few tokens, so the budget is met in coarse steps"
    assert found[0].gmacs == found[1].gmacs


def test_interrupted_and_resumed_equals_uninterrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, data = toy(NAME), OwnLabels(64)
    target = 0.5 * TokenGame(backbone).cost.dense() / 1e9
    fitting = FitConfig(steps=5, batch_size=16, validation=16, validate_every=2, checkpoint_every=2)
    options: Any = {"seed": 3, "config": MergerConfig(fitting)}
    whole = fit_merger(backbone, data, target, **options)
    loss, calls = subsample_fitting.MergerTask.loss, iter(range(3))

    def interrupted(*args: Any) -> Any:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return loss(*args)

    monkeypatch.setattr(subsample_fitting.MergerTask, "loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit_merger(backbone, data, target, output=tmp_path, **options)
    monkeypatch.undo()
    resumed = fit_merger(backbone, data, target, output=tmp_path, resume=True, **options)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name])
    with pytest.raises(CheckpointError, match="kind"):
        fit_merger(backbone, data, target, kind="mlp", output=tmp_path, resume=True, **options)


def test_at_shares_the_layers() -> None:
    policy = SubSampleMerge(0.7, 48, 3, "mlp", clusters=[3, 2, 1], seed=4)
    other = policy.at(0.3)
    assert (policy.keep_rate, other.keep_rate) == (0.7, 0.3)
    assert other.layers is policy.layers
    assert other.clusters == (3, 2, 1)


def test_saved_and_loaded(tmp_path: Path) -> None:
    policy = SubSampleMerge(0.5, 48, 2, "convolution", pairs=[1, 2])
    nn.init.normal_(cast(SubSample, policy.layers[1]).out.weight)
    loaded = load_fitted(save_fitted(policy, tmp_path / "merger.safetensors"))
    assert isinstance(loaded, SubSampleMerge)
    assert loaded.config() == policy.config()
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in policy.state_dict().items())


def test_initial_weights_come_from_the_seed_alone() -> None:
    state = torch.get_rng_state()
    first, second, third = (SubSampleMerge(0.5, 48, 1, seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first["layers.0.window.weight"], second["layers.0.window.weight"])
    assert not torch.equal(first["layers.0.window.weight"], third["layers.0.window.weight"])


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("kind", {"kind": "attention"}), ("embed_dim", {"embed_dim": 0}), ("num_sites", {"num_sites": 1.0}),
     ("keep_rate", {"keep_rate": 2}), ("pairs", {"pairs": [-1]})],
    ids=str,
)  # fmt: skip
def test_bad_parameters_are_refused_by_name(name: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        SubSampleMerge(**{"keep_rate": 0.5, "embed_dim": 48, "num_sites": 3, **arguments})


def test_other_games_and_budgets_are_refused(golden_backbone: Backbone, golden_images: Tensor) -> None:
    policy = SubSampleMerge(0.5, 48, 2)
    with pytest.raises(ValueError, match="made for 2 sites of width 48, got 3 of width 48"):
        play(TokenGame.for_policy(golden_backbone, policy, sites="published"), policy, golden_images)
    with pytest.raises(BudgetError):
        fit_merger(toy(NAME), OwnLabels(8), 1e-9, config=MergerConfig().quick())
    with pytest.raises(ValueError, match="logit_weight: expected at least 0"):
        MergerConfig(logit_weight=-1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_keeping_all_costs_nothing_extra(kind: Any) -> None:
    backbone = toy(NAME)
    images, policy = random_images(backbone, 2), SubSampleMerge(1.0, 48, 3, kind)
    with torch.no_grad():
        outcome = play(TokenGame.for_policy(backbone, policy, sites="published"), policy, images).outcome
    torch.testing.assert_close(outcome.logits, play(TokenGame(backbone), KeepAll(), images).outcome.logits)
