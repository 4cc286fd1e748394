"""Fit LTMP's thresholds to a budget (Bonnaerens & Dambre, 2023): two numbers per block, nothing else is trained."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...data import ImageDataset, batches_of
from ...engine.backbone import Backbone
from ...engine.cost import CostModel, check_budget
from ...engine.masked import run_masked, start_masked
from ...errors import BudgetError
from ...files import PathLike
from ...game.rollout import evaluate
from ...game.token_game import TokenGame
from ...types import Site, parse_sites
from ..fitting.loop import FitConfig, ModuleTask, Row, fit, frozen
from ..tome import every_block
from .policy import LTMP
from .training_pass import ThresholdWalk

EVALUATION_BATCH = 128
OFFSETS = (-4.0, 2.0)  # from hardly anybody removed to nearly everybody


@dataclass(frozen=True)
class LTMPFitConfig(FitConfig):
    """How to fit LTMP; the authors' values for ImageNet are given where ours differ.

    Prune thresholds are compared with attention, so whatever sets them is given in units of the attention that an
    average token receives, 1 / (P + N): then the same values suit all numbers of tokens.
    """

    steps: int | None = 120
    """Optimiser steps (the authors: one epoch); a few numbers converge long before an epoch of many images ends."""
    batch_size: int = 32
    """Images per step (the authors: 128)."""
    optimizer: str = "adamw"
    """timm's name of it (the authors: plain SGD, whose steps shrink with the distance to the budget)."""
    validate_every: int = 40
    """Steps between validations; the last step always validates."""
    variant: Literal["merge+prune", "merge", "prune"] = "merge+prune"
    """Which thresholds there are."""
    merge_init: float = 0.98
    """Merge thresholds to begin with (the authors: 0.9, or 1 for merging alone)."""
    prune_init: float = 0.0
    """Prune thresholds to begin with, in average attention; where few tokens receive nearly all attention, as early in
    `vit_digits`, a small one prunes nearly everybody already."""
    merge_lr: float = 5e-3
    """Learning rate of the merge thresholds."""
    prune_lr: float = 0.1
    """Learning rate of the prune thresholds, in average attention (the authors: 5e-6, as it is)."""
    merge_temperature: float = 0.1
    """Of the sigmoid that stands in for the comparison in the backward pass."""
    prune_temperature: float = 0.3
    """The same for pruning, in average attention (the authors: 0.1 or 0.5, as it is: too far to tell tokens apart)."""
    budget_weight: float = 10.0
    """Weight of the squared distance to the asked share of the dense MACs."""
    label_smoothing: float = 0.0
    """Of the cross-entropy (the paper: none; the authors' script: 0.1)."""
    calibration: int = 512
    """Training images on which the fitted thresholds are brought to the budget; 0: they stay as they are."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in ("merge+prune", "merge", "prune"):
            raise ValueError(f"variant: expected 'merge+prune', 'merge' or 'prune', got {self.variant!r}")
        for name in ("merge_lr", "prune_lr", "merge_temperature", "prune_temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected above 0, got {getattr(self, name)!r}")
        for name in ("merge_init", "label_smoothing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected 0 to 1, got {getattr(self, name)!r}")
        for name in ("prune_init", "budget_weight", "calibration"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)!r}")

    @property
    def names(self) -> tuple[str, ...]:
        """Which thresholds there are, one by one."""
        return tuple(self.variant.split("+"))

    def start(self, backbone: Backbone) -> dict[str, float]:
        """Thresholds before the fit, by name."""
        average = 1 / (backbone.num_prefix + backbone.num_patches)
        values = {"merge": self.merge_init, "prune": min(1.0, self.prune_init * average)}
        return {name: values[name] for name in self.names}


class ThresholdTask(ModuleTask):
    """The thresholds, and what is asked of them.

    The loss is the paper's, cross-entropy plus `budget_weight * (r - r_target)^2`, but r is the share of the dense
    MACs as the game counts them: per image (the paper squares mean counts), everything included, evidence and matching
    too.

    Args:
        backbone: the network, frozen.
        sites: where the thresholds act.
        target: asked share of the dense MACs.
        config: how to fit.
    """

    def __init__(self, backbone: Backbone, sites: Sequence[Site], target: float, config: LTMPFitConfig) -> None:
        start, device = config.start(backbone), next(backbone.parameters()).device
        size = (len(sites),)
        super().__init__(
            nn.ParameterDict({name: nn.Parameter(torch.full(size, start[name], device=device)) for name in start})
        )
        self.target, self.config, self.backbone = target, config, backbone
        self.average = 1 / (backbone.num_prefix + backbone.num_patches)
        temperature = {"merge": config.merge_temperature, "prune": config.prune_temperature * self.average}
        self.walk = ThresholdWalk(backbone, sites, temperature)
        self.dense = CostModel.of(backbone).dense()

    def parameters(self) -> Iterable[nn.Parameter] | list[dict[str, Any]]:
        """One group for each kind of threshold, with its own learning rate."""
        rates = {"merge": self.config.merge_lr, "prune": self.config.prune_lr * self.average}
        return [{"params": [value], "lr": rates[name]} for name, value in self.module.named_parameters()]

    def loss(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Row]:
        """Loss of a batch; the share of the dense MACs and the accuracy to show beside it."""
        with torch.no_grad():  # nothing before the first site depends on a threshold
            start = start_masked(self.backbone, images)
            start, _ = run_masked(self.backbone, start, 2 * (self.walk.sites[0].block - 1))
        found = self.walk(start, dict(self.module.named_parameters()))
        share = found.macs.mean() / self.dense
        error = F.cross_entropy(found.logits, labels, label_smoothing=self.config.label_smoothing)
        loss = error + self.config.budget_weight * (share - self.target).square()
        accuracy = (found.logits.argmax(dim=1) == labels).float().mean()
        return loss, {"share": float(share.detach()), "accuracy": float(accuracy)}

    @torch.no_grad()
    def after_step(self) -> None:
        """Thresholds stay within 0 and 1."""
        for value in self.module.parameters():
            value.clamp_(0, 1)

    def policy(self, sites: Sequence[int | str | Site] | None) -> LTMP:
        """The inference form of the thresholds as they are."""
        values = {name: value.detach() for name, value in self.module.named_parameters()}
        return LTMP(values.get("merge"), values.get("prune"), sites)


def fit_ltmp(
    backbone: Backbone,
    dataset: ImageDataset,
    target_gmacs: float,
    *,
    sites: Sequence[int | str | Site] | None = None,
    seed: int = 0,
    output: PathLike | None = None,
    resume: bool = False,
    progress: bool = False,
    config: LTMPFitConfig | None = None,
) -> LTMP:
    """Learn thresholds with which images cost `target_gmacs` on average.

    The budget is a soft part of the loss; what is still missing afterwards, `LTMP.at` makes up for.

    Args:
        backbone: the network; its weights stay as they are.
        dataset: labelled training images.
        target_gmacs: mean GMACs per image, evidence and matching included.
        sites: where to act; None: inside every block, between attention and MLP.
        seed: of the batches.
        output: folder for checkpoints; None: none are written.
        resume: whether to go on from the checkpoint there.
        progress: whether to show a progress bar.
        config: how to fit; None: the defaults.

    Returns:
        The policy, which knows its sites.

    Raises:
        BudgetError: if no thresholds can meet the budget, or the fitted ones do not come near it.
        ValueError: for too few images, or senseless sites.
    """
    config = replace(LTMPFitConfig() if config is None else config, seed=seed)
    where = parse_sites(every_block(backbone.depth) if sites is None else sites, backbone.depth)
    cost = CostModel.of(backbone)
    check_budget(target_gmacs * 1e9, cost.floor(where), cost.dense())
    device = next(backbone.parameters()).device
    with frozen(backbone):
        task = ThresholdTask(backbone, where, target_gmacs * 1e9 / cost.dense(), config)
        settings = {"target_gmacs": target_gmacs, "sites": [site.label for site in where], **asdict(config)}
        fit(task, dataset, config, output=output, resume=resume, progress=progress, device=device, settings=settings)
        policy = task.policy(sites)
        if not config.calibration:
            return policy
        batches = batches_of(dataset, EVALUATION_BATCH, device, images=config.calibration)
        return at_budget(policy, backbone, target_gmacs, batches)


def at_budget(
    policy: LTMP, backbone: Backbone, target_gmacs: float, batches: Sequence[tuple[Tensor, Tensor]], steps: int = 14
) -> LTMP:
    """Bring all thresholds of a policy to a budget by one number, the offset of `LTMP.at`.

    Args:
        policy: whose thresholds.
        backbone: the network.
        target_gmacs: mean GMACs per image, evidence and matching included.
        batches: labelled images to measure the cost on.
        steps: bisection steps.

    Returns:
        The policy that came closest.

    Raises:
        BudgetError: if even 100 times as strict thresholds cost more, or some that hardly remove anybody cost less.
    """

    def cost(offset: float) -> float:
        moved = policy.at(offset)
        return evaluate(TokenGame.for_policy(backbone, moved), moved, batches).gmacs

    low, high = OFFSETS
    dearest, cheapest = cost(low), cost(high)
    if not cheapest <= target_gmacs <= dearest:
        raise BudgetError(
            f"target_gmacs: these thresholds reach {cheapest:.5g} to {dearest:.5g} GMACs, got {target_gmacs:.5g}"
        )
    tried = {low: dearest, high: cheapest}
    for _ in range(steps):
        middle = (low + high) / 2
        tried[middle] = cost(middle)
        low, high = (middle, high) if tried[middle] > target_gmacs else (low, middle)
    return policy.at(min(tried, key=lambda offset: abs(tried[offset] - target_gmacs)))
