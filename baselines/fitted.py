"""Fitted policies on disk: one safetensors file each, with their class and settings in a JSON header.

Nothing is unpickled, and nothing but policies of this package is built from what a file says.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from ..deploy.pretrained import build_policy, describe_policy
from ..errors import CheckpointError
from ..files import PathLike, read_file, write_file
from ..policy import Policy

KIND = "fitted policy"


def save_fitted(policy: Policy, path: PathLike) -> Path:
    """Write a policy that is a module, with all that is needed to rebuild it, to one file.

    Args:
        policy: what to save.
        path: file name, customarily ending in `.safetensors`.

    Returns:
        The path.

    Raises:
        TypeError: for a policy without parameters.
        CheckpointError: for a policy of somebody else's package.
    """
    if not isinstance(policy, nn.Module):
        raise TypeError(f"policy: expected one with parameters (a Module), got {type(policy).__name__}")
    return write_file(Path(path), policy.state_dict(), {"kind": KIND, "policy": describe_policy(policy)})


def load_fitted(path: PathLike, device: str | torch.device = "cpu") -> Policy:
    """Read a policy that `save_fitted` wrote.

    Raises:
        CheckpointError: if the file is missing, damaged, or something else.
    """
    tensors, header = read_file(Path(path), KIND)
    try:
        policy = build_policy(header["policy"])
        if not isinstance(policy, nn.Module):
            raise TypeError(f"{type(policy).__name__} has no parameters")
        policy.load_state_dict(tensors)
    except (KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{path}: a policy file whose content does not fit together ({error})") from error
    return policy.to(device).eval()
