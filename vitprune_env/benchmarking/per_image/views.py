"""Each view of a policy as files: a figure as PNG and PDF, and its numbers as CSV."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from vitprune_env.benchmarking.images import Batches, shown_images, shown_rows
from vitprune_env.benchmarking.measurement import SHOWN
from vitprune_env.benchmarking.per_image.difficulty import binned, rank_correlation
from vitprune_env.benchmarking.per_image.diversity import DiversityPoint
from vitprune_env.benchmarking.per_image.layers import layer_rows, thresholds_of
from vitprune_env.benchmarking.per_image.records import ImageRecords
from vitprune_env.benchmarking.tables import comma_separated
from vitprune_env.data import data_config
from vitprune_env.engine.backbone import Backbone
from vitprune_env.files import replace_file
from vitprune_env.plots.figures import save_figure
from vitprune_env.plots.per_image import Mark, difficulty_figure, diversity_figure, layers_figure, lives_figure
from vitprune_env.plots.render import label_text
from vitprune_env.policy import Policy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Measure = Literal["margin", "loss"]
MEASURES: dict[Measure, str] = {
    "margin": "difficulty: largest wrong logit minus the true one, dense network",
    "loss": "difficulty: cross-entropy of the dense network, in nats",
}
FIFTHS = 5  # parts of the images by their diversity


@dataclass(frozen=True)
class Views:
    """The views of one policy.

    Attributes:
        name: of the policy.
        policy: what played.
        backbone: the network.
        records: what it did with each image.
        test: the images, of which some are drawn.
        folder: where the files go.
    """

    name: str
    policy: Policy
    backbone: Backbone
    records: ImageRecords
    test: Batches
    folder: Path

    def images(self) -> str:
        """Write images.csv, a line for each image, with what all views are made of."""
        found = self.records
        rows = [
            {
                "image": index,
                "file": found.names[index] if found.names else None,
                "group": None if found.groups is None else int(found.groups[index]),
                "label": int(found.label[index]),
                "predicted": int(found.predicted[index]),
                "dense_predicted": int(found.dense_predicted[index]),
                "dense_margin": float(found.margin[index]),
                "dense_loss": float(found.loss[index]),
                "gmacs": float(found.gmacs[index]),
                "tokens": float(found.tokens[index]),
                **{f"kept at {site.label}": int(found.kept[index, step]) for step, site in enumerate(found.sites)},
                "diversity": float(found.diversity[index]),
                "diversity_per_token": float(found.diversity_per_token[index]),
            }
            for index in range(len(found))
        ]
        self._csv("images", rows)
        right, dense = found.correct.mean(), (found.dense_predicted == found.label).mean()
        return (
            f"{len(found)} images: {right:.1%} read correctly by {self.name} at {found.gmacs.mean():.5f} GMACs, "
            f"{dense:.1%} by the dense network"
        )

    def difficulty(self, measure: Measure) -> str:
        """Kept tokens of each image over its difficulty, with Spearman's rank correlation."""
        found = self.records
        hard = -found.margin if measure == "margin" else found.loss
        correlation = rank_correlation(hard, found.tokens, found.groups)
        parts = binned(hard, found.tokens, found.groups)
        figure = difficulty_figure(hard, found.tokens, found.correct, parts, MEASURES[measure], str(correlation))
        self._figure("difficulty", figure)
        rows = [{"site": "mean over blocks", **correlation._asdict()}]
        for step, site in enumerate(found.sites):
            rows.append({"site": site.label, **rank_correlation(hard, found.kept[:, step], found.groups)._asdict()})
        self._csv("difficulty", [{"difficulty": measure, **row} for row in rows])
        return f"difficulty: rank correlation of kept tokens with the dense network's {measure}, {correlation}"

    def diversity(self, points: Sequence[DiversityPoint]) -> str:
        """Diversity score against accuracy: of policies at several budgets, and of this policy's images."""
        found = self.records
        score = found.diversity_per_token
        correlation = rank_correlation(score, found.correct.astype(float), found.groups)
        lines: dict[str, list[Mark]] = {}
        for point in points:
            mark = Mark(point.share, point.score, point.accuracy, point.low, point.high)
            lines.setdefault(point.policy, []).append(mark)
        parts = binned(score, found.correct, found.groups, FIFTHS)
        self._figure("diversity", diversity_figure(lines, parts, self.name, f"rank correlation {correlation}"))
        self._csv("diversity", [asdict(point) for point in points])
        return f"diversity: rank correlation of score per token with being right, {correlation}"

    def layers(self) -> str:
        """Thresholds and kept tokens at every site."""
        found = self.records
        thresholds = thresholds_of(self.policy, len(found.sites))
        rows = layer_rows(found, thresholds)
        figure = layers_figure(rows, thresholds, self.backbone.num_patches, found.depth)
        self._figure("layers", figure)
        self._csv("layers", rows)
        means = " / ".join(f"{row['kept']:.1f}" for row in rows)
        return f"layers: {means} of {self.backbone.num_patches} tokens; thresholds: {', '.join(thresholds) or 'none'}"

    def lives(self) -> str:
        """How long patches live: maps of some images, a histogram, and the mean at every place of the grid."""
        found, rows = self.records, self.backbone.grid_size[1]
        images, labels = shown_images(self.test, SHOWN)
        drawn = shown_rows(torch.from_numpy(found.label), SHOWN)
        names = self.backbone.class_names or getattr(self.test, "class_names", None)
        config = data_config(self.backbone)
        figure = lives_figure(
            images,
            found.lives,
            found.lives[drawn],
            self.backbone.grid_size,
            found.depth,
            [label_text(label, names) for label in labels.tolist()],
            config["mean"],
            config["std"],
        )
        self._figure("lives", figure)
        values, counts = np.unique(found.lives, return_counts=True)
        self._csv(
            "lives",
            [
                {"blocks": float(value), "patches": int(count), "share": float(count / counts.sum())}
                for value, count in zip(values, counts, strict=True)
            ],
        )
        self._csv(
            "life_map",
            [
                {
                    "row": place // rows,
                    "column": place % rows,
                    "mean": float(found.lives[:, place].mean()),
                    **{f"image {row}": float(found.lives[row, place]) for row in drawn},
                }
                for place in range(found.lives.shape[1])
            ],
        )
        return f"lives: {found.lives.mean():.2f} of {found.depth} blocks on average"

    def _csv(self, name: str, rows: Sequence[dict[str, Any]]) -> None:
        replace_file(self.folder / f"{name}.csv", comma_separated(rows).encode())

    def _figure(self, name: str, figure: Figure) -> None:
        save_figure(figure, self.folder / name)
