"""DynamicViT: the original's decisions and training form, its losses by hand, fitted predictors that are worth it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from helpers import golden
from vitprune_env.backbone import Backbone
from vitprune_env.baselines.dynamicvit import DynamicViT
from vitprune_env.baselines.dynamicvit_fit import forward_train
from vitprune_env.game import TokenGame
from vitprune_env.rollout import play
from vitprune_env.soft import start_soft
from vitprune_env.types import parse_sites


@pytest.fixture
def published() -> DynamicViT:
    return DynamicViT(0.7).load_published(golden("dynamicvit_rho07"))


def test_decisions_of_the_original(golden_backbone: Backbone, golden_images: Tensor, published: DynamicViT) -> None:
    file = golden("dynamicvit_rho07")
    game = TokenGame.for_policy(golden_backbone, published)
    assert [site.half // 2 for site in game.sites] == file["sites"].tolist()
    episode = play(game, published, golden_images, record=True)
    torch.testing.assert_close(episode.outcome.logits, file["logits"], atol=1e-4, rtol=0)
    for step, block in enumerate(file["sites"].tolist()):
        keep = torch.zeros(8, 64, dtype=torch.bool).scatter(1, file[f"idx_orig_{step}"], True)
        assert torch.equal(episode.keep[step], keep)
        assert (episode.outcome.n_kept[:, step] == int(file["token_counts_after_block"][block]) - 1).all()


def test_training_form_of_the_original(golden_backbone: Backbone, golden_images: Tensor) -> None:
    file = golden("dynamicvit_train_policy")
    sites = parse_sites(file["sites"].tolist(), golden_backbone.depth)
    with torch.no_grad():
        logits, kept, _ = forward_train(
            golden_backbone, start_soft(golden_backbone, golden_images), sites,
            lambda step, *_: file["raw_decisions"][step].float(),
        )  # fmt: skip
    torch.testing.assert_close(torch.stack(kept), file["cumulative_decisions"])
    torch.testing.assert_close(logits, file["logits"], atol=1e-4, rtol=0)
