"""ViTs of Hugging Face's `transformers` as timm models: the same weights under timm's names, with the same results.

`load_backbone` takes such a model, or a folder that its `save_pretrained` wrote. What becomes of it is a
`ConvertedViT`: timm's `VisionTransformer` of the model's sizes, which remembers them, so that it can be saved and built
again without `transformers`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isclose
from pathlib import Path
from typing import Any, cast

import torch
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from vitprune_env.errors import CheckpointError, UnsupportedBackboneError
from vitprune_env.models.converted import ConvertedViT, converted_vit

PREFIX = "hf:"  # before the path of a folder
ACTIVATIONS = {  # of transformers, and of timm
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
}
RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # of Pillow, as image processors number them
HALF = (0.5, 0.5, 0.5)
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
Names = tuple[tuple[str, str], ...]


# Names of parameters: a pattern of transformers' (version 5, then what version 4 called it) and timm's.
VIT_NAMES: Names = (
    (r"embeddings\.position_embeddings", "pos_embed"),
    (r"embeddings\.(cls_token)", r"\1"),
    (r"embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
    (r"(?:encoder\.)?layers?\.(\d+)\.", r"blocks.\1."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.(?:attention\.)?([qkv])(?:_proj|uery|ey|alue)\.", r".attn.\1."),
    (r"\.attention\.(?:o_proj|output\.dense)\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
)
DINO_NAMES: Names = (
    (r"embeddings\.register_tokens", "reg_token"),
    (r"\.layer_scale([12])\.lambda1", r".ls\1.gamma"),
    (r"\.mlp\.gate_proj\.", ".mlp.gate."),
    (r"\.mlp\.up_proj\.", ".mlp.up."),
    (r"\.mlp\.weights_in\.", ".mlp.fc1."),
    (r"\.mlp\.(?:down_proj|weights_out)\.", ".mlp.fc2."),
    *VIT_NAMES,
)
CLIP_NAMES: Names = (
    (r"embeddings\.class_embedding", "cls_token"),
    (r"embeddings\.position_embedding\.weight", "pos_embed"),
    (r"embeddings\.patch_embedding\.", "patch_embed.proj."),
    (r"^pre_layrnorm\.", "norm_pre."),
    (r"^encoder\.layers\.(\d+)\.", r"blocks.\1."),
    (r"\.layer_norm([12])\.", r".norm\1."),
    (r"\.self_attn\.([qkv])_proj\.", r".attn.\1."),
    (r"\.self_attn\.out_proj\.", ".attn.proj."),
    (r"^post_layernorm\.", "norm."),
    (r"^head\.probe", "attn_pool.latent"),
    (r"^head\.attention\.in_proj_", "attn_pool.in."),
    (r"^head\.attention\.out_proj\.", "attn_pool.proj."),
    (r"^head\.layernorm\.", "attn_pool.norm."),
    (r"^head\.mlp\.", "attn_pool.mlp."),
    (r"^(?:classifier|visual_projection)\.", "head."),
)
LEFT_OUT = r"(^|\.)(pooler|mask_token|text_model|text_projection|logit_scale|logit_bias|position_ids)\b"
TOWERS = r"^(vit|dinov2|dinov2_with_registers|vision_model)\."


@dataclass(frozen=True)
class Kind:
    """What one class of transformers has beside sizes."""

    names: Names
    pool: str = "token"
    head: str | None = None  # the module behind the pooled features; None: none, the features are the result
    mean_std: tuple[tuple[float, ...], tuple[float, ...]] = (HALF, HALF)  # unless the folder says what they are
    fixed: Mapping[str, Any] = field(default_factory=dict)  # options of `ConvertedViT`


_CLIP: dict[str, Any] = {"mean_std": CLIP, "names": CLIP_NAMES}
_DINO: dict[str, Any] = {"mean_std": IMAGENET, "names": DINO_NAMES, "fixed": {"init_values": 1.0}}
_REGISTERS: dict[str, Any] = {**_DINO, "fixed": {"init_values": 1.0, "no_embed_class": True}}
_PRE_NORM, _NO_CLASS = {"pre_norm": True}, {"class_token": False}
KINDS: dict[str, Kind] = {
    "ViTModel": Kind(VIT_NAMES),
    "ViTForImageClassification": Kind(VIT_NAMES, head="classifier"),
    "Dinov2Model": Kind(**_DINO),
    "Dinov2ForImageClassification": Kind(pool="token_and_mean", head="classifier", **_DINO),
    "Dinov2WithRegistersModel": Kind(**_REGISTERS),
    "Dinov2WithRegistersForImageClassification": Kind(pool="token_and_mean", head="classifier", **_REGISTERS),
    "CLIPVisionModel": Kind(fixed=_PRE_NORM, **_CLIP),
    "CLIPVisionModelWithProjection": Kind(head="visual_projection", fixed=_PRE_NORM, **_CLIP),
    "CLIPModel": Kind(head="visual_projection", fixed=_PRE_NORM, **_CLIP),
    # Reads the mean of the patch tokens as they leave the last block, without the last norm.
    "CLIPForImageClassification": Kind(
        pool="avg", head="classifier", fixed={**_PRE_NORM, "final_norm": False}, **_CLIP
    ),
    "SiglipVisionModel": Kind(CLIP_NAMES, "map", fixed=_NO_CLASS),
    "SiglipModel": Kind(CLIP_NAMES, "map", fixed=_NO_CLASS),
    "SiglipForImageClassification": Kind(CLIP_NAMES, "avg", "classifier", fixed={**_NO_CLASS, "fc_norm": False}),
}


def is_hugging_face(model: object) -> bool:
    """Whether an object is a model of transformers, or of a class derived from one; the package is not imported."""
    return isinstance(model, nn.Module) and any(
        kind.__module__.startswith("transformers.") for kind in type(model).__mro__
    )


def folder_of(name: str) -> Path | None:
    """The folder of a model of transformers that a name means: `hf:FOLDER`, or a path with a `config.json`."""
    if name.startswith(PREFIX):
        return Path(name.removeprefix(PREFIX))
    return Path(name) if (Path(name) / "config.json").is_file() else None


def convert(model: nn.Module, **options: Any) -> ConvertedViT:
    """The timm model that computes what a model of transformers does.

    Its logits are those of the model's head. A model without one gives the projection (`image_embeds`) or else what
    transformers calls `pooler_output`: the class token after the last norm, also for `ViTModel`, whose further layer
    `pooler` is left out, or what attention pooling reads. Weights are copied, in single precision. Dropout rates are
    not taken over.

    Args:
        model: an object of one of the classes in `KINDS`.
        **options: that replace the model's own: `img_size`, for which position embeddings are interpolated,
            `num_classes`, for a head that is new and random, `drop_path_rate` and other rates of `VisionTransformer`.

    Raises:
        UnsupportedBackboneError: for another class, or settings that timm's `VisionTransformer` does not have.
    """
    name = next((base.__name__ for base in type(model).__mro__ if base.__name__ in KINDS), None)
    if name is None:
        raise UnsupportedBackboneError(f"model: expected one of {', '.join(KINDS)}, got {type(model).__name__}")
    kind, whole = KINDS[name], cast(Any, model).config
    config = getattr(whole, "vision_config", whole)
    if (why := _refusal(config, kind)) is not None:
        raise UnsupportedBackboneError(f"model: expected a {name} that a VisionTransformer of timm can be, got {why}")
    state = _timm_state(model.state_dict(), kind)
    classes = {"num_classes": len(state["head.weight"])} if "head.weight" in state else {"has_head": False}
    if "num_classes" in options:  # another head
        classes, state = {}, {key: value for key, value in state.items() if not key.startswith("head.")}
    network = converted_vit(**{**_sizes(config, kind, state), **classes, **options})
    mean, std = kind.mean_std
    cast(Any, network).pretrained_cfg |= {"mean": mean, "std": std, "crop_pct": 1.0, "interpolation": "bicubic"}
    if "num_classes" in classes and "num_classes" not in options:
        cast(Any, network).pretrained_cfg |= {"label_names": _label_names(whole, network.num_classes)}
    heads = {key: value for key, value in network.state_dict().items() if key.startswith("head.")}
    network.load_state_dict({**heads, **checkpoint_filter_fn(dict(state), network)}, strict=True)
    return network.eval()


def read_folder(folder: Path, **options: Any) -> ConvertedViT:
    """Convert what `save_pretrained` wrote: the model, and how its image processor prepares images if it is there, too.

    Nothing is downloaded, and no code in the folder is run.

    Args:
        folder: with `config.json` and weights.
        **options: see `convert`.

    Raises:
        CheckpointError: for a folder that is not one of these.
        UnsupportedBackboneError: see `convert`; also if the package transformers is missing.
    """
    try:
        architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise CheckpointError(
            f"model: expected a folder that save_pretrained of transformers wrote, got {folder} ({error!r}); "
            "nothing is downloaded"
        ) from error
    if architecture not in KINDS:
        raise UnsupportedBackboneError(f"model: expected one of {', '.join(KINDS)}, got {architecture} in {folder}")
    try:
        import transformers  # pyright: ignore[reportMissingImports]  # an optional extra
    except ImportError as error:
        raise UnsupportedBackboneError(
            f"model: {folder} needs the package transformers ({error}); pip install vitprune_env[transformers]"
        ) from error
    try:
        model = getattr(transformers, architecture).from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"model: expected a {architecture} in {folder}, got one that fails ({error})") from error
    network = convert(model, **options)
    usual = cast(Any, network).pretrained_cfg
    usual |= _preparation(folder / "preprocessor_config.json", usual["mean"], usual["std"])
    return network


def _refusal(config: Any, kind: Kind) -> str | None:
    """Which setting timm's `VisionTransformer` does not have, as the end of a sentence; None: it has all.

    The others decide shapes of parameters, are read by `_sizes`, or have no effect in evaluation.
    """
    if config.hidden_act not in ACTIVATIONS:
        return f"hidden_act={config.hidden_act!r} (known are {', '.join(ACTIVATIONS)})"
    if (width := getattr(config, "head_dim", None)) and width * config.num_attention_heads != config.hidden_size:
        return f"head_dim={width} (the heads together must be as wide as the tokens)"
    if kind.pool == "map" and not getattr(config, "vision_use_head", True):
        return "vision_use_head=False (nothing reads the tokens in the end)"
    return None


def _label_names(config: Any, classes: int) -> list[str] | None:
    """Names of the head's classes in its order; None: it has only numbers, or names that are not told apart."""
    names = [str(getattr(config, "id2label", {}).get(number)) for number in range(classes)]
    numbered = names == [f"LABEL_{number}" for number in range(classes)]
    return None if numbered or len(set(names)) < classes else names


def _sizes(config: Any, kind: Kind, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Options of `ConvertedViT`."""
    width, swiglu = config.hidden_size, getattr(config, "use_swiglu_ffn", False)
    registers = {"reg_tokens": config.num_register_tokens} if hasattr(config, "num_register_tokens") else {}
    return {
        "img_size": _pair(config.image_size),
        "patch_size": _pair(config.patch_size),
        "in_chans": config.num_channels,
        "embed_dim": width,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "mlp_ratio": (len(state["blocks.0.mlp.fc1.weight"]) + 0.5) / width,  # timm rounds down
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "norm_eps": config.layer_norm_eps,
        "act": "silu" if swiglu else ACTIVATIONS[config.hidden_act],
        "swiglu": swiglu,
        "global_pool": kind.pool,
        **registers,
        **kind.fixed,
    }


def _pair(size: Any) -> list[int]:
    return [size, size] if isinstance(size, int) else [int(side) for side in size]


def _timm_state(state: Mapping[str, Tensor], kind: Kind) -> dict[str, Tensor]:
    """Parameters by timm's names, in timm's shapes, in single precision."""
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        name = re.sub(TOWERS, "", name)
        if re.search(LEFT_OUT, name) or (name.startswith("head.") and kind.pool != "map"):
            continue
        if not value.numel():  # the registers of a network that has none
            continue
        for pattern, ours in kind.names:
            name = re.sub(pattern, ours, name)
        found[name] = value.detach().float().cpu()
    for name in [name for name in found if ".attn.q." in name or ".mlp.gate." in name]:
        q, k, v = (name.replace(".attn.q.", f".attn.{part}.") for part in "qkv")
        if q != k:
            found[name.replace(".attn.q.", ".attn.qkv.")] = torch.cat([found.pop(part) for part in (q, k, v)])
        else:
            gate, up = found.pop(name), found.pop(name.replace(".gate.", ".up."))
            found[name.replace(".gate.", ".fc1.")] = torch.cat([gate, up])
    for part in ("weight", "bias"):
        if (rows := found.pop(f"attn_pool.in.{part}", None)) is not None:
            found[f"attn_pool.q.{part}"], found[f"attn_pool.kv.{part}"] = rows[: len(rows) // 3], rows[len(rows) // 3 :]
    if kind.head == "visual_projection":  # has no bias, timm's heads do
        found["head.bias"] = torch.zeros(len(found["head.weight"]))
    if "pos_embed" in found and found["pos_embed"].dim() == 2:  # the table of an embedding
        found["pos_embed"] = found["pos_embed"][None]
    if "cls_token" in found:
        found["cls_token"] = found["cls_token"].reshape(1, 1, -1)
    if kind.fixed.get("no_embed_class"):  # the class token's place is added once and for all, registers have none
        found["cls_token"], found["pos_embed"] = (
            found["cls_token"] + found["pos_embed"][:, :1],
            found["pos_embed"][:, 1:],
        )
    if not kind.fixed.get("final_norm", True):
        found = {name: value for name, value in found.items() if not name.startswith("norm.")}
    return found


def _preparation(path: Path, mean: Sequence[float], std: Sequence[float]) -> dict[str, Any]:
    """How images are prepared, in timm's terms, from the settings of an image processor if there are any.

    Args:
        path: of the settings.
        mean: of each channel, unless the settings say what it is.
        std: standard deviation, likewise.

    Raises:
        CheckpointError: for a file that does not hold settings.
    """
    if not path.is_file():
        return {}
    try:
        settings = dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: expected settings of an image processor, got {error!r}") from error
    if settings.get("do_normalize", True):
        mean, std = settings.get("image_mean", mean), settings.get("image_std", std)
    else:
        mean, std = [0.0] * len(mean), [1.0] * len(std)
    # Pixels come as 0 to 255 there and are scaled before they are normalised; in timm they come as 0 to 1.
    scale = 255 * settings.get("rescale_factor", 1 / 255) if settings.get("do_rescale", True) else 255.0
    if not isclose(scale, 1.0):
        mean, std = [value / scale for value in mean], [value / scale for value in std]
    found: dict[str, Any] = {"mean": tuple(mean), "std": tuple(std)}
    if settings.get("resample") in RESAMPLING:
        found["interpolation"] = RESAMPLING[settings["resample"]]
    size, crop = (settings.get(name) for name in ("size", "crop_size"))
    if isinstance(size, dict) and "shortest_edge" in size and isinstance(crop, dict) and settings.get("do_center_crop"):
        found["crop_pct"] = crop["height"] / size["shortest_edge"]
    elif isinstance(size, dict) and "height" in size:  # both sides at once, whatever the shape
        found["crop_mode"] = "squash"
    return found
