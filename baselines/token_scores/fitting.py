"""What the two fits of token scores share: settings, the threshold at the budget, and the recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from torch import Tensor

from ...data import batches_of
from ...engine.backbone import Backbone
from ...engine.cost import CostModel, check_budget
from ...game.token_game import TokenGame
from ..argument_checks import check_fields
from ..calibration import calibrate_policy
from ..fitting.inputs import Inputs, device_of
from ..fitting.keep_rate import KeepRateConfig, KeepRateTask
from ..fitting.recipe import Problem, Sites
from .policy import THRESHOLD, TokenScores

CALIBRATION_BATCH = 128
TOLERANCE = 2e-3  # share of the budget by which the calibrated threshold may exceed it


@dataclass(frozen=True)
class ScoreConfig(KeepRateConfig):
    """Settings that both fits have; each adds its own."""

    calibration: int = 512
    """Training images on which the threshold is set to the budget; 0: it stays at 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, ("calibration",), lambda value: value >= 0, "at least 0")

    def quick(self) -> Self:
        """The same settings with very few steps and images, for tests of the whole fit."""
        return replace(super().quick(), calibration=min(self.calibration, 64))


class ScoreTask(KeepRateTask[TokenScores]):
    """Trains a score network; a subclass adds the loss and its inputs.

    Args:
        problem: network, sites, images and budget.
        policy: what learns.
        data: inputs of the loss.
    """

    def __init__(self, problem: Problem, policy: TokenScores, data: Inputs) -> None:
        game = TokenGame.for_policy(problem.backbone, policy, sites=problem.sites, grad=True)
        super().__init__(policy, game, data, problem.config)
        self.problem = problem

    @property
    def settings(self) -> Mapping[str, Any]:
        """Settings of method and policy, and the budget."""
        return {**super().settings, "target_gmacs": self.problem.target_gmacs}

    def at_budget(self, batches: Sequence[tuple[Tensor, Tensor]]) -> TokenScores:
        """The policy with the weights as they are now, at the threshold that meets the budget on these images.

        Raises:
            BudgetError: if no threshold does.
        """
        target, where = self.problem.target_gmacs, self.problem.sites
        return calibrate_policy(
            self.policy.at, target, self.problem.backbone, batches, where, tolerance=TOLERANCE, knob=THRESHOLD
        )

    def fitted(self) -> TokenScores:
        """The policy in evaluation mode, moved to the budget on `calibration` training images."""
        policy, images = super().fitted(), self.config.calibration
        if not images:
            return policy
        device = device_of(self.problem.backbone)
        return self.at_budget(batches_of(self.problem.dataset, CALIBRATION_BATCH, device, images=images))


@dataclass(frozen=True)
class ScoreRecipe:
    """The recipe of token scores; the network is trained, then the threshold meets the budget.

    Args:
        config: default settings.
        make_task: the task of an untrained policy.
    """

    config: ScoreConfig
    make_task: Callable[[Problem, TokenScores], ScoreTask]

    def default_sites(self, backbone: Backbone) -> Sites:
        """The network's own."""
        return backbone.default_sites

    def task(self, problem: Problem) -> ScoreTask:
        """An untrained policy and its loss.

        Raises:
            BudgetError: if no threshold can meet the budget.
        """
        backbone = problem.backbone
        cost = CostModel.of(backbone)
        check_budget(problem.target_gmacs * 1e9, cost.floor(problem.sites), cost.dense())
        policy = TokenScores(0.0, problem.seed, backbone.embed_dim, problem.sites).to(device_of(backbone))
        return self.make_task(problem, policy)
