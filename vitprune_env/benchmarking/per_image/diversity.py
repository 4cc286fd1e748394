"""Diversity of the tokens that policies leave, against accuracy, at several budgets (Long et al., 2023, Fig. 4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vitprune_env.benchmarking.contestants import Contestant, Task
from vitprune_env.benchmarking.intervals import interval
from vitprune_env.benchmarking.measurement import Sites
from vitprune_env.benchmarking.per_image.records import ImageRecords, record
from vitprune_env.errors import BudgetError


@dataclass(frozen=True)
class DiversityPoint:
    """A policy at one cost. Scores are those of the paper's Eq. 4 after the last site, means over images."""

    policy: str
    share: float  # of the dense GMACs, policy included
    accuracy: float  # 0 to 1
    low: float  # of the accuracy's 95 % interval
    high: float
    score: float
    tokens: float  # tokens left after the last site
    score_per_token: float
    sites: str

    @classmethod
    def of(cls, policy: str, records: ImageRecords, dense_gmacs: float) -> DiversityPoint:
        """The point of a policy whose play was recorded."""
        marks = records.correct[None].astype(float)
        return cls(
            policy,
            float(records.gmacs.mean() / dense_gmacs),
            float(marks.mean()),
            *interval(marks, records.groups),
            float(records.diversity.mean()),
            float(np.mean(records.last)),
            float(records.diversity_per_token.mean()),
            " ".join(site.label for site in records.sites),
        )


def diversity_points(
    lines: Sequence[Contestant], task: Task, shares: Sequence[float]
) -> tuple[list[DiversityPoint], list[str]]:
    """Every policy at every budget.

    Args:
        lines: policies that can be brought to a budget.
        task: network, images to report on and to calibrate on.
        shares: budgets, as shares of the dense GMACs.

    Returns:
        The points, and a sentence for every budget that a policy cannot meet.
    """
    points, missing = [], []
    for line in lines:
        sites: Sites | None = line.sites(task)
        for share in (None,) if line.fixed else shares:
            try:
                policy = line.at(task, (share or 1.0) * task.dense_gmacs)[0]
            except BudgetError as error:
                missing.append(f"{line.name} at {share or 1.0:.0%}: {error}")
                continue
            records = record(task.backbone, policy, task.test, sites)
            points.append(DiversityPoint.of(line.name, records, task.dense_gmacs))
    return points, missing
