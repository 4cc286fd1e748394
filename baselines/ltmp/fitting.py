"""Fit of LTMP's thresholds to a budget (Bonnaerens & Dambre, 2023): one or two numbers per block are trained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self, Unpack, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...data import ImageDataset, batches_of
from ...engine.backbone import Backbone
from ...engine.cost import CostModel, bisect, check_budget
from ...engine.masked import run_masked, start_masked
from ...game.rollout import evaluate
from ...game.token_game import TokenGame
from ...types import every_block
from ..argument_checks import check_fields
from ..calibration import Knob, out_of_reach
from ..fitting.inputs import device_of
from ..fitting.keep_rate import before_block
from ..fitting.loop import FitConfig
from ..fitting.recipe import FitOptions, Problem, Sites, fit_policy
from ..fitting.task import ModuleTask, Row
from .policy import LTMP
from .training_pass import run_training_pass

EVALUATION_BATCH = 128
OFFSET = Knob("offset", -4, 4, rising=False)  # of `LTMP`: from hardly any token removed to nearly all


@dataclass(frozen=True)
class LTMPFitConfig(FitConfig):
    """Settings of the fit; the authors' values for ImageNet are given where ours differ.

    Prune thresholds are compared with attention, which falls with the number of tokens. Their settings are therefore in
    units of average attention, 1 / (P + N), so that the same values suit any number of tokens.
    """

    steps: int | None = 120
    """Optimiser steps (the authors: one epoch); so few parameters converge in much less than an epoch."""
    batch_size: int = 32
    """Images per step (the authors: 128)."""
    optimizer: str = "adamw"
    """timm's name of the optimiser (the authors: plain SGD, whose steps shrink with the distance to the budget)."""
    validate_every: int = 40
    """Steps between validations; the last step always validates."""
    variant: Literal["merge+prune", "merge", "prune"] = "merge+prune"
    """Which thresholds are trained."""
    merge_init: float = 0.98
    """Initial merge thresholds (the authors: 0.9, or 1 for merging alone)."""
    prune_init: float = 0.0
    """Initial prune thresholds, in average attention. Where few tokens receive nearly all attention, as in the first
    blocks of `vit_digits`, even a small threshold prunes nearly all tokens."""
    merge_lr: float = 5e-3
    """Learning rate of the merge thresholds."""
    prune_lr: float = 0.1
    """Learning rate of the prune thresholds, in average attention (the authors: 5e-6 of the full attention)."""
    merge_temperature: float = 0.1
    """Temperature of the sigmoid that replaces the comparison in the backward pass."""
    prune_temperature: float = 0.3
    """The same for pruning, in average attention (the authors: 0.1 or 0.5 of the full attention, far above the
    differences between tokens)."""
    budget_weight: float = 10.0
    """Weight of the squared distance to the target share of the dense MACs."""
    label_smoothing: float = 0.0
    """Label smoothing of the cross-entropy (the paper: none; the authors' script: 0.1)."""
    calibration: int = 512
    """Training images on which the trained thresholds are moved to the budget; 0: they stay as they are."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in ("merge+prune", "merge", "prune"):
            raise ValueError(f"variant: expected 'merge+prune', 'merge' or 'prune', got {self.variant!r}")
        positive = ("merge_lr", "prune_lr", "merge_temperature", "prune_temperature")
        check_fields(self, positive, lambda value: value > 0, "above 0")
        check_fields(self, ("merge_init", "label_smoothing"), lambda value: 0 <= value <= 1, "0 to 1")
        check_fields(self, ("prune_init", "budget_weight", "calibration"), lambda value: value >= 0, "at least 0")

    def quick(self, steps: int = 4) -> Self:
        """The same settings with very few steps and images, for tests of the whole fit."""
        return replace(super().quick(steps), calibration=min(self.calibration, 64))

    @property
    def names(self) -> tuple[str, ...]:
        """Which thresholds are trained, as a tuple."""
        return tuple(self.variant.split("+"))

    def start(self, backbone: Backbone) -> dict[str, float]:
        """Initial thresholds by name."""
        average = 1 / (backbone.num_prefix + backbone.num_patches)
        values = {"merge": self.merge_init, "prune": min(1.0, self.prune_init * average)}
        return {name: values[name] for name in self.names}


class ThresholdTask(ModuleTask):
    """Trains the thresholds.

    The loss is the paper's, cross-entropy plus `budget_weight * (r - r_target)^2`. r is the share of the dense MACs as
    the game counts them: per image (the paper squares mean counts), and with everything included, evidence and matching
    too.

    Args:
        problem: network, sites, images and budget.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem, self.backbone, self.data = problem, problem.backbone, problem.dataset
        self.config: LTMPFitConfig = problem.config
        start, device, size = self.config.start(self.backbone), device_of(self.backbone), (len(problem.sites),)
        super().__init__(
            nn.ParameterDict({name: nn.Parameter(torch.full(size, start[name], device=device)) for name in start})
        )
        self.average = 1 / (self.backbone.num_prefix + self.backbone.num_patches)
        self.temperature = {
            "merge": self.config.merge_temperature,
            "prune": self.config.prune_temperature * self.average,
        }
        self.dense = CostModel.of(self.backbone).dense()
        self.target = problem.target_gmacs * 1e9 / self.dense

    @property
    def settings(self) -> Mapping[str, Any]:
        """Budget and sites; the others are those of the training loop."""
        return {"target_gmacs": self.problem.target_gmacs, "sites": [site.label for site in self.problem.sites]}

    def parameters(self) -> Iterable[nn.Parameter] | list[dict[str, Any]]:
        """One group for each kind of threshold, with its own learning rate."""
        rates = {"merge": self.config.merge_lr, "prune": self.config.prune_lr * self.average}
        return [{"params": [value], "lr": rates[name]} for name, value in self.module.named_parameters()]

    def loss(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Row]:
        """Loss of a batch, with the share of the dense MACs and the accuracy."""
        sites, thresholds = self.problem.sites, dict(self.module.named_parameters())
        with torch.no_grad():  # the part before the first site does not depend on the thresholds
            start, _ = run_masked(self.backbone, start_masked(self.backbone, images), before_block(sites[0]))
        found = run_training_pass(self.backbone, sites, start, thresholds, self.temperature)
        share = found.macs.mean() / self.dense
        error = F.cross_entropy(found.logits, labels, label_smoothing=self.config.label_smoothing)
        loss = error + self.config.budget_weight * (share - self.target).square()
        accuracy = (found.logits.argmax(dim=1) == labels).float().mean()
        return loss, {"share": float(share.detach()), "accuracy": float(accuracy)}

    @torch.no_grad()
    def after_step(self) -> None:
        """Keep the thresholds within 0 and 1."""
        for value in self.module.parameters():
            value.clamp_(0, 1)

    def policy(self) -> LTMP:
        """The inference form with the thresholds as they are now."""
        values = {name: value.detach() for name, value in self.module.named_parameters()}
        return LTMP(values.get("merge"), values.get("prune"), self.problem.asked_sites)

    def fitted(self) -> LTMP:
        """The same, moved to the budget on `calibration` training images."""
        if not self.config.calibration:
            return self.policy()
        images, device = self.config.calibration, device_of(self.backbone)
        batches = batches_of(self.data, EVALUATION_BATCH, device, images=images)
        return at_budget(self.policy(), self.backbone, self.problem.target_gmacs, batches)


@dataclass(frozen=True)
class LTMPRecipe:
    """The recipe of LTMP; the budget is a soft part of the loss, and what remains is corrected afterwards."""

    config: LTMPFitConfig = LTMPFitConfig()

    def default_sites(self, backbone: Backbone) -> Sites:
        """Inside every block, between attention and MLP."""
        return every_block(backbone.depth)

    def task(self, problem: Problem) -> ThresholdTask:
        """The thresholds, and their loss.

        Raises:
            BudgetError: if no thresholds can meet the budget.
        """
        cost = CostModel.of(problem.backbone)
        check_budget(problem.target_gmacs * 1e9, cost.floor(problem.sites), cost.dense())
        return ThresholdTask(problem)


def fit_ltmp(
    backbone: Backbone,
    dataset: ImageDataset,
    target_gmacs: float,
    *,
    config: LTMPFitConfig | None = None,
    **options: Unpack[FitOptions],
) -> LTMP:
    """Train thresholds with which images cost `target_gmacs` on average; see `baselines.fit` for the arguments.

    Raises:
        BudgetError: if no thresholds can meet the budget, or the trained ones do not come near it.
    """
    return fit_policy(LTMPRecipe(), backbone, dataset, target_gmacs, config=config, **options)


def at_budget(
    policy: LTMP, backbone: Backbone, target_gmacs: float, batches: Sequence[tuple[Tensor, Tensor]], steps: int = 14
) -> LTMP:
    """Move all thresholds of a policy to a budget by one number, the offset of `LTMP.at`.

    Args:
        policy: gives the thresholds.
        backbone: the network.
        target_gmacs: mean GMACs per image, evidence and matching included.
        batches: labelled images to measure the cost on.
        steps: bisection steps.

    Returns:
        The policy whose cost came closest to the budget.

    Raises:
        BudgetError: if the budget is outside of what offsets in the range of `OFFSET` cost.
    """
    tried: dict[float, float] = {}

    def cost(offset: float) -> float:
        moved = policy.at(offset)
        tried[offset] = evaluate(TokenGame.for_policy(backbone, moved), moved, batches).gmacs
        return tried[offset]

    strictest, loosest = cast(float, OFFSET.high), OFFSET.low
    cheapest, dearest = cost(strictest), cost(loosest)
    if not cheapest <= target_gmacs <= dearest:
        sites = TokenGame.for_policy(backbone, policy).sites
        raise out_of_reach("these thresholds reach", cheapest, dearest, target_gmacs, backbone, sites)
    bisect(cost, target_gmacs, strictest, loosest, steps)
    return policy.at(min(tried, key=lambda offset: abs(tried[offset] - target_gmacs)))
