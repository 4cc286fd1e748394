"""Held-out images during training: what the greedy policy would achieve on them if it were deployed now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ...engine.tokens import TokenState
from ...game.rewards import SharedOutcome
from ...game.rollout import evaluate
from ...game.token_game import TokenGame
from ..budgets.controller import BudgetController
from ..shared.processes import Processes
from ..shared.training_images import BatchedDataset, TrainingImages

Labelled = Sequence[tuple[Tensor | TokenState, Tensor]]
FEW = 128  # images to set the threshold on during training, which is repeated; in the end there are more


def fixed_images(
    data: BatchedDataset | Dataset[Any],
    game: TokenGame,
    count: int,
    seed: int,
    device: torch.device,
    prepared: bool = True,
) -> Labelled:
    """Up to `count` images in batches; the same ones for the same seed, whatever else is drawn in the run.

    Args:
        data: labelled images.
        game: prepares them.
        count: how many.
        seed: of the choice among them.
        device: where they are played.
        prepared: whether to run them to the first site now; not if the blocks before it are going to learn.
    """
    generator = torch.Generator().manual_seed(seed)
    return TrainingImages(data, game, count if prepared else 0, generator, device).first(count)


@dataclass(frozen=True)
class Validation:
    """Measures a policy that is still being trained as it would be deployed: greedy, its threshold set to the budget.

    Nothing is drawn from a random stream, and nothing is learnt, so that a run is the same with and without it.
    """

    controller: BudgetController
    calibration: Labelled  # images to set the threshold on
    images: Labelled  # images to measure on
    processes: Processes

    def measure(self, policy: Any) -> dict[str, float]:
        """Accuracy and share of the dense network's MACs.

        Args:
            policy: the greedy one, its threshold still to be set.

        Returns:
            `validation_accuracy` and `validation_share`, both 0 to 1.
        """
        game = self.controller.game
        game.reward = SharedOutcome()  # that of training may be made for the batch played last
        at_budget = self.controller.at_target(policy, [images for images, _ in self.calibration])
        found = evaluate(game, at_budget, self.images)
        numbers = torch.tensor([[found.accuracy, found.macs / game.cost.dense()]], dtype=torch.float64)
        accuracy, share = self.processes.gather(numbers)[0].tolist()  # those of process 0, so that all stop together
        return {"validation_accuracy": accuracy, "validation_share": share}
