"""A pruned model on disk: `config.json` says how to build it, `model.safetensors` holds what it has learnt.

Nothing is pickled, and nothing but classes of this package is ever built from what a file says.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vitprune_env.engine.backbone import Backbone
from vitprune_env.errors import CheckpointError
from vitprune_env.models.load import load_backbone
from vitprune_env.policy import Policy

FORMAT = 1
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
OWN_CLASS = re.compile(r"vitprune_env(\.[a-z_]+)+:[A-Z]\w*")

MODEL_CARD = """---
library_name: vitprune_env
pipeline_tag: image-classification
tags: [vision-transformer, token-pruning]
---

# {backbone}, pruned by {policy}

A Vision Transformer that drops tokens after {sites}; pruned tokens are gone, later blocks do not compute on them.

```python
from vitprune_env import PrunedViT

model = PrunedViT.from_pretrained("this folder or repository").eval()
logits = model(images)  # [B, {channels}, {height}, {width}], normalised
```
"""


def write_folder(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], card: str) -> None:
    """Write the files of a model."""
    folder.mkdir(parents=True, exist_ok=True)
    flat = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    save_file(flat, folder / WEIGHTS)
    # Under a key of its own: the hub's mixin would take top-level keys for arguments of the model.
    (folder / CONFIG).write_text(json.dumps({"vitprune_env": {"format": FORMAT, **config}}, indent=2) + "\n")
    (folder / CARD).write_text(card)


def read_folder(config_path: Path, weights_path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the files of a model.

    Raises:
        CheckpointError: if they are missing, damaged, or something else.
    """
    try:
        config = json.loads(config_path.read_text())["vitprune_env"]
        tensors = load_file(weights_path)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(
            f"{config_path.parent}: expected {CONFIG} and {WEIGHTS} as PrunedViT.save_pretrained writes them, "
            f"got {error!r}"
        ) from error
    if config.get("format") != FORMAT:
        raise CheckpointError(f"{config_path}: expected format {FORMAT}, got {config.get('format')!r}")
    return config, tensors


def describe_backbone(backbone: Backbone) -> dict[str, Any]:
    """What `build_backbone` needs.

    Raises:
        CheckpointError: if nobody could build this network from its name.
    """
    options = {} if backbone.name == "vit_digits" else {
        "img_size": list(backbone.image_size),
        "in_chans": backbone.in_chans,
        "num_classes": backbone.num_classes,
        "global_pool": backbone.model.global_pool,
    }  # fmt: skip
    sites = [site.label for site in backbone.default_sites]
    description = {"name": backbone.name, "options": options, "sites": sites}
    shapes = {name: value.shape for name, value in backbone.state_dict().items()}
    try:
        # The built-in network comes with its weights and is small; of any other the shapes are enough.
        device = "cpu" if backbone.name == "vit_digits" else "meta"
        again = build_backbone(description, device).state_dict()
        fits = shapes == {name: value.shape for name, value in again.items()}
    except (ValueError, RuntimeError, TypeError) as error:
        raise CheckpointError(f"backbone: {backbone.name!r} cannot be built again by its name ({error})") from error
    if not fits:
        raise CheckpointError(
            f"backbone: a fresh {backbone.name!r} has other parameters than this one; only networks that "
            "load_backbone makes from a name, with other classes or image sizes at most, can be saved"
        )
    return description


def build_backbone(description: Mapping[str, Any], device: str = "cpu") -> Backbone:
    """A network with the sizes that `describe_backbone` wrote down, its weights yet to be loaded."""
    with torch.device(device):
        return load_backbone(description["name"], sites=description["sites"], **description["options"])


def describe_policy(policy: Policy) -> dict[str, Any]:
    """The class of a policy and its settings; tensors of a policy that is a module are saved elsewhere.

    A policy says its settings by a method `config()` that returns JSON values for its constructor (or its class
    method `from_config`), or by being a dataclass.

    Raises:
        CheckpointError: for a policy of somebody else's package, or settings that JSON cannot hold.
    """
    kind = type(policy)
    path = f"{kind.__module__}:{kind.__qualname__}"
    _own_class(path)
    if hasattr(policy, "config"):
        settings = policy.config()  # pyright: ignore[reportAttributeAccessIssue]
    elif is_dataclass(policy):
        settings = {field.name: getattr(policy, field.name) for field in fields(policy) if field.init}
    else:
        settings = {}
    try:
        return {"class": path, "config": json.loads(json.dumps(settings))}
    except TypeError as error:
        raise CheckpointError(f"policy: {path} has settings that JSON cannot hold ({error})") from error


def build_policy(description: Mapping[str, Any]) -> Policy:
    """The policy that `describe_policy` wrote down, its tensors yet to be loaded.

    Raises:
        CheckpointError: for a class that is not a policy of this package, or settings that it does not take.
    """
    kind = _own_class(description["class"])
    try:
        policy = getattr(kind, "from_config", kind)(**description["config"])
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"policy: {description['class']} does not take its settings ({error})") from error
    if not isinstance(policy, Policy):
        raise CheckpointError(f"policy: {description['class']} is not a policy")
    return policy


def _own_class(path: str) -> type:
    """Find a class of this package by `module:name`.

    Raises:
        CheckpointError: for any other package, and for names that lead out of this one.
    """
    if not isinstance(path, str) or not OWN_CLASS.fullmatch(path):
        raise CheckpointError(
            f"policy: expected a class of vitprune_env, got {path!r}; others are neither saved nor built"
        )
    module, _, name = path.partition(":")
    try:
        found = getattr(import_module(module), name, None)
    except ImportError:
        found = None
    # A class that a module merely imported could come from anywhere.
    if not isinstance(found, type) or found.__module__ != module or not hasattr(found, "decide"):
        raise CheckpointError(f"policy: vitprune_env has no policy class {path!r}")
    return found
