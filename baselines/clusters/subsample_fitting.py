"""Fit of the mergers with trained layers (Long et al., 2023, Table 4) on a network that stays as it is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from ...data import ImageDataset
from ...engine.backbone import Backbone
from ...engine.masked import classify_masked
from ...engine.tokens import start_state
from ...game.rollout import play
from ...types import quarter_sites
from ..argument_checks import check_fields
from ..fitting.keep_rate import KeepRateConfig, KeepRateRecipe, KeepRateTask, before_block
from ..fitting.loop import FitConfig
from ..fitting.recipe import FitOptions, Problem, fit_policy
from ..fitting.task import Row
from .subsample import SubSampleMerge


@dataclass(frozen=True)
class MergerConfig(KeepRateConfig):
    """Settings of the fit of a merger with trained layers."""

    fit: FitConfig = field(
        default_factory=lambda: FitConfig(steps=300, batch_size=32, lr=2e-3, validation=512, validate_every=50)
    )
    """The training loop."""
    logit_weight: float = 1.0
    """Weight of the divergence from the dense network's class probabilities; that of the cross-entropy is 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, ("logit_weight",), lambda value: value >= 0, "at least 0")


class MergerTask(KeepRateTask[SubSampleMerge]):
    """Cross-entropy of the pruned network and divergence from the dense one.

    The network is run with tokens really merged. The decisions before the layers, which tokens are attentive and which
    run a token belongs to, do not depend on the trained weights and need no gradient.
    """

    def loss(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Row]:
        """Loss of a batch; it uses no random numbers."""
        backbone, masked = self.game.backbone, self.data.state(images)
        state = start_state(masked.x, masked.num_prefix, masked.half)
        with torch.no_grad():
            teacher = classify_masked(backbone, self.data.dense(images, masked)).log_softmax(1)
        logits = play(self.game, self.policy, state).outcome.logits
        of_class = F.cross_entropy(logits, labels)
        of_logits = F.kl_div(logits.log_softmax(1), teacher, reduction="batchmean", log_target=True)
        parts = {"class": float(of_class.detach()), "logits": float(of_logits.detach())}
        return of_class + self.config.logit_weight * of_logits, parts


def merger_recipe(kind: Literal["convolution", "mlp"]) -> KeepRateRecipe[SubSampleMerge]:
    """The recipe of one kind of trained layers."""

    def untrained(problem: Problem) -> SubSampleMerge:
        width, sites = problem.backbone.embed_dim, problem.sites
        return SubSampleMerge(1.0, width, len(sites), kind, seed=problem.seed, sites=sites)

    return KeepRateRecipe(
        config=MergerConfig(),
        sites=lambda backbone: backbone.default_sites,
        published=lambda backbone: quarter_sites(backbone.depth, later=1, inside=True),
        untrained=untrained,
        make_task=MergerTask,
        prepared=before_block,
        dense=True,
    )


def fit_merger(
    backbone: Backbone,
    dataset: ImageDataset,
    target_gmacs: float,
    *,
    kind: Literal["convolution", "mlp"] = "convolution",
    config: MergerConfig | None = None,
    **options: Unpack[FitOptions],
) -> SubSampleMerge:
    """Train the layers of a merger for a budget; see `baselines.fit` for the arguments.

    The network stays as it is; the paper trains all of it from scratch.

    Returns:
        The policy at the keep rate of the budget; `policy.at(rate)` has the same layers at another one.
    """
    return fit_policy(merger_recipe(kind), backbone, dataset, target_gmacs, config=config, **options)
