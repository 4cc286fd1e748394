"""What is measured of a policy on a network: accuracy, cost, speed, and where its tokens go."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vitprune_env.benchmarking.images import LOOK, Batches, first_images, shown_rows
from vitprune_env.benchmarking.intervals import interval, standard_error
from vitprune_env.benchmarking.prepared import PreparedImages
from vitprune_env.benchmarking.speed import Stopwatch
from vitprune_env.deploy.pruned_vit import PrunedViT
from vitprune_env.engine.backbone import Backbone
from vitprune_env.game.rollout import play
from vitprune_env.game.token_game import TokenGame
from vitprune_env.policy import Policy
from vitprune_env.types import Site

Group = Literal["control", "baseline", "learned", "own"]
"""Rows are controls, baselines of the package, trained policies, or policies of the user's own."""
Sites = Sequence[int | str | Site]
SHOWN = 8  # images whose tokens are kept for a figure, evenly spread


class Timing(NamedTuple):
    """How speed is measured: dense and pruned model run in turn on the same images."""

    pairs: int = 9  # runs of each
    images: int = 128
    warm_up: int = 3  # runs of each that do not count


@dataclass(frozen=True)
class Run:
    """One pass of a policy over all images."""

    correct: str  # a character per image, 1 where it is classified correctly
    gmacs: float  # mean per image, policy included
    policy_gmacs: float
    top5: float
    keep_per_site: tuple[float, ...]
    sites: tuple[str, ...]
    source: tuple[tuple[int, ...], ...]  # of a few images, see `Row`
    predicted: tuple[int, ...]
    image_groups: str = ""  # the number of each image's group, separated by spaces; empty: each image is its own

    @classmethod
    def load(cls, run: dict[str, Any]) -> Run:
        """The run that `asdict` and JSON made this of."""
        return cls(**{name: _as_tuple(value) for name, value in run.items()})


@dataclass(frozen=True)
class Row:
    """One policy at one budget, in one or several runs; everything else is computed from this."""

    name: str
    group: Group = "baseline"
    share: float | None = None  # of the dense GMACs, as asked for; None: no budget was asked for
    gmacs: float = 0.0  # mean per image, policy included
    policy_gmacs: float = 0.0  # the policy's and its evidence's part
    correct: tuple[str, ...] = ()  # per run: a character per image, 1 where it is classified correctly
    top5: float = 0.0  # share of images whose class is among the five with the largest logits
    keep_per_site: tuple[float, ...] = ()  # mean fraction of the tokens left after each site
    sites: tuple[str, ...] = ()
    setting: str = ""  # of the parameter that was turned to meet the budget
    images_per_s: float | None = None  # measured
    dense_images_per_s: float | None = None  # measured in turn with it
    speedup: float | None = None  # median over pairs
    source: tuple[tuple[int, ...], ...] = ()  # of the images drawn, where every patch ended up (see `Outcome`)
    predicted: tuple[int, ...] = ()  # of the images drawn
    out_of_reach: str = ""  # why there are no numbers
    origin: str = ""  # tells saved policies of the same name apart
    seconds: float = 0.0  # spent on fitting, calibrating and measuring
    image_groups: str = ""  # see `Run`

    @classmethod
    def load(cls, row: dict[str, Any]) -> Row:
        """The row that `asdict` and JSON made this of."""
        return cls(**{name: _as_tuple(value) for name, value in row.items()})

    @property
    def marks(self) -> np.ndarray:
        """`[runs, images]` float, 1 where correct."""
        return np.array([[float(mark) for mark in run] for run in self.correct])

    @property
    def groups(self) -> np.ndarray | None:
        """`[images]` int64, the group of each image; None: each image is its own."""
        return np.array(self.image_groups.split(), dtype=np.int64) if self.image_groups else None

    @property
    def accuracy(self) -> float:
        """Mean over runs and images, 0 to 1."""
        return float(self.marks.mean())

    @property
    def stderr(self) -> float:
        """Standard error of the accuracy: over the runs, or over the images of a single run, see `intervals`."""
        return standard_error(self.marks, self.groups)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the accuracy."""
        return interval(self.marks, self.groups)

    def numbers(self) -> dict[str, Any]:
        """The row without what belongs to single images, with accuracy, standard error and interval."""
        hidden = ("correct", "source", "predicted", "image_groups")
        found = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in hidden}
        low, high = self.interval if self.correct else (None, None)
        accuracy, stderr = (self.accuracy, self.stderr) if self.correct else (None, None)
        return {**found, "accuracy": accuracy, "stderr": stderr, "accuracy_low": low, "accuracy_high": high,
                "runs": len(self.correct), "image_groups": len(set(self.image_groups.split())) or None}  # fmt: skip


def _as_tuple(value: Any) -> Any:
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value


def measure(
    name: str,
    backbone: Backbone,
    policies: Policy | Sequence[Policy],
    test: Batches,
    *,
    sites: Sites | None = None,
    timing: Timing | None = None,
    **facts: Any,
) -> Row:
    """Let a policy classify labelled images, once or in several runs.

    Args:
        name: of the row.
        backbone: the network.
        policies: the policy, or one per run, such as the same method with different seeds.
        test: labelled images.
        sites: where to prune, see `Backbone.sites_for`.
        timing: how to measure speed, with the first policy; None: not at all.
        **facts: further fields of the row.
    """
    chosen = list(policies) if isinstance(policies, Sequence) else [policies]
    runs = [run_of(backbone, policy, test, sites) for policy in chosen]
    speed = {} if timing is None else speed_of(backbone, chosen[0], test, sites, timing)
    return row_of(name, runs, **speed, **facts)


def row_of(name: str, runs: Sequence[Run], **facts: Any) -> Row:
    """The row of one or several runs.

    Args:
        name: of the row.
        runs: of the same policy, or of the same method with different seeds.
        **facts: further fields of the row.
    """
    averaged = ("gmacs", "policy_gmacs", "top5")
    keep = zip(*(run.keep_per_site for run in runs), strict=True)
    return Row(
        name,
        **{key: statistics.mean(getattr(run, key) for run in runs) for key in averaged},
        correct=tuple(run.correct for run in runs),
        keep_per_site=tuple(statistics.mean(site) for site in keep),
        sites=runs[0].sites,
        source=runs[0].source,
        predicted=runs[0].predicted,
        image_groups=runs[0].image_groups,
        **facts,
    )


def _groups_of(test: Batches) -> list[int]:
    """The group of each image; none: each image is its own."""
    groups: Tensor | None = getattr(test, "groups", None)
    return [] if groups is None else groups.tolist()


def game_of(backbone: Backbone, policy: Policy, sites: Sites | Literal["published"] | None = None) -> TokenGame:
    """The game of a policy, at the given sites or where it acts by default."""
    return TokenGame.for_policy(backbone, policy, sites=sites)


@torch.inference_mode()
def run_of(backbone: Backbone, policy: Policy, test: Batches, sites: Sites | None = None) -> Run:
    """Let a policy classify all images once; arguments as for `measure`.

    Raises:
        ValueError: for no images.
    """
    game = game_of(backbone, policy, sites)
    prepared = isinstance(test, PreparedImages)
    marks, macs, own, kept, five = [], [], [], [], 0
    classes, source, predicted = [], [], []
    for inputs, labels in test.inputs(game) if prepared else test:
        outcome = play(game, policy, inputs, labels).outcome
        guess = outcome.logits.argmax(dim=1)
        marks += (guess == labels).int().tolist()
        best = outcome.logits.topk(min(5, outcome.logits.shape[1]), dim=1).indices
        five += int((best == labels[:, None]).sum())
        macs.append(outcome.macs)
        own.append(outcome.policy_macs)
        kept.append(outcome.n_kept)
        if len(predicted) < LOOK:
            classes += labels.tolist()
            source += outcome.source.tolist()
            predicted += guess.tolist()
    if not marks:
        raise ValueError("test: expected at least one batch of labelled images, got an empty dataset")
    shown = shown_rows(torch.tensor(classes), SHOWN)
    return Run(
        correct="".join(map(str, marks)),
        gmacs=float(torch.cat(macs).mean()) / 1e9,
        policy_gmacs=float(torch.cat(own).mean()) / 1e9,
        top5=five / len(marks),
        keep_per_site=tuple((torch.cat(kept).double().mean(dim=0) / game.num_agents).tolist()),
        sites=tuple(site.label for site in game.sites),
        source=_as_tuple([source[row] for row in shown]),
        predicted=tuple(predicted[row] for row in shown),
        image_groups=" ".join(map(str, _groups_of(test))),
    )


@torch.inference_mode()
def speed_of(
    backbone: Backbone, policy: Policy, test: Batches, sites: Sites | None, timing: Timing
) -> dict[str, float]:
    """Images per second of the deployable model beside the dense one, as fields of a row."""
    images, _ = first_images(test, timing.images)
    model = PrunedViT(backbone, policy, sites).eval()
    watch = Stopwatch(images.device)
    times = watch.race(lambda: backbone(images), lambda: model(images), timing.pairs, warm_up=timing.warm_up)
    dense, pruned = statistics.median(times.first), statistics.median(times.second)
    return {"images_per_s": len(images) / pruned, "dense_images_per_s": len(images) / dense, "speedup": times.ratio}
