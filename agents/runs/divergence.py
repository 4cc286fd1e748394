"""Detection of divergence: NaN in parameters and exploding losses end a run before they are saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

import torch
from torch import nn

from ...errors import NumericalError

EXPLOSION = 1e3  # how many times as large as usual a loss may be
MEMORY = 20  # updates that say what is usual
LEAST = 5  # updates before a loss can be compared
FLOOR = 1e-3  # smaller losses count as this one


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
    """Size of the loss; of learners that report the losses of both networks, the sum of their sizes.

    The two may have opposite signs, so that their sum could be small while both are large.
    """
    parts = [row[name] for name in ("actor_loss", "vf_loss") if name in row] or [row.get("loss", 0.0)]
    return sum(map(abs, parts))
