"""`vit_digits`, the built-in network: a small timm ViT, trained on the digits task and shipped with its weights."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.layers.hybrid_embed import HybridEmbed
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_hybrid import ConvStem

from vitprune_env.data.digits import DigitsConfig
from vitprune_env.errors import CheckpointError

WEIGHTS = Path(__file__).parent / "weights"


@dataclass(frozen=True)
class VitPreset:
    """All sizes of a small ViT behind a stem of two 3x3 convolutions of stride 2 (patches of 4x4 pixels)."""

    image_size: int  # height and width, in pixels
    in_chans: int
    num_classes: int
    stem_channels: int  # between the two convolutions
    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float
    sites: tuple[int, ...]  # where to prune by default: after these blocks, 1-based


VIT_DIGITS = VitPreset(
    image_size=40,
    in_chans=3,
    num_classes=10,
    stem_channels=16,
    embed_dim=48,
    depth=8,
    num_heads=3,
    mlp_ratio=4.0,
    sites=(1, 3, 5),
)


def create_vit_digits(preset: VitPreset = VIT_DIGITS, seed: int = 0) -> VisionTransformer:
    """The architecture of `vit_digits` with fresh weights: a plain timm ViT with class token.

    Args:
        preset: its sizes.
        seed: of the initial weights; the global random state does not change.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        stem = ConvStem(
            in_chans=preset.in_chans,
            depth=2,
            channels=(preset.stem_channels, preset.embed_dim),
            stride=(2, 2),
            norm_layer="layernorm2d",  # pyright: ignore[reportArgumentType]  # timm resolves names here
            act_layer=torch.nn.GELU,
        )
        model = VisionTransformer(
            img_size=preset.image_size,
            patch_size=1,  # of the stem's feature map
            in_chans=preset.in_chans,
            num_classes=preset.num_classes,
            embed_dim=preset.embed_dim,
            depth=preset.depth,
            num_heads=preset.num_heads,
            mlp_ratio=preset.mlp_ratio,
            embed_layer=partial(HybridEmbed, backbone=stem, proj=False),
        )
    pixels = DigitsConfig()
    cast(Any, model).pretrained_cfg = {  # how to prepare image files, in timm's own terms
        "input_size": (preset.in_chans, preset.image_size, preset.image_size),
        "mean": (pixels.mean,) * preset.in_chans,
        "std": (pixels.std,) * preset.in_chans,
        "crop_pct": 1.0,
    }
    return model


def load_vit_digits(path: Path = WEIGHTS / "vit_digits.safetensors") -> VisionTransformer:
    """The built-in backbone with its trained weights, in evaluation mode.

    Args:
        path: safetensors file with exactly the parameters of `VIT_DIGITS`; by default the one that is shipped.

    Raises:
        CheckpointError: if the file cannot be read or holds other parameters.
    """
    model = create_vit_digits()
    try:
        model.load_state_dict(load_file(path), strict=True)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(
            f"path: expected the weights of vit_digits as safetensors, got {path}: {error}"
        ) from error
    return model.eval()
