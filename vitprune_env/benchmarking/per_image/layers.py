"""Tokens at every site, why the others left, and the thresholds that decided so (Bonnaerens & Dambre, 2023)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vitprune_env.benchmarking.per_image.records import ImageRecords
from vitprune_env.policy import Policy


def thresholds_of(policy: Policy, num_sites: int) -> dict[str, tuple[float, ...]]:
    """The thresholds of a policy at each of its sites, by what is compared with them; empty: it has none.

    A policy with thresholds of its own at every site has a method `thresholds(num_sites)`, as LTMP does. One with the
    same threshold everywhere has an attribute `threshold`, as learnt policies do.
    """
    own = getattr(policy, "thresholds", None)
    if callable(own):
        found: Mapping[str, Sequence[float]] = own(num_sites)  # pyright: ignore[reportAssignmentType]
        return {name: tuple(values) for name, values in found.items()}
    same = getattr(policy, "threshold", None)
    return {} if same is None else {"score": (float(same),) * num_sites}


def layer_rows(records: ImageRecords, thresholds: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """For each site the tokens that go on (mean, tenth and ninetieth percentile), those that left, and thresholds."""
    rows = []
    for index, site in enumerate(records.sites):
        kept = records.kept[:, index]
        low, high = np.percentile(kept, [10, 90])
        rows.append(
            {
                "site": site.label,
                "block": site.half / 2,
                "kept": float(kept.mean()),
                "kept_p10": float(low),
                "kept_p90": float(high),
                "dropped": float(records.dropped[:, index].mean()),
                "merged": float(records.merged[:, index].mean()),
                "waiting": float(records.waiting[:, index].mean()),
                **{f"threshold on {name}": float(values[index]) for name, values in thresholds.items()},
            }
        )
    return rows
