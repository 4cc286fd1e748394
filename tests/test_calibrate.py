"""Baselines meet the budget that they are asked for, and say so when they cannot."""

from __future__ import annotations

import pytest
import timm
import torch

from vitprune_env import Backbone, TokenGame, load_backbone
from vitprune_env.baselines import EViT, RandomDrop, calibrate
from vitprune_env.errors import BudgetError
from vitprune_env.rollout import evaluate


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    torch.manual_seed(0)
    options = {"img_size": 128, "depth": 4, "embed_dim": 24, "num_heads": 3, "num_classes": 5}
    return load_backbone(timm.create_model("deit_tiny_patch16_224", **options))


@pytest.fixture(scope="module")
def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(4, 3, 128, 128, generator=generator), torch.randint(5, (4,), generator=generator))]


@pytest.mark.parametrize("share", [0.55, 0.7, 0.9])
@pytest.mark.parametrize("make", [RandomDrop, EViT])
def test_budget_is_met_from_above_by_less_than_a_token_per_site(
    backbone: Backbone, batches: list, share: float, make: type
) -> None:
    dense = TokenGame(backbone).cost.dense() / 1e9
    policy = calibrate(make, share * dense, backbone, batches, sites=backbone.default_sites)
    game = TokenGame.for_policy(backbone, policy, sites=backbone.default_sites)
    spent = evaluate(game, policy, batches).gmacs
    assert share * dense <= spent <= (share + 3 / backbone.num_patches) * dense


def test_unreachable_budget_names_the_range(backbone: Backbone, batches: list) -> None:
    with pytest.raises(BudgetError, match=r"target_gmacs: EViT reaches .* to .* GMACs here, got 1e-06"):
        calibrate(EViT, 1e-6, backbone, batches, sites=backbone.default_sites)
