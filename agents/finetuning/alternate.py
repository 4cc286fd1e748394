"""Alternating epochs of Algorithm 1 (paper 000): so many RL updates, then the network learns from what they leave."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ...engine.backbone import Backbone
from ...errors import SettingsError
from ..networks import TokenActor
from ..policies import ExploringPolicy
from ..runs.config import TrainConfig
from ..runs.training_images import TrainingImages
from .settings import FinetuneConfig
from .step import FineTuner


class Alternation:
    """Fine-tunes the network every so many updates, with the policy frozen as it explores then.

    Exploring play is what meets the budget during training; the greedy policy does so only once it is calibrated.

    Args:
        backbone: the network, trained in place.
        actor: the policy that is being learnt.
        config: of the run.
        images: those that the run plays.
    """

    def __init__(self, backbone: Backbone, actor: TokenActor, config: TrainConfig, images: TrainingImages) -> None:
        self.every = config.finetune_every
        phases = config.updates // self.every
        if not phases:
            raise SettingsError(f"finetune_every: expected at most updates = {config.updates}, got {self.every}")
        self.steps = max(1, config.finetune_steps // phases)
        settings = finetune_settings(config, self.steps * phases)
        generator = torch.Generator().manual_seed(config.seed + 1)  # other noise than the updates'
        self.explorer = ExploringPolicy(actor, generator)
        self.tuner = FineTuner(
            backbone, images.dataset, settings, self.explorer, generator, images.game.sites, images.device,
            images.processes, images,
        )  # fmt: skip

    def after(self, update: int) -> dict[str, float]:
        """Fine-tune if it is time to.

        Args:
            update: how many are done.

        Returns:
            Mean metrics of the phase by name, nothing if there was none.
        """
        if update % self.every:
            return {}
        rows = []
        for _ in range(self.steps):
            batch = self.tuner.config.batch_size
            self.explorer.next_game = self.tuner.steps_done * batch + self.tuner.processes.share(batch).start
            rows.append(self.tuner.step(self.explorer))
        return {f"finetune/{name}": sum(row[name] for row in rows) / len(rows) for name in rows[0]}

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold; the place in the data is the run's."""
        return {name: value for name, value in self.tuner.state().items() if name != "images"}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.tuner.restore({**state, "images": self.tuner.images.state()})


def finetune_settings(config: TrainConfig, steps: int) -> FinetuneConfig:
    """Fine-tuning as a run asks for it."""
    return FinetuneConfig(
        steps=steps,
        batch_size=config.finetune_batch,
        lr=config.finetune_lr,
        distill=config.distill,
        cache_images=config.cache_images,
        amp=config.amp,
        seed=config.seed,
    )
