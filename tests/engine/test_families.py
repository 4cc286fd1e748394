"""Adapters of block families: the dense pass is timm's own, and removal is exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models.eva import Eva
from torch import nn

from helpers import Fixed, keeps_to_decisions, key_weights, random_images, random_keeps
from vitprune_env import Backbone, Decision, KeepAll, PrunedViT, TokenGame, load_backbone, play, save_backbone
from vitprune_env.engine.attention import Rows
from vitprune_env.engine.families import FAMILIES, Family, family_of, register_family
from vitprune_env.engine.families.adapter import Projections
from vitprune_env.engine.families.eva import EvaFamily
from vitprune_env.engine.families.vit import ViTFamily
from vitprune_env.errors import UnsupportedBackboneError

SMALL: dict[str, Any] = {"img_size": 64, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 5}
# Every way in which timm's Eva models differ is there once.
EVAS: dict[str, dict[str, Any]] = {
    "eva02_tiny_patch14_224": {"img_size": 56},  # separate projections, SwiGLU, average pooling
    "eva02_base_patch16_clip_224": {},  # normalised MLP and attention, class token
    "eva_giant_patch14_224": {"img_size": 56, "global_pool": "token"},  # fused projection, absolute positions only
    "vit_small_patch16_dinov3": {"dynamic_img_size": False, "init_values": 0.5},  # registers, no bias of keys
    "vit_small_patch16_dinov3_qkvb": {"dynamic_img_size": False, "global_pool": "token"},
    "vit_medium_patch16_rope_reg1_gap_256": {},  # AttentionRope, one register, average pooling
    "vit_small_patch16_rope_mixed_ape_224": {"global_pool": "token"},  # learnt angles and absolute positions
    "vit_pe_spatial_tiny_patch16_512": {"global_pool": "token"},  # norm before the blocks
}


def make(name: str) -> Backbone:
    """A small model whose random weights make every part of it matter."""
    model = timm.create_model(name, **{**SMALL, **EVAS[name]}).eval()
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_gain = parameter.dim() == 1 and not key.endswith("bias")
            parameter.copy_(1 + 0.2 * noise if is_gain else 0.15 * noise)
    return Backbone(model, name)


@pytest.mark.parametrize("name", EVAS)
@torch.no_grad()
def test_keeping_all_is_timms_own_pass_and_removal_is_masking(name: str) -> None:
    backbone = make(name)
    images = random_images(backbone, 3)
    dense = backbone(images)
    torch.testing.assert_close(
        play(TokenGame(backbone, (1, "3.attn")), KeepAll(), images).outcome.logits, dense, atol=1e-6, rtol=1e-5
    )
    sites = (1, 2)
    keeps = random_keeps(2, 3, backbone.num_patches, seed=1, least=1)
    removed = play(TokenGame(backbone, sites), Fixed(keeps_to_decisions(keeps)), images).outcome.logits
    masked, _ = backbone.forward_soft(images, key_weights(backbone, sites, keeps))
    torch.testing.assert_close(removed, masked, atol=1e-5, rtol=1e-5)
    deployed = PrunedViT(backbone, Fixed(keeps_to_decisions(keeps)), sites)(images)
    torch.testing.assert_close(deployed, removed, atol=1e-6, rtol=1e-5)
    assert (removed - dense).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "eva02_base_patch16_clip_224"])
@torch.no_grad()
def test_weight_files_are_read_as_the_family_writes_them(name: str, tmp_path: Path) -> None:
    backbone = make(name)
    path = save_backbone(backbone, tmp_path / "weights.safetensors")
    loaded = load_backbone(name, checkpoint=path, **{**SMALL, **EVAS[name]})
    images = random_images(backbone, 2)
    assert torch.equal(loaded(images), backbone(images))


@torch.no_grad()
def test_gated_attention() -> None:
    backbone = make("vit_medium_patch16_rope_reg1_gap_256")
    for block in backbone.model.blocks:
        block.attn.gate = nn.Linear(48, 48)
    images = random_images(backbone, 2)
    logits = play(TokenGame(backbone, (1,)), KeepAll(), images).outcome.logits
    torch.testing.assert_close(logits, backbone(images), atol=1e-6, rtol=1e-5)
    assert backbone.family.attention_macs(backbone.block(1)) == 5 * 48 * 48


@torch.no_grad()
def test_a_merged_token_keeps_the_angles_of_its_target() -> None:
    """Two equal tokens merged into one are, but for the place, the first of them."""
    backbone = make("eva02_base_patch16_clip_224")
    images = random_images(backbone, 1)
    itself = torch.arange(backbone.num_patches)[None]
    target = itself.clone()
    target[0, 5] = 3
    weight = torch.ones_like(target, dtype=torch.float)
    weight[0, 5] = 0
    merged = Decision(keep=target == itself, merge_into=target, weight=weight)
    dropped = Decision(keep=target == itself)
    game = TokenGame(backbone, (1,))
    one, other = (play(game, Fixed([decision]), images).outcome.logits for decision in (merged, dropped))
    torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_rows_without_patch_numbers_are_refused_where_positions_are_needed() -> None:
    backbone = make("eva02_tiny_patch14_224")
    with pytest.raises(ValueError, match="rows: expected rows that know their patch numbers"):
        backbone.family.positions(backbone.model, Rows.of(3, 2))
    assert ViTFamily().positions(None, Rows.of(3, 2)) is None


def test_what_a_family_must_say_is_said_by_name() -> None:
    class Silent(Family):
        name = "Silent"

    for ask in (
        lambda: Silent().recognises(nn.Identity()),
        lambda: Silent().embed(None, torch.zeros(1)),
        lambda: Silent().before_attention(None, torch.zeros(1), None),
        lambda: Silent().after_attention(None, torch.zeros(1), torch.zeros(1), None),
        lambda: Silent().feed_forward(None, torch.zeros(1), None),
    ):
        with pytest.raises(TypeError, match="Silent does not say"):
            ask()


def test_a_family_of_ones_own_is_asked_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitprune_env.engine.families.FAMILIES", list(FAMILIES))

    class Louder(EvaFamily):
        """Values of twice the size."""

        name = "Louder"

        def before_attention(self, block: Any, x: torch.Tensor, position: torch.Tensor | None) -> Projections:
            q, k, v = super().before_attention(block, x, position)
            return Projections(q, k, 2 * v)

    backbone = make("eva02_tiny_patch14_224")
    assert type(backbone.family) is EvaFamily
    mine = register_family(Louder())
    assert family_of(backbone.model) is mine
    louder = Backbone(backbone.model)
    images = random_images(backbone, 2)
    with torch.no_grad():
        one, other = (play(TokenGame(b, (1,)), KeepAll(), images).outcome.logits for b in (backbone, louder))
    assert (one - other).abs().max() > 1e-3


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"num_classes": 0}, "no classifier"),
    ({"patch_drop_rate": 0.5}, "patch_drop_rate"),
    ({"attn_type": "rope", "qkv_fused": False, "num_kv_heads": 1}, "num_kv_heads=1"),
    ({"rope_type": "dinov3", "rope_shift_coords": 0.1}, "rotary positions that are augmented"),
    ({"use_post_norm": True}, "a block of type EvaBlockPostNorm"),
]


@pytest.mark.parametrize(("change", "why"), REFUSED)
def test_what_cannot_be_walked_is_named(change: dict[str, Any], why: str) -> None:
    model = timm.create_model("vit_small_patch16_rope_224", **{**SMALL, "global_pool": "token", **change})
    assert isinstance(model, Eva)
    with pytest.raises(UnsupportedBackboneError, match=f"model: expected a plain timm Eva, got {why}"):
        Backbone(model)
