"""Policies on disk: one safetensors file each, with a JSON header, written atomically; training states likewise."""

from __future__ import annotations

from pathlib import Path

import torch

from ..errors import CheckpointError
from ..files import PathLike, load_state, read_file, save_state, write_file
from .budgets.adaptive import AdaptivePolicy
from .policies import TokenPolicy

__all__ = ["PathLike", "load_policy", "load_state", "save_policy", "save_state"]

COMMON = ("embed_dim", "hidden", "sites", "info")
ADAPTIVE = ("shares", "thresholds", "share")


def save_policy(policy: TokenPolicy, path: PathLike) -> Path:
    """Write a policy, with all that is needed to rebuild it, to one file.

    Args:
        policy: what to save; its `info` goes along.
        path: file name, customarily ending in `.safetensors`.

    Returns:
        The path.
    """
    return write_file(Path(path), policy.actor.state_dict(), {"kind": "policy", **policy.config()})


def load_policy(path: PathLike, device: str | torch.device = "cpu") -> TokenPolicy:
    """Read a policy that `save_policy` wrote.

    Raises:
        CheckpointError: if the file is missing, damaged, or something else.
    """
    tensors, header = read_file(Path(path), "policy")
    try:
        kind, own = (AdaptivePolicy, ADAPTIVE) if "shares" in header else (TokenPolicy, ("threshold",))
        policy = kind.from_config(**{name: header[name] for name in (*COMMON, *own)})
        policy.actor.load_state_dict(tensors)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: a policy file whose content does not fit together ({error})") from error
    return policy.to(device).eval()
