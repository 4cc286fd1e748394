"""Alternating epochs of Algorithm 1 (RL4EViT): after some updates of the policy, the network learns for some steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from ...engine.backbone import Backbone
from ...envs.actions import ActionKind
from ...errors import SettingsError
from ..learners.exploration import ExploringPolicy
from ..networks import TokenActor
from ..shared.training_images import TrainingImages
from .settings import FinetuneConfig
from .step import FineTuner


class Alternation:
    """Fine-tunes the network every so many updates, while the policy explores but does not learn.

    Exploring play meets the budget during training; the greedy policy meets it only after calibration.

    Args:
        backbone: the network, trained in place.
        actor: the policy that is being learnt.
        actions: what the actor's actions mean.
        config: settings of fine-tuning.
        updates: of the run.
        images: those that the run plays.

    Raises:
        SettingsError: if the run ends before the first phase.
    """

    def __init__(
        self,
        backbone: Backbone,
        actor: TokenActor,
        actions: ActionKind,
        config: FinetuneConfig,
        updates: int,
        images: TrainingImages,
    ) -> None:
        self.every = config.every
        phases = updates // self.every
        if not phases:
            raise SettingsError(f"every: expected at most updates = {updates}, got {self.every}")
        self.steps = max(1, config.steps // phases)
        settings = replace(config, steps=self.steps * phases)
        generator = torch.Generator().manual_seed(config.seed + 1)  # other noise than the updates'
        self.explorer = ExploringPolicy(actor, generator, actions)
        self.tuner = FineTuner(
            backbone, images.dataset, settings, self.explorer, generator, images.game.sites, images.device,
            images.processes, images,
        )  # fmt: skip

    def after(self, update: int) -> dict[str, float]:
        """Fine-tune if a phase is due.

        Args:
            update: how many are done.

        Returns:
            Mean metrics of the phase by name; empty if there was none.
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
        """All that the coming phases depend on, but for the place in the data, which the run saves."""
        return {name: value for name, value in self.tuner.state().items() if name != "images"}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from the result of `state`."""
        self.tuner.restore({**state, "images": self.tuner.images.state()})
