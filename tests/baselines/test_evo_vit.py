"""Evo-ViT against the original public code, and by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from helpers import golden, random_images, toy
from places import GOLDEN
from vitprune_env import PrunedViT, load_backbone
from vitprune_env.baselines import EvoViT, read_from_patches
from vitprune_env.baselines.evo_vit import selecting_blocks
from vitprune_env.deploy.export import export_program
from vitprune_env.engine.backbone import Backbone
from vitprune_env.errors import EvidenceError, UnsupportedBackboneError
from vitprune_env.game.rollout import play
from vitprune_env.game.token_game import TokenGame
from vitprune_env.types import Episode

FILES = sorted(path.stem for path in GOLDEN.glob("evovit_*.npz"))


def going_on(episode: Episode) -> Tensor:
    """`[T, B, N]` bool, tokens that the blocks after each site update."""
    assert episode.parked is not None
    return episode.keep & ~episode.parked


@pytest.mark.parametrize("name", FILES)
def test_decisions_and_logits_of_the_original(name: str, golden_backbone: Backbone, golden_images: Tensor) -> None:
    file, policy = golden(name), EvoViT(0.5, layer_wise="layer" in name)
    game = TokenGame.for_policy(golden_backbone, policy, sites="published")
    episode = play(game, policy, golden_images, record=True)
    blocks = [site.block for site in game.sites]
    for number, block in enumerate(file["sites"].tolist()):  # before block 4 of 0, 1, ... is after the 4th
        slow = file[f"order_orig_{number}"][:, : int(file[f"n_slow_{number}"])]
        expected = torch.zeros(8, 64, dtype=torch.bool).scatter(1, slow, True)
        assert torch.equal(going_on(episode)[blocks.index(block)], expected)
    counts = file["token_counts_in_block"]
    for number, block in enumerate(blocks):
        assert (episode.outcome.n_kept[:, number] == counts[block] - 1).all()
        torch.testing.assert_close(episode.observations[number].cls, file["cls_out"][:, block - 1], atol=1e-4, rtol=0)
    torch.testing.assert_close(episode.outcome.logits, file["logits_from_cls"], atol=1e-4, rtol=0)
    averaging = read_from_patches(golden_backbone)
    published = play(TokenGame.for_policy(averaging, policy, sites="published"), policy, golden_images)
    torch.testing.assert_close(published.outcome.logits, file["logits"], atol=1e-4, rtol=0)
    assert torch.equal(published.parked, episode.parked)


def test_there_is_a_golden_file() -> None:
    assert "evovit_stage_pr05" in FILES


@pytest.mark.parametrize(
    ("depth", "stages", "layers"),
    [(12, [4, 8], range(4, 12)), (24, [8, 16], range(8, 24)), (6, [2, 4], range(2, 6)), (1, [1], range(1, 2))],
)
def test_where_it_selects(depth: int, stages: list[int], layers: range) -> None:
    assert selecting_blocks(depth, layer_wise=False) == stages
    assert selecting_blocks(depth, layer_wise=True) == layers
    assert EvoViT(0.5).published_sites(depth) == range(stages[0], stages[-1] + 1)
    assert EvoViT(0.5, layer_wise=True).published_sites(depth) == layers


@pytest.mark.parametrize("layer_wise", [False, True])
@pytest.mark.parametrize("momentum", [0.5, 0.8, 1.0])
def test_the_score_is_a_running_mean_of_the_updated_tokens(layer_wise: bool, momentum: float) -> None:
    """Eq. 3, token by token; who waits keeps its score, and the best int(0.6 * 16) = 9 of all go on."""
    backbone, policy = toy("deit_tiny_patch16_224"), EvoViT(0.6, layer_wise, momentum)
    episode = play(
        TokenGame.for_policy(backbone, policy, sites="published"), policy, random_images(backbone, 3), record=True
    )
    score = [[0.0] * 16 for _ in range(3)]
    slow = torch.zeros(3, 16, dtype=torch.bool)
    for step, obs in enumerate(episode.observations):
        seen = torch.stack([obs.evidence["cls_attention"].double(), obs.image, obs.token], dim=1)
        for attention, image, token in ((a, int(i), int(j)) for a, i, j in seen.tolist()):
            old = score[image][token]
            score[image][token] = attention if step == 0 else (1 - momentum) * old + momentum * attention
        if layer_wise or obs.site.block in (1, 3):
            best = [sorted(range(16), key=lambda token: -row[token])[:9] for row in score]
            slow = torch.zeros(3, 16, dtype=torch.bool).scatter(1, torch.tensor(best), True)
        assert torch.equal(going_on(episode)[step], slow)
    assert episode.keep.all(), "nobody dies"
    assert episode.outcome.alive.all()
    assert (episode.outcome.n_kept == 9).all()


def test_the_second_selection_ranks_the_waiting_too() -> None:
    backbone, policy = toy("golden"), EvoViT(0.5)
    episode = play(TokenGame.for_policy(backbone, policy, sites="published"), policy, random_images(backbone, 8))
    first, last = going_on(episode)[0], going_on(episode)[-1]
    assert (last & ~first).any()
    assert torch.equal(going_on(episode)[1], first), "between selections the same ones wait"


@given(seed=st.integers(0, 999), layer_wise=st.booleans(), rate=st.sampled_from([0.01, 0.3, 0.5, 1.0]))
def test_the_model_plays_the_game_and_costs_what_is_said(seed: int, layer_wise: bool, rate: float) -> None:
    backbone, policy = toy("vit_base_patch16_224"), EvoViT(rate, layer_wise)  # reads the mean of the patches
    images = random_images(backbone, 4, seed)
    with FlopCounterMode(display=False) as counter:
        outcome = play(TokenGame.for_policy(backbone, policy, sites="published"), policy, images).outcome
    assert counter.get_total_flops() == 2 * outcome.macs.sum().item()
    model = PrunedViT(backbone, policy, sites="published").eval()
    with torch.no_grad():
        torch.testing.assert_close(model(images), outcome.logits, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(model(images[:1]), outcome.logits[:1], atol=1e-5, rtol=1e-5)
        if rate == 1:
            torch.testing.assert_close(model(images), backbone(images), atol=1e-5, rtol=1e-5)


def test_gmacs_are_the_published_ones() -> None:
    """3.0 GMACs for DeiT-S, whose patches come back for free."""
    backbone = load_backbone("deit_small_patch16_224")
    game = TokenGame.for_policy(backbone, EvoViT(0.5), sites="published")
    macs = game.cost.forward(torch.full((1, len(game.sites)), 98), game.sites)
    assert float(macs) / 1e9 == pytest.approx(3.03, abs=0.005)


@torch.no_grad()
def test_sites_of_somebody_elses_choice_select_too() -> None:
    backbone, policy = toy("deit_tiny_patch16_224"), EvoViT(0.5)
    outcome = play(TokenGame.for_policy(backbone, policy, sites=(2,)), policy, random_images(backbone, 2)).outcome
    assert outcome.n_kept.tolist() == [[8], [8]]


@torch.no_grad()
def test_exports_with_fixed_shapes() -> None:
    backbone = toy("deit_tiny_patch16_224")
    model = PrunedViT(backbone, EvoViT(0.5), sites="published").eval()
    images = random_images(backbone, 3)
    exported = export_program(model).module()
    torch.testing.assert_close(exported(images), model(images), atol=1e-5, rtol=1e-5)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="keep_rate: expected a number above 0"):
        EvoViT(0.0)
    with pytest.raises(ValueError, match="momentum: expected a number above 0"):
        EvoViT(0.5, momentum=1.5)
    with pytest.raises(EvidenceError, match="cls_attention"):
        PrunedViT(toy("vit_medium_patch16_gap_240"), EvoViT(0.5))
    with pytest.raises(UnsupportedBackboneError, match="one head"):
        read_from_patches(toy("deit_tiny_distilled_patch16_224"))
    backbone = toy("vit_base_patch16_224")
    assert read_from_patches(backbone) is backbone
