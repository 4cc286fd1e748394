"""Fine-tune a network on what its policy leaves of the images: the second half of Algorithm 1 (paper 000).

The policy is frozen, the pruned forward runs packed and is differentiable, so no masks are needed. Any policy can be
fine-tuned with, learnt or heuristic; those with a keep rate may anneal it, as EViT and paper 001 do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset
from tqdm import tqdm

from ..backbone import Backbone
from ..errors import CheckpointError, NumericalError
from ..game import TokenGame
from ..policy import Policy
from ..rollout import play
from ..storage import PathLike, load_state, save_state
from ..tokens import TokenState
from ..types import Site
from .finetune_config import CosineKeepRate, FinetuneConfig
from .images import BatchedDataset, TrainingImages
from .parallel import Processes

__all__ = ["CosineKeepRate", "FineTuner", "FinetuneConfig", "FinetuneResult", "finetune", "save_weights"]

STATE_FILE = "finetuning.safetensors"
WEIGHTS_FILE = "backbone.safetensors"


@dataclass(frozen=True)
class FinetuneResult:
    """What fine-tuning leaves behind."""

    backbone: Backbone  # a fine-tuned copy
    history: tuple[dict[str, float], ...]  # one row per step: loss, accuracy, gmacs, keep_rate, lr


class FineTuner:
    """Takes gradient steps of a network, in place, on batches that a policy has pruned.

    Args:
        backbone: the network that learns.
        dataset: training images with labels.
        config: settings.
        sites: where the policy prunes; None: where it wants to.
        wishes: the policy, or one like it, whose evidence and attention bias the game must serve.
        generator: a CPU generator, chooses images.
        device: where to train.
        processes: with whom the images of a step are shared.
        images: where batches come from, if something else plays them, too, up to the same first site; None: made anew
            from the dataset.
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
        self.backbone = backbone.to(device)
        self.teacher = deepcopy(self.backbone).eval().requires_grad_(False) if config.distill else None
        where = {} if sites is None else {"sites": sites}
        self.game = TokenGame.for_policy(self.backbone, wishes, grad=True, **where)
        early = config.trainable == "after_first_site"
        self._parameters = self._late_parameters() if early else list(self.backbone.model.named_parameters())
        if images is None:
            cached = config.cache_images if early else 0
            with torch.no_grad():  # the tokens that are kept need no history
                images = TrainingImages(dataset, self.game, cached, generator, device, self.processes)
        self.images = images
        self.optimizer = create_optimizer_v2(
            cast(Any, self._parameters), opt=config.opt, lr=config.lr, weight_decay=config.weight_decay
        )
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer,
            sched=config.sched,
            num_epochs=max(1, config.steps - config.warmup_steps),
            warmup_epochs=config.warmup_steps,
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
        lr = self.optimizer.param_groups[0]["lr"]
        training = self.backbone.training
        self.backbone.train()
        try:
            with torch.random.fork_rng():  # stochastic depth and dropout draw from torch's global generator
                torch.manual_seed((self.config.seed * 1_000_003 + self.steps_done) * 1_009 + self.processes.rank)
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
        """All that the coming steps depend on, but for the generator."""
        return {
            "model": self.backbone.model.state_dict(),
            "teacher": {} if self.teacher is None else self.teacher.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "images": self.images.state(),
            "steps": self.steps_done,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
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

    def _late_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        """Parameters that act after the first site; the others are frozen."""
        first = self.game.sites[0]
        late = [f"blocks.{number}." for number in range(first.block, self.backbone.depth)]
        if first.inside:  # of its block, only the MLP half comes after it
            late += [f"blocks.{first.block - 1}.{part}" for part in ("norm2.", "mlp.", "ls2.")]
        after = (*late, "norm.", "fc_norm.", "head.", "head_dist.")
        named = list(self.backbone.model.named_parameters())
        for name, value in named:
            value.requires_grad_(name.startswith(after))
        return [(name, value) for name, value in named if value.requires_grad]

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


def finetune(
    backbone: Backbone,
    policy: Policy,
    dataset: BatchedDataset | Dataset[Any],
    schedule: Callable[[float], float] | None = None,
    config: FinetuneConfig | None = None,
    *,
    sites: Sequence[int | str | Site] | None = None,
    output: PathLike | None = None,
    device: str | torch.device = "cpu",
    progress: bool = True,
    resume: bool = False,
    processes: Processes | None = None,
) -> FinetuneResult:
    """Fine-tune a copy of a network with a frozen policy: cross-entropy on the pruned forward (Algorithm 1).

    Args:
        backbone: the network; left as it is.
        policy: decides what is pruned.
        dataset: training images, normalised as the network wants them, with labels.
        schedule: keep rate by progress (0 to 1), such as `CosineKeepRate(0.7)`, for policies that have a `keep_rate`;
            None: the policy as it is.
        config: settings; None: the defaults.
        sites: where to prune; None: where the policy wants to.
        output: folder for checkpoints and, in the end, `backbone.safetensors`, which
            `load_backbone(name, checkpoint=...)` reads; None: nothing is written.
        device: where to train.
        progress: whether to show a progress bar.
        resume: whether to go on from the checkpoint in `output`; on an empty folder training starts afresh.
        processes: those that train together; each gets the same arguments and the same result.

    Returns:
        The fine-tuned copy, in evaluation mode, and the history.

    Raises:
        ValueError: for a schedule with a policy that has no keep rate, or `resume` without `output`.
        CheckpointError: for a checkpoint that cannot be read or belongs to other settings.
        NumericalError: for a loss or gradient that is not finite; the last checkpoint is kept.
    """
    config = FinetuneConfig() if config is None else config
    folder = None if output is None else Path(output)
    if resume and folder is None:
        raise ValueError("resume: expected an output folder to resume from, got output=None")
    scheduled = (lambda _: policy) if schedule is None else _scheduled(policy, schedule)
    generator = torch.Generator().manual_seed(config.seed)
    student = deepcopy(backbone)
    processes = Processes() if processes is None else processes
    tuner = FineTuner(student, dataset, config, scheduled(0.0), generator, sites, device, processes)
    history: list[dict[str, float]] = []
    state_file = None if folder is None else folder / STATE_FILE
    if resume and state_file is not None and state_file.exists():
        history = _resume(state_file, tuner, config, generator)
    with tqdm(total=config.steps, initial=len(history), disable=not progress, desc="fine-tune", unit="step") as bar:
        for step in range(len(history), config.steps):
            rate = {} if schedule is None else {"keep_rate": schedule(step / config.steps)}
            history.append({**tuner.step(scheduled(step / config.steps)), **rate})
            bar.set_postfix({name: f"{value:.4g}" for name, value in history[-1].items()})
            bar.update()
            due = (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps
            if state_file is not None and processes.is_main and due:
                state = {"config": vars(config), "tuner": tuner.state(), "generator": generator.get_state()}
                save_state({**state, "history": history}, state_file, kind="fine-tuning")
    if folder is not None and processes.is_main:
        save_weights(student, folder / WEIGHTS_FILE)
    return FinetuneResult(student.eval(), tuple(history))


def save_weights(backbone: Backbone, path: Path) -> Path:
    """Write the network's weights under timm's names, for `load_backbone(name, checkpoint=path)`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = backbone.model.state_dict()
    save_file({name: value.detach().cpu().contiguous().clone() for name, value in state.items()}, path)
    return path


def _resume(path: Path, tuner: FineTuner, config: FinetuneConfig, generator: torch.Generator) -> list[dict[str, float]]:
    state = load_state(path, kind="fine-tuning")
    others = [field.name for field in fields(config) if state["config"].get(field.name) != getattr(config, field.name)]
    if others:
        raise CheckpointError(
            f"{path}: expected a checkpoint of the same run to resume, got one with other {', '.join(others)}"
        )
    tuner.restore(state["tuner"])
    generator.set_state(state["generator"])
    return list(state["history"])


def _scheduled(policy: Policy, schedule: Callable[[float], float]) -> Callable[[float], Policy]:
    """The policy with the keep rate that a schedule gives."""
    if not is_dataclass(policy) or "keep_rate" not in {field.name for field in fields(policy)}:
        raise ValueError(
            f"schedule: expected a policy with a keep_rate, got {type(policy).__name__}; pass schedule=None"
        )
    return lambda progress: replace(cast(Any, policy), keep_rate=schedule(progress))
