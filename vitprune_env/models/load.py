"""Backbones by name, from a timm module or from a builder of one's own, and weight files for any of them.

A weight file that `save_backbone` writes holds timm's names and tensors, and says in its metadata what it belongs to:
architecture, image size, number of classes and, where they are known, the names of the classes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast
from zipfile import BadZipFile

import numpy as np
import timm
import torch
from safetensors import SafetensorError
from timm.models import load_state_dict
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vitprune_env.engine.backbone import Backbone
from vitprune_env.errors import CheckpointError, UnknownNameError
from vitprune_env.files import PathLike, checksum, encode, read_tensors, replace_file
from vitprune_env.models.converted import ARCHITECTURE, OPTIONS, ConvertedViT
from vitprune_env.models.hugging_face import convert, folder_of, is_hugging_face, read_folder
from vitprune_env.models.lv_vit import LvVit, filter_checkpoint
from vitprune_env.models.lv_vit import default_cfgs as lv_vit_cfgs
from vitprune_env.models.vit_digits import VIT_DIGITS, load_vit_digits
from vitprune_env.types import Site

NOT_WEIGHTS = (OSError, EOFError, BadZipFile, SafetensorError, UnpicklingError)
OTHER_WEIGHTS = (RuntimeError, ValueError, KeyError, AttributeError, TypeError)
NOT_BUILT = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AssertionError, ArithmeticError)
ABOUT: dict[str, Callable[[Any], bool]] = {  # JSON values in the metadata of a weight file
    "img_size": lambda value: isinstance(value, list) and [type(side) for side in value] == [int, int],
    "num_classes": lambda value: isinstance(value, int),
    "class_names": lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
    "global_pool": lambda value: isinstance(value, str),
    "options": lambda value: isinstance(value, dict) and all(k in OPTIONS and OPTIONS[k](v) for k, v in value.items()),
}
HEADS = ("head.", "head_dist.")  # what the names of a head's parameters begin with
Builder = Callable[[], nn.Module]
_BUILDERS: dict[str, Builder] = {
    "vit_digits": lambda: Backbone(load_vit_digits(), "vit_digits", VIT_DIGITS.sites),
}


def register_backbone(name: str, builder: Builder) -> None:
    """Give a network of one's own a name for `load_backbone`, `save_policy` and `PrunedViT.save_pretrained`.

    A saved file holds the name and the weights of such a network; whoever loads it registers the same name first.

    Args:
        name: stays the same when the builder is renamed or moved; not a name of timm.
        builder: called without arguments; returns the network, as a timm module or as a `Backbone` with default sites.

    Raises:
        TypeError: for a builder that cannot be called, or a name that is not a string.
        ValueError: for a name that timm or this package uses.
    """
    if not isinstance(name, str) or not name:
        raise TypeError(f"name: expected a string, got {name!r}")
    if not callable(builder):
        raise TypeError(f"builder: expected a function that returns a network, got {builder!r}")
    if name == "vit_digits" or is_timm_name(name):
        raise ValueError(f"name: expected one that is free, got {name!r}, a name of timm or of this package")
    _BUILDERS[name] = builder


def is_registered(name: str) -> bool:
    """Whether `register_backbone` has been given this name, or it is built in."""
    return name in _BUILDERS


def is_timm_name(name: str) -> bool:
    """Whether timm has an architecture of this name; a tag of pretrained weights may follow it after a dot."""
    return timm.is_model(name.partition(".")[0])


def load_backbone(
    model: str | nn.Module = "vit_digits",
    pretrained: bool = False,
    checkpoint: str | Path | None = None,
    sites: Sequence[int | str | Site] | None = None,
    class_names: Sequence[str] | None = None,
    new_head: bool = False,
    **timm_options: Any,
) -> Backbone:
    """Get a network to prune, in evaluation mode.

    Args:
        model: `"vit_digits"` (built in, with its trained weights), the name of any plain ViT of timm, `"lv_vit_s"`, a
            name given to `register_backbone`, or a timm model. Also a model of transformers (`ViTModel`, `Dinov2Model`,
            the visual towers of CLIP and SigLIP, ..., see `hugging_face.convert`), or a folder that its
            `save_pretrained` wrote, as `"hf:FOLDER"` or by its path; nothing is downloaded.
        pretrained: for a timm name, whether timm downloads its weights.
        checkpoint: local weights to load instead: `.npz` (AugReg, JAX layout), `.safetensors` or a torch file, bare or
            under `"model"` or `"state_dict"`. Patch size and position embeddings made for another image size are
            interpolated as timm does it. Files of `save_backbone` bring image size, number and names of their classes.
        sites: default pruning sites; None: the preset's, or after every quarter of the blocks.
        class_names: names of the head's classes in its order; None: those of the file or of the model of
            transformers, if it has any.
        new_head: whether the network keeps its random head, for classes that the file does not know; a head in the file
            is left out, and one that is missing is not missed.
        **timm_options: passed to `timm.create_model`, such as `num_classes` or `img_size`; for a model of transformers
            what replaces its own settings.

    Raises:
        UnknownNameError: for an unknown name; the message gives the nearest ones.
        TypeError: for something that is neither a name nor a module.
        ValueError: for `pretrained` or options of timm with a model that does not take them, or class names that do
            not fit the head.
        UnsupportedBackboneError: for a model that the game cannot walk.
        CheckpointError: for weights that cannot be read or do not fit.
        ConnectionError: if `pretrained` weights cannot be downloaded.
    """
    about = {} if checkpoint is None else about_weights(checkpoint)
    if new_head:
        about = _without_head(about)
    folder = None if not isinstance(model, str) or model in _BUILDERS or is_timm_name(model) else folder_of(model)
    if folder is not None or is_hugging_face(model):
        if pretrained:
            raise ValueError(
                f"pretrained: expected False for a model that brings its weights ({model!s:.80}), got True"
            )
        network = (
            convert(cast(nn.Module, model), **timm_options) if folder is None else read_folder(folder, **timm_options)
        )
        name = ARCHITECTURE
        class_names = cast(Any, network).pretrained_cfg.get("label_names") if class_names is None else class_names
    elif isinstance(model, nn.Module):
        if pretrained or timm_options:
            raise ValueError("model: expected a name beside pretrained or timm options, got a module")
        network, name = model, ARCHITECTURE if isinstance(model, ConvertedViT) else type(model).__name__
    elif model in _BUILDERS:
        if timm_options:
            given = ", ".join(timm_options)
            raise ValueError(
                f"model: expected a name of timm beside {given}; "
                f"{model} is built in or registered and takes no timm options"
            )
        network, name = _BUILDERS[model](), model
        if isinstance(network, Backbone):
            sites = network.default_sites if sites is None else sites
            class_names = network.class_names if class_names is None else class_names
            network = network.model
    elif not isinstance(model, str):
        raise TypeError(f"model: expected a name or a timm model, got {model!r}")
    else:
        sizes = {key: about[key] for key in ("img_size", "num_classes") if key in about}
        if model == ARCHITECTURE and "options" in about:
            sizes |= {**about["options"], "global_pool": about["global_pool"]}
        network, name = _create_timm(model, pretrained, {**sizes, **timm_options}), model
    backbone = Backbone(network, name, sites)
    if checkpoint is not None:
        _load_weights(backbone, Path(checkpoint), new_head)
    backbone.class_names = about.get("class_names") if class_names is None else class_names
    return backbone.eval()


def save_backbone(backbone: Backbone, path: PathLike, dtype: torch.dtype | None = None) -> Path:
    """Write a network's weights, for `load_backbone(backbone.name, checkpoint=path)`.

    Args:
        backbone: the network; its class names are written, too.
        path: file name, which ends in `.safetensors`.
        dtype: of the weights in the file, such as `torch.float16`; None: as they are.

    Returns:
        The path.

    Raises:
        ValueError: for another ending, which `load_backbone` would read as another format.
        StorageError: if the file cannot be written; the old one is untouched.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"path: expected a file name that ends in .safetensors, got {path}")
    state: dict[str, Tensor] = backbone.model.state_dict()
    if dtype is not None:
        state = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}
    about = {"img_size": backbone.image_size, "num_classes": backbone.num_classes, "class_names": backbone.class_names}
    if backbone.name == ARCHITECTURE:
        about |= {"options": backbone.model.options, "global_pool": backbone.model.global_pool}
    metadata = {name: json.dumps(value) for name, value in about.items() if value is not None}
    return replace_file(path, encode(state, {"architecture": backbone.name, **metadata}))


def weights_digest(backbone: Backbone) -> str:
    """A short name for the weights of a network but its head, which a recipe may replace."""
    state: dict[str, Tensor] = backbone.model.state_dict()
    return checksum({name: value.cpu() for name, value in state.items() if not name.startswith(HEADS)}, {})[:16]


def about_weights(path: PathLike) -> dict[str, Any]:
    """What an undamaged file of `save_backbone` says of its weights; what other files say in other ways is left out.

    Returns:
        `architecture`, `img_size` (height, width), `num_classes` and, where they are known, `class_names`; of a
        `converted_vit` also `options` and `global_pool`.

    Raises:
        CheckpointError: for a `.safetensors` file that is damaged or cannot be read.
    """
    if Path(path).suffix != ".safetensors":
        return {}
    if not Path(path).is_file():
        raise CheckpointError(f"checkpoint: expected a weight file, got {path}, where there is none")
    try:
        metadata = read_tensors(Path(path))[1]  # with its tensors, which the checksum is of
    except CheckpointError as error:
        raise CheckpointError(f"checkpoint: {error}") from error
    found: dict[str, Any] = {name: metadata[name] for name in ("architecture",) if name in metadata}
    for name, fits in ABOUT.items():
        try:
            value = json.loads(metadata.get(name, "null"))
        except ValueError:
            continue
        if fits(value):
            found[name] = value
    return found


def _without_head(about: Mapping[str, Any]) -> dict[str, Any]:
    """What is left of `about_weights` for a network with another head: the sizes of one that has no name of its own."""
    if "options" not in about:
        return {}
    options = {name: value for name, value in about["options"].items() if name != "has_head"}
    return {"img_size": about["img_size"], "global_pool": about["global_pool"], "options": options}


def _create_timm(name: str, pretrained: bool, options: Mapping[str, Any]) -> nn.Module:
    architecture, _, tag = name.partition(".")
    if not is_timm_name(name):
        modules = ("vision_transformer", "deit", "eva")
        known = [known for module in modules for known in timm.list_models(module=module)]
        raise UnknownNameError("model", name, [*_BUILDERS, *lv_vit_cfgs, *known])
    if tag and not timm.is_model_pretrained(name):
        raise UnknownNameError("weights", name, timm.list_pretrained(f"{architecture}.*"))
    if pretrained and not timm.is_model_pretrained(name):
        raise ValueError(
            f"pretrained: expected a model whose weights timm has, got {name}; pass checkpoint=<local file>"
        )
    try:
        return timm.create_model(name, pretrained=pretrained, **options)
    except OSError as error:  # no network, no cache
        raise ConnectionError(
            f"pretrained: could not download the weights of {name} ({error}); "
            "pass checkpoint=<local file>, or pretrained=False for random weights"
        ) from error
    except NOT_BUILT as error:
        given = ", ".join(f"{key}={value!r}" for key, value in options.items())
        raise ValueError(
            f"model: expected options that {name} can be built with, got {given or 'none'} ({error})"
        ) from error


def _load_weights(backbone: Backbone, path: Path, new_head: bool) -> None:
    """Load a local weight file, which `about_weights` has checked, strictly, with its head or without.

    Raises:
        CheckpointError: for a file that is missing, not a weight file, or of another model.
    """
    try:
        if path.suffix == ".npz":
            _load_augreg(backbone.model, path, new_head)
        else:
            _load_state(backbone, load_state_dict(str(path), weights_only=True), new_head)
    except CheckpointError as error:
        said = str(error)
        raise CheckpointError(said if said.startswith("checkpoint: ") else f"checkpoint: {said}") from error
    except (*NOT_WEIGHTS, *OTHER_WEIGHTS) as error:
        raise CheckpointError(f"checkpoint: expected weights of this model, got {path}: {error}") from error


def _load_state(backbone: Backbone, state: Mapping[str, Tensor], new_head: bool) -> None:
    """Load a state dict, fitted to the network's image and patch size by timm."""
    network = backbone.model
    is_lv_vit = isinstance(network, LvVit)
    fitted = filter_checkpoint(state, network) if is_lv_vit else backbone.family.fitted(network, state)
    if new_head:
        heads = {name: value for name, value in network.state_dict().items() if name.startswith(HEADS)}
        fitted = {name: value for name, value in fitted.items() if not name.startswith(HEADS)} | heads
    elif "head.weight" in fitted:
        _check_head(network, len(fitted["head.weight"]))
    network.load_state_dict(fitted, strict=True)


def _load_augreg(network: VisionTransformer, path: Path, new_head: bool) -> None:
    """Load a JAX checkpoint through timm, which silently skips a head or blocks that do not fit: check them first."""
    with np.load(path) as content:
        heads = [content[name].shape[-1] for name in content.files if name.endswith("head/bias")]
        blocks = {name.partition("encoderblock_")[2].partition("/")[0] for name in content.files} - {""}
    if not new_head:
        _check_head(network, heads[0] if heads else 0)
    if blocks and len(blocks) != len(network.blocks):
        raise CheckpointError(f"checkpoint: expected {len(network.blocks)} blocks, as the model has, got {len(blocks)}")
    network.load_pretrained(str(path))


def _check_head(network: VisionTransformer, classes: int) -> None:
    if classes != network.num_classes:
        raise CheckpointError(
            f"checkpoint: expected one for the model; the file has a head of {classes} classes, the model one of "
            f"{network.num_classes}; num_classes={classes} gives it as many"
        )
