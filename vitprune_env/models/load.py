"""Backbones by name; the built-in one is trained on the digits task and ships with its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast
from zipfile import BadZipFile

import numpy as np
import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.layers.hybrid_embed import HybridEmbed
from timm.models import load_state_dict
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from timm.models.vision_transformer_hybrid import ConvStem
from torch import Tensor, nn

from vitprune_env.data.digits import DigitsConfig
from vitprune_env.engine.backbone import Backbone
from vitprune_env.errors import CheckpointError, UnknownNameError
from vitprune_env.models.lv_vit import LvVit, filter_checkpoint
from vitprune_env.models.lv_vit import default_cfgs as lv_vit_cfgs
from vitprune_env.types import Site

NOT_WEIGHTS = (OSError, EOFError, BadZipFile, SafetensorError, UnpicklingError)
OTHER_WEIGHTS = (RuntimeError, ValueError, KeyError, AttributeError, TypeError)
WEIGHTS = Path(__file__).parent.parent / "weights"


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
    cast(Any, model).pretrained_cfg = {  # how image files are to be prepared, as timm's own models say it
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
        model: `"vit_digits"` (built in, with its trained weights), the name of any plain ViT of timm, `"lv_vit_s"`, or
            a timm model.
        pretrained: for a timm name, whether timm downloads its weights.
        checkpoint: local weights to load instead: `.npz` (AugReg, JAX layout), `.safetensors` or a torch file, bare or
            under `"model"` or `"state_dict"`. Patch size and position embeddings made for another image size are
            interpolated as timm does it.
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
    backbone = Backbone(network, name, sites)
    if checkpoint is not None:
        _load_weights(backbone.model, Path(checkpoint))
    return backbone.eval()


def _create_timm(name: str, pretrained: bool, options: Mapping[str, Any]) -> nn.Module:
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        known = [known for module in ("vision_transformer", "deit") for known in timm.list_models(module=module)]
        raise UnknownNameError("model", name, ["vit_digits", *lv_vit_cfgs, *known])
    if tag and not timm.is_model_pretrained(name):
        raise UnknownNameError("weights", name, timm.list_pretrained(f"{architecture}.*"))
    if pretrained and not timm.is_model_pretrained(name):
        raise ValueError(f"pretrained: nobody publishes weights of {name} through timm; pass checkpoint=<local file>")
    try:
        return timm.create_model(name, pretrained=pretrained, **options)
    except OSError as error:  # no network, no cache
        raise ConnectionError(
            f"pretrained: could not download the weights of {name} ({error}); "
            "pass checkpoint=<local file>, or pretrained=False for random weights"
        ) from error


def _load_weights(network: VisionTransformer, path: Path) -> None:
    """Load a local weight file strictly.

    Raises:
        CheckpointError: for a file that is missing, not a weight file, or of another model.
    """
    try:
        if path.suffix == ".npz":
            _load_augreg(network, path)
        else:
            _load_state(network, load_state_dict(str(path), weights_only=True))
    except CheckpointError:
        raise
    except (*NOT_WEIGHTS, *OTHER_WEIGHTS) as error:
        raise CheckpointError(f"checkpoint: expected weights of this model, got {path}: {error}") from error


def _load_state(network: VisionTransformer, state: Mapping[str, Tensor]) -> None:
    """Load a state dict, fitted to the network's image and patch size by timm."""
    if isinstance(network, LvVit):
        fitted = filter_checkpoint(state, network)
    else:
        fitted = checkpoint_filter_fn(dict(state), network, adapt_layer_scale=True)
    if "head.weight" in fitted:
        _check_head(network, len(fitted["head.weight"]))
    network.load_state_dict(fitted, strict=True)


def _load_augreg(network: VisionTransformer, path: Path) -> None:
    """Load a JAX checkpoint through timm, which leaves a head or blocks that do not fit as they are: check first."""
    with np.load(path) as content:
        heads = [content[name].shape[-1] for name in content.files if name.endswith("head/bias")]
        blocks = {name.partition("encoderblock_")[2].partition("/")[0] for name in content.files} - {""}
    _check_head(network, heads[0] if heads else 0)
    if blocks and len(blocks) != len(network.blocks):
        raise CheckpointError(f"checkpoint: the file has {len(blocks)} blocks, the model {len(network.blocks)}")
    network.load_pretrained(str(path))


def _check_head(network: VisionTransformer, classes: int) -> None:
    if classes != network.num_classes:
        raise CheckpointError(
            f"checkpoint: the file has a head of {classes} classes, the model one of {network.num_classes}; "
            "expected the same (num_classes=...)"
        )
