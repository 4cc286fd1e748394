"""Backbones by name; the built-in one is trained on the digits task and ships with its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.layers.hybrid_embed import HybridEmbed
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_hybrid import ConvStem
from torch import Tensor, nn

from vitprune_env.backbone import Backbone
from vitprune_env.errors import CheckpointError, UnknownNameError
from vitprune_env.types import Site

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
        seed: of the initial weights; the global random state is left alone.
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
        return VisionTransformer(
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


def load_vit_digits(path: Path = WEIGHTS / "vit_digits.safetensors") -> VisionTransformer:
    """The built-in backbone with its trained weights, in evaluation mode.

    Args:
        path: safetensors file with exactly the parameters of `VIT_DIGITS`; by default the one that is shipped.

    Raises:
        CheckpointError: If the file cannot be read or holds other parameters.
    """
    model = create_vit_digits()
    try:
        model.load_state_dict(load_file(path), strict=True)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(
            f"path: expected the weights of vit_digits as safetensors, got {path}: {error}"
        ) from error
    return model.eval()


def load_backbone(
    model: str | nn.Module = "vit_digits",
    pretrained: bool = False,
    checkpoint: str | Path | None = None,
    sites: Sequence[int | str | Site] | None = None,
    **timm_options: Any,
) -> Backbone:
    """Get a network to prune, in evaluation mode.

    Args:
        model: `"vit_digits"` (built in, with its trained weights), the name of any plain ViT of timm, or a timm model.
        pretrained: for a timm name, whether timm downloads its weights.
        checkpoint: local weights to load instead: `.safetensors`, `.npz` (AugReg) or a torch file, bare or under
            `"model"` or `"state_dict"`.
        sites: default pruning sites; None: the preset's, or after every quarter of the blocks.
        **timm_options: passed to `timm.create_model`, such as `num_classes` or `img_size`.

    Raises:
        UnknownNameError: for a name that nobody knows, with the nearest ones.
        UnsupportedBackboneError: for a model that the game cannot walk.
        CheckpointError: for weights that cannot be read or do not fit.
        ConnectionError: if `pretrained` weights cannot be downloaded.
    """
    if isinstance(model, nn.Module):
        if pretrained or timm_options:
            raise ValueError("model: expected a name beside pretrained or timm options, got a module")
        network, name = model, type(model).__name__
    elif model == "vit_digits":
        if timm_options:
            raise ValueError(f"{sorted(timm_options)}: vit_digits is built in and takes no timm options")
        network, name, sites = load_vit_digits(), model, sites or VIT_DIGITS.sites
    else:
        network, name = _create_timm(model, pretrained, timm_options), model
    if checkpoint is not None:
        _load_weights(network, Path(checkpoint))
    return Backbone(network, name, sites).eval()


def _create_timm(name: str, pretrained: bool, options: Mapping[str, Any]) -> nn.Module:
    if not timm.is_model(name.partition(".")[0]):
        known = timm.list_models(module="vision_transformer") + timm.list_models(module="deit")
        raise UnknownNameError("model", name, ["vit_digits", *known])
    try:
        return timm.create_model(name, pretrained=pretrained, **options)
    except OSError as error:  # no network, no cache
        raise ConnectionError(
            f"pretrained: could not download the weights of {name} ({error}); "
            "pass checkpoint=<local file>, or pretrained=False for random weights"
        ) from error


def _load_weights(network: nn.Module, path: Path) -> None:
    """Load a local weight file strictly."""
    try:
        if path.suffix == ".npz":
            cast(VisionTransformer, network).load_pretrained(str(path))
            return
        network.load_state_dict(_read_weights(path), strict=True)
    except (OSError, SafetensorError, RuntimeError, ValueError, KeyError, EOFError) as error:
        raise CheckpointError(f"checkpoint: expected weights of this model, got {path}: {error}") from error


def _read_weights(path: Path) -> Mapping[str, Tensor]:
    """A state dict from safetensors or from a torch file, which may hold it under "model" or "state_dict"."""
    if path.suffix == ".safetensors":
        return load_file(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises UnpicklingError of several kinds for anything that is not weights
        raise CheckpointError(f"checkpoint: {path} is not a plain weight file: {error}") from error
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            return content[key]
    return content
