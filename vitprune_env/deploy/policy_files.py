"""Policies on disk, alone or with the network that they prune: one safetensors file, whose header is JSON.

The header holds `{"format": 2, "kind": "policy", "versions": {...}, "policy": {...}, "backbone": {...}}`, see
`descriptions`, and beside a network `"sites": [...]`, where the policy acts in it. The tensors are called `policy.*`
and `backbone.*`. `PrunedViT.save_pretrained` writes the same description and the same tensors as a folder. Nothing is
unpickled, and no code that a file names is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitprune_env.deploy import format_1
from vitprune_env.deploy.descriptions import (
    DO_NOT_FIT,
    build_backbone,
    build_policy,
    describe_backbone,
    describe_policy,
)
from vitprune_env.engine.backbone import Backbone
from vitprune_env.errors import CheckpointError
from vitprune_env.files import PathLike, read_file, write_file
from vitprune_env.policy import Policy

FORMAT, KIND = 2, "policy"


def save_policy(policy: Policy, path: PathLike, backbone: Backbone | None = None) -> Path:
    """Write a policy, with all that is needed to build it again, to one file, atomically.

    Args:
        policy: learnt, fitted or heuristic; of this package, or of a class given to `register_policy`.
        path: file name, customarily ending in `.safetensors`.
        backbone: the network to save with it, which `load_pruned` brings back; None: the policy alone.

    Returns:
        The path.

    Raises:
        CheckpointError: for a policy or network that could not be loaded again: not registered, with settings that
            JSON cannot hold, or with parts that its settings do not build.
        StorageError: if the file cannot be written; an old one stays as it was.
    """
    description, tensors = describe(policy, backbone)
    return write_file(Path(path), tensors, {"format": FORMAT, "kind": KIND, **description})


def load_policy(path: PathLike, device: str | torch.device = "cpu") -> Any:
    """Read a policy that `save_policy` wrote; of a file with a network, the policy alone.

    Args:
        path: the file; those of version 0.1 are read, too.
        device: where to put a policy that is a module.

    Returns:
        The policy, in evaluation mode if it is a module. Its class is known to the file alone, hence the type `Any`.

    Raises:
        CheckpointError: if the file is missing, damaged or something else, or its policy is not registered.
    """
    if Path(path).is_dir():
        raise CheckpointError(f"{path}: expected a policy file, got a folder; load_pruned reads those of PrunedViT")
    description, tensors = read_policy_file(Path(path))
    description.pop("backbone", None)
    own = {name: value for name, value in tensors.items() if not name.startswith("backbone.")}
    policy, _ = build(description, own, path)
    return policy.to(device) if isinstance(policy, nn.Module) else policy


def read_policy_file(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Description and tensors of a policy file of any format, in the terms of the present one.

    Raises:
        CheckpointError: if the file is missing, damaged or something else.
    """
    tensors, header = read_file(path, KIND, {FORMAT: (KIND,), 1: format_1.KINDS})
    try:
        return format_1.upgrade_file(header, tensors) if header["format"] == 1 else (header, tensors)
    except DO_NOT_FIT as error:
        raise _misfit(path, error) from error


def describe(policy: Policy, backbone: Backbone | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Description and tensors of a policy and its network.

    Raises:
        CheckpointError: for what could not be built again from them.
    """
    if backbone is not None and not isinstance(backbone, Backbone):
        raise CheckpointError(f"backbone: expected a Backbone, got {backbone!r}")
    parts: dict[str, Any] = {"policy": policy} if backbone is None else {"policy": policy, "backbone": backbone}
    tensors = {
        f"{part}.{name}": value
        for part, module in parts.items()
        if isinstance(module, nn.Module)
        for name, value in module.state_dict().items()
    }
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{name}: expected a state of tensors alone, got a {type(value).__name__}")
    description: dict[str, Any] = {"policy": describe_policy(policy)}
    if backbone is not None:
        sites = [site.label for site in backbone.sites_for(policy)]
        description |= {"backbone": describe_backbone(backbone), "sites": sites}
    return description, tensors


def build(
    description: Mapping[str, Any], tensors: Mapping[str, Tensor], origin: PathLike
) -> tuple[Policy, Backbone | None]:
    """Policy and network, in evaluation mode, from what `describe` returned.

    Args:
        description: of the policy and, if there is one, of the network.
        tensors: all of them belong to one of the two.
        origin: where they come from, for error messages.

    Raises:
        CheckpointError: if they do not fit together.
    """
    try:
        policy = build_policy(description["policy"])
        backbone = build_backbone(description["backbone"]) if "backbone" in description else None
        modules = {"policy": policy, "backbone": backbone}
        whole = nn.ModuleDict({name: part for name, part in modules.items() if isinstance(part, nn.Module)})
        whole.load_state_dict(dict(tensors))
    except DO_NOT_FIT as error:
        raise _misfit(origin, error) from error
    whole.eval()
    return policy, backbone


def _misfit(origin: PathLike, error: Exception) -> CheckpointError:
    """Errors that name what does not fit keep their sentence, all others get one."""
    if isinstance(error, CheckpointError):
        return CheckpointError(f"{origin}: {error}")
    first = " ".join(map(str.strip, str(error).splitlines()[:2]))  # torch lists every tensor that does not fit
    return CheckpointError(
        f"{origin}: a policy file whose content does not fit together ({type(error).__name__}: {first[:300]})"
    )
