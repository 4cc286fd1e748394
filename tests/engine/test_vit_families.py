"""Every plain ViT that timm lists, shrunk: it is walked exactly, or refused by the part that the game cannot walk."""

from __future__ import annotations

from fnmatch import fnmatch
from typing import Any

import pytest
import timm
import torch

from helpers import random_images
from vitprune_env import KeepAll, TokenGame, load_backbone, play
from vitprune_env.errors import UnsupportedBackboneError

TINY: dict[str, Any] = {"img_size": 64, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}
# The stem of this one has a fixed width.
OVERRIDES: dict[str, dict[str, Any]] = {"vit_base_mci_224": {"embed_dim": 768, "num_heads": 12}}
# pattern of the name -> why it is refused; the first that matches counts
REFUSED = {
    "vit_*_18x2_*": "a block of type ParallelThingsBlock",
    "vit_*_rpn_*": "a block of type ResPostBlock",
    "vit_*_xp_*": "a block of type ParallelScalingBlock",
    "vit_pwee_*": "a block of type ParallelScalingBlock",
    "vit_dpwee_*": "a block of type DiffParallelScalingBlock",
    "vit_d[wl]*_gap_*": "attention of type DiffAttention",
    "test_vit": "dynamic_img_size=True",
    "test_vit[24]": "dynamic_img_size=True",
    "test_vit3": "pooling over the prefix tokens",
    "vit_intern300m_*": "dynamic_img_size=True",
    "eva02_enormous_*": "a block of type EvaBlockPostNorm",
    "vit_*_dinov3*": "dynamic_img_size=True",
    "vit_*_lingbot": "dynamic_img_size=True",
    "vit_pe_core_*": "global_pool='map'",
}
MODULES = ("vision_transformer", "vision_transformer_hybrid", "deit", "eva")
NAMES = sorted(  # sapiens2 fixes its depth
    {name for module in MODULES for name in timm.list_models(module=module) if "sapiens2" not in name}
)
OTHERS = {
    "beit_base_patch16_224": "Beit",
    "vit_relpos_small_patch16_224": "VisionTransformerRelPos",
    "samvit_base_patch16": "VisionTransformerSAM",
    "cait_xxs24_224": "Cait",
    "resnet18": "ResNet",
}


def reason(name: str) -> str | None:
    """Why a name is refused; None if it is not."""
    return next((why for pattern, why in REFUSED.items() if fnmatch(name, pattern)), None)


def test_there_are_families_to_walk() -> None:
    assert len(NAMES) > 150
    assert sum(reason(name) is None for name in NAMES) > 130


@pytest.mark.parametrize("name", NAMES)
def test_every_plain_vit_of_timm(name: str) -> None:
    options = TINY | OVERRIDES.get(name, {})
    why = reason(name)
    if why is not None:
        with pytest.raises(UnsupportedBackboneError) as info:
            load_backbone(name, **options)
        assert why in str(info.value)
        return
    torch.manual_seed(0)
    backbone = load_backbone(name, **options)
    images = random_images(backbone, 1)
    with torch.no_grad():
        outcome = play(TokenGame(backbone, ("1.attn",)), KeepAll(), images).outcome
        assert torch.allclose(outcome.logits, backbone(images), atol=1e-5)
    assert outcome.logits.shape == (1, 5)


@pytest.mark.parametrize(("name", "kind"), OTHERS.items())
def test_other_transformers_are_refused_by_type(name: str, kind: str) -> None:
    with torch.device("meta"), pytest.raises(UnsupportedBackboneError, match=f"got {kind}"):
        load_backbone(name)


@pytest.mark.parametrize("name", ["vit_intern300m_patch14_448", "vit_small_patch16_dinov3"])
def test_a_dynamic_size_can_be_switched_off(name: str) -> None:
    assert load_backbone(name, **TINY, dynamic_img_size=False).num_patches == 16
