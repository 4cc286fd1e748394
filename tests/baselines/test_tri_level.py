"""Tri-Level's token level: EViT without its fused token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from helpers import golden, make_model, random_images
from vitprune_env.baselines import TriLevel
from vitprune_env.engine.backbone import Backbone
from vitprune_env.game.rollout import play
from vitprune_env.game.token_game import TokenGame


def test_it_keeps_what_evit_keeps(golden_backbone: Backbone, golden_images: Tensor) -> None:
    file, policy = golden("evit_kr05_nofuse"), TriLevel(0.5)
    game = TokenGame.for_policy(golden_backbone, policy, sites="published")
    assert [site.label for site in game.sites] == ["4.attn", "7.attn", "10.attn"]
    episode = play(game, policy, golden_images)
    torch.testing.assert_close(episode.outcome.logits, file["logits"], atol=1e-4, rtol=0)
    for step in range(3):
        kept = torch.zeros(8, 64, dtype=torch.bool).scatter(1, file[f"idx_orig_{step}"], True)
        assert torch.equal(episode.keep[step], kept)


def test_published_counts() -> None:
    # ceil(0.7 * 196), and so on: 138, 97, 68 patches after the three sites
    backbone = Backbone(make_model("deit_tiny_patch16_224", img_size=224, depth=12))
    policy = TriLevel(0.7)
    outcome = play(
        TokenGame.for_policy(backbone, policy, sites="published"), policy, random_images(backbone, 1)
    ).outcome
    assert outcome.n_kept.tolist() == [[138, 97, 68]]


@pytest.mark.parametrize("keep_rate", [0.0, -1.0, 1.5])
def test_bad_keep_rates_are_refused(keep_rate: float) -> None:
    with pytest.raises(ValueError, match=r"^keep_rate: expected"):
        TriLevel(keep_rate)
