"""Gradient steps of a network on the tokens that a policy keeps, in one process or several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any, cast

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from ...engine.backbone import Backbone
from ...engine.tokens import TokenState
from ...errors import NumericalError
from ...game.rollout import play
from ...game.token_game import TokenGame
from ...policy import Policy
from ...types import Site
from ..shared.processes import Processes
from ..shared.training_images import BatchedDataset, TrainingImages
from .settings import FinetuneConfig, LastBlocks


class FineTuner:
    """Takes gradient steps of a network, in place, on batches that a policy has pruned.

    Args:
        backbone: the network that learns.
        dataset: training images with labels.
        config: settings.
        sites: where the policy prunes; None: where it wants to.
        wishes: the policy, or one with the same evidence and attention bias; the game provides both.
        generator: a CPU generator, chooses images.
        device: where to train.
        processes: the processes that share the images of a step.
        images: where batches come from, if they are already prepared for the same first site; None: made from the
            dataset.

    Raises:
        ValueError: for fewer images per step than processes, or more blocks to train than the network has.
    """

    def __init__(
        self,
        backbone: Backbone,
        dataset: BatchedDataset | Dataset[Any],
        config: FinetuneConfig,
        wishes: Policy,
        generator: torch.Generator,
        sites: Sequence[int | str | Site] | None = None,
        device: str | torch.device = "cpu",
        processes: Processes | None = None,
        images: TrainingImages | None = None,
    ) -> None:
        self.config = config
        self.processes = Processes() if processes is None else processes
        if config.batch_size < self.processes.size:
            raise ValueError(
                f"batch_size: expected at least one image for each of {self.processes.size} processes, "
                f"got {config.batch_size}"
            )
        self.backbone = backbone.to(device)
        self.teacher = deepcopy(self.backbone).eval().requires_grad_(False) if config.distill else None
        where = {} if sites is None else {"sites": sites}
        self.game = TokenGame.for_policy(self.backbone, wishes, grad=True, **where)
        early = config.trainable == "after_first_site"
        self._parameters = self._learning()
        if images is None:
            cached = config.cache_images if early else 0
            with torch.no_grad():  # the tokens that are kept need no history
                images = TrainingImages(dataset, self.game, cached, generator, device, self.processes)
        self.images = images
        some = config.trainable if isinstance(config.trainable, LastBlocks) else None
        self.optimizer = create_optimizer_v2(
            cast(Any, self._parameters if some is None else self.backbone.model),
            opt=config.opt,
            lr=config.lr,
            weight_decay=config.weight_decay,
            layer_decay=None if some is None else some.layer_decay,
        )
        warmup = min(config.warmup_steps, config.steps // 5)  # a short run has to reach its learning rate, too
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer,
            sched=config.sched,
            num_epochs=max(1, config.steps - warmup),
            warmup_epochs=warmup,
            warmup_prefix=True,
            warmup_lr=min(config.min_lr, config.lr),
            min_lr=config.min_lr,
        )
        self.steps_done = 0
        self._schedule()

    def step(self, policy: Policy) -> dict[str, float]:
        """One gradient step on the next images.

        Returns:
            `loss`, `accuracy`, `gmacs`, `lr`.

        Raises:
            NumericalError: if loss or gradient is not finite; the weights are then as before the step.
        """
        batch, labels = self.images.draw(self.config.batch_size)
        lr = max(group["lr"] for group in self.optimizer.param_groups)
        training = self.backbone.training
        self.backbone.train()
        try:
            with torch.random.fork_rng(
                self._own_gpu
            ):  # stochastic depth and dropout draw from torch's global generator
                torch.manual_seed((self.config.seed * 1_000_003 + self.steps_done) * 1_009 + self.processes.rank)
                with torch.autocast(self.images.device.type, torch.bfloat16, enabled=self.config.amp):
                    outcome = play(self.game, policy, batch, labels).outcome
                    loss = self._loss(outcome.logits, labels, batch) * len(labels) / self.config.batch_size
            self._descend(loss)
        finally:
            self.backbone.train(training)
        self.steps_done += 1
        self._schedule()
        everyone = self.processes.gather
        accuracy = float(everyone(outcome.logits.argmax(dim=1) == labels).double().mean())
        gmacs = float(everyone(outcome.macs).mean()) / 1e9
        return {"loss": float(self.processes.sum(loss.detach())), "accuracy": accuracy, "gmacs": gmacs, "lr": lr}

    def _descend(self, loss: Tensor) -> None:
        """One step of the optimiser down the sum of all processes' losses."""
        parameters = [value for _, value in self._parameters]
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.processes.sum_gradients(parameters)
        largest = self.config.max_grad_norm
        norm = torch.nn.utils.clip_grad_norm_(parameters, float("inf") if largest is None else largest)
        if not torch.isfinite(norm):
            raise NumericalError(
                f"fine-tuning: loss {float(loss.detach()):.4g}, gradient norm {float(norm):.4g} in step "
                f"{self.steps_done + 1}; lower lr or max_grad_norm"
            )
        self.optimizer.step()

    def state(self) -> dict[str, Any]:
        """All that the coming steps depend on, except the generator."""
        return {
            "model": self.backbone.model.state_dict(),
            "teacher": {} if self.teacher is None else self.teacher.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "images": self.images.state(),
            "steps": self.steps_done,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from the result of `state`."""
        self.backbone.model.load_state_dict(state["model"])
        if self.teacher is not None:
            self.teacher.model.load_state_dict(state["teacher"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.images.restore(state["images"])
        self.steps_done = int(state["steps"])
        self._schedule()

    def _schedule(self) -> None:
        """Set the learning rate of the coming step."""
        assert self.scheduler is not None
        self.scheduler.step(self.steps_done)

    @property
    def _own_gpu(self) -> list[torch.device]:
        """The GPU of this process, if it has one."""
        return [self.images.device] if self.images.device.type == "cuda" else []

    def _learning(self) -> list[tuple[str, torch.nn.Parameter]]:
        """Parameters that learn; the others are frozen, whatever an earlier fine-tuning has left frozen."""
        named = list(self.backbone.model.named_parameters())
        late = ("",) if self.config.trainable == "all" else self._late_names()
        for name, value in named:
            value.requires_grad_(name.startswith(late))
        return [(name, value) for name, value in named if value.requires_grad]

    def _late_names(self) -> tuple[str, ...]:
        """What the names of parameters in the last blocks, or of those that act after the first site, begin with."""
        first, family, depth = self.game.sites[0], self.backbone.family, self.backbone.depth
        some = self.config.trainable
        if isinstance(some, LastBlocks):
            if some.count > depth:
                raise ValueError(f"trainable: expected at most {depth} blocks, all of the network, got {some.count}")
            return (*(f"blocks.{number}." for number in range(depth - some.count, depth)), *family.end_parts)
        late = [f"blocks.{number}." for number in range(first.block, depth)]
        if first.inside:  # of its block, only the MLP half comes after it
            late += [f"blocks.{first.block - 1}.{part}" for part in family.mlp_parts]
        return (*late, *family.end_parts)

    def _loss(self, logits: Tensor, labels: Tensor, batch: Tensor | TokenState) -> Tensor:
        """Cross-entropy, mixed with the Kullback-Leibler divergence from the dense model's answer."""
        config = self.config
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=config.label_smoothing)
        if self.teacher is None:
            return loss
        with torch.no_grad():
            state = batch if isinstance(batch, TokenState) else self.teacher.embed(batch)
            dense = self.teacher.classify(self.teacher.run(state, 2 * self.teacher.depth)[0]).float()
        soft = F.kl_div(
            (logits.float() / config.temperature).log_softmax(dim=1),
            (dense / config.temperature).log_softmax(dim=1),
            reduction="batchmean",
            log_target=True,
        )
        return (1 - config.distill) * loss + config.distill * config.temperature**2 * soft
