"""Detection of divergence: NaN in parameters and exploding losses end a run before they are saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

import torch
from torch import nn

from ...errors import NumericalError

EXPLOSION = 1e3  # how many times as large as usual a loss may be
MEMORY = 20  # updates that say what is usual
LEAST = 5  # updates it takes to know
FLOOR = 1e-3  # losses below it are all alike


def check_health(row: Mapping[str, float], history: Sequence[Mapping[str, float]], module: nn.Module) -> None:
    """Stop after an update that has ruined the networks.

    Args:
        row: metrics of the update.
        history: rows of the updates before.
        module: the networks as the update left them.

    Raises:
        NumericalError: for parameters that are not finite, or a loss a thousand times as large as it used to be.
    """
    broken = [name for name, value in module.named_parameters() if not torch.isfinite(value).all()]
    if broken:
        raise NumericalError(
            f"parameters: expected finite numbers after update {row['update']:.0f}, got NaN or infinity in "
            f"{len(broken)} tensors, first in {broken[0]}"
        )
    usual = [_size(earlier) for earlier in history[-MEMORY:]]
    if len(usual) >= LEAST and _size(row) > EXPLOSION * max(FLOOR, median(usual)):
        raise NumericalError(
            f"loss: expected about {median(usual):.3g} as in the updates before, got {_size(row):.3g} in update "
            f"{row['update']:.0f}: training has exploded"
        )


def _size(row: Mapping[str, float]) -> float:
    """Both losses, so that one cannot hide the other."""
    return abs(row.get("actor_loss", 0.0)) + abs(row.get("vf_loss", 0.0))
