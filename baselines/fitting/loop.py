"""One training loop for every baseline that has something to train.

`fit_task` draws batches, optimises the loss of a `FitTask`, validates on held-out training images, stops early, and
writes checkpoints. A fit that was interrupted and resumed ends with the same bits as an uninterrupted one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from math import cos, isfinite, pi
from pathlib import Path
from typing import Any, Literal, Self

import torch
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from tqdm import tqdm

from ...data import ImageDataset, fetch
from ...errors import CheckpointError, NumericalError
from ...files import PathLike, load_state, locked, prepare_folder, save_state
from ..argument_checks import check_fields
from .inputs import PreparedTokens
from .task import FitTask, Row

STATE_FILE = "fit.safetensors"
KIND = "fit"


@dataclass(frozen=True)
class FitConfig:
    """How to train; methods have their own defaults."""

    epochs: int = 1
    """Passes over the training images; an epoch's last, smaller batch is left out."""
    steps: int | None = None
    """Optimiser steps instead of epochs."""
    batch_size: int = 64
    """Images per step."""
    optimizer: str = "adamw"
    """timm's name of it: adamw, sgd, lamb, ..."""
    lr: float = 1e-3
    """Learning rate at the peak."""
    momentum: float = 0.9
    """Of the optimiser, where it has one; 0 with `"sgd"`: plain gradient descent."""
    weight_decay: float = 0.0
    """Of all parameters, unless their group has its own."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """How the learning rate falls to 0 over the steps."""
    warmup: float = 0.0
    """Share of the steps, from the first on, in which the learning rate rises linearly."""
    clip_norm: float | None = 1.0
    """Largest norm of the gradient; None: no clipping."""
    validation: int = 256
    """Training images that are held out for validation; 0: none, and the parameters of the last step are kept."""
    validate_every: int = 50
    """Steps between validations; the last step always validates."""
    patience: int | None = None
    """Validations in a row without a smaller loss after which training stops; None: never."""
    checkpoint_every: int = 50
    """Steps between checkpoints; the last one is always written."""
    seed: int = 0
    """Of the order of the images, and of random numbers in the loss."""

    def __post_init__(self) -> None:
        names = ("epochs", "batch_size", "validate_every", "checkpoint_every")
        check_fields(self, names, lambda value: value >= 1, "at least 1")
        check_fields(self, ("steps", "patience"), lambda value: value is None or value >= 1, "at least 1 or None")
        check_fields(self, ("lr", "clip_norm"), lambda value: value is None or value > 0, "above 0")
        check_fields(self, ("momentum", "warmup"), lambda value: 0 <= value < 1, "0 to 1, 1 left out")
        check_fields(self, ("weight_decay", "validation", "seed"), lambda value: value >= 0, "at least 0")
        schedules = ("constant", "linear", "cosine")
        check_fields(self, ("schedule",), lambda value: value in schedules, "constant, linear or cosine")

    def quick(self, steps: int = 4) -> Self:
        """The same settings with very few steps and images, for tests of the whole fit."""
        return replace(self, steps=steps, batch_size=min(16, self.batch_size), validation=min(16, self.validation))

    def lr_factor(self, step: int, steps: int) -> float:
        """Factor on the learning rate in step `step` (from 0) of `steps`."""
        rise = round(self.warmup * steps)
        if step < rise:
            return (step + 1) / (rise + 1)
        part = (step - rise) / max(1, steps - rise)
        return {"constant": 1.0, "linear": 1 - part, "cosine": (1 + cos(pi * part)) / 2}[self.schedule]


@dataclass(frozen=True)
class FitResult:
    """The course of a fit; the trained parameters are in the task."""

    history: tuple[Row, ...]  # one row per step, with validation/... entries where it was validated
    best: Row  # the row whose parameters were kept: that of the smallest validation/loss, or of the last step
    steps: int  # optimiser steps done
    stopped_early: bool


def fit_task(
    task: FitTask,
    data: ImageDataset,
    config: FitConfig | None = None,
    *,
    output: PathLike | None = None,
    resume: bool = False,
    progress: bool = True,
    device: str | torch.device = "cpu",
    settings: Mapping[str, Any] | None = None,
) -> FitResult:
    """Train a task.

    Args:
        task: what to train; afterwards it holds the parameters of the best validation.
        data: labelled inputs of the task's loss, images or `PreparedTokens`.
        config: settings; None: the defaults.
        output: folder for checkpoints; None: nothing is written.
        resume: whether to continue from the checkpoint in `output`; in an empty folder training starts from step 1.
        progress: whether to show a progress bar.
        device: where the batches are moved.
        settings: JSON values that must be equal in a checkpoint to be resumed, such as the method's own parameters.

    Returns:
        What was logged and which step was best.

    Raises:
        ValueError: for `resume` without `output`, or too few images.
        StorageError: for an `output` that cannot be written, or that another process writes to.
        CheckpointError: for a checkpoint that cannot be read or belongs to another fit.
        NumericalError: for a loss or gradient that is not finite; the last good checkpoint stays.
    """
    if resume and output is None:
        raise ValueError("resume: expected an output folder to resume from, got output=None")
    if output is not None:
        prepare_folder(Path(output))
    with nullcontext() if output is None else locked(Path(output)):
        run = _Run(task, data, FitConfig() if config is None else config, output, torch.device(device), settings or {})
        if resume:
            run.resume()
        return run.learn(progress)


class _Run:
    """One fit; its checkpoints hold everything that later steps depend on."""

    def __init__(
        self,
        task: FitTask,
        data: ImageDataset,
        config: FitConfig,
        output: PathLike | None,
        device: torch.device,
        settings: Mapping[str, Any],
    ) -> None:
        self.task, self.data, self.config, self.device = task, data, config, device
        self.path = None if output is None else Path(output) / STATE_FILE
        identity = {"task": type(task).__name__, "images": len(data), **asdict(config), **settings}
        self.identity = json.loads(json.dumps(identity))  # as it is read back from a file
        self.generator = torch.Generator().manual_seed(config.seed)
        chosen = torch.randperm(len(data), generator=self.generator)
        self.held_out, self.training = chosen[: config.validation], chosen[config.validation :]
        if len(self.training) < config.batch_size:
            raise ValueError(
                f"data: expected at least validation + batch_size = {config.validation} + {config.batch_size} images, "
                f"got {len(data)}"
            )
        if output is not None:
            self.identity["first_image"] = _digest(data)
        self.optimizer = _optimizer(task, config)
        self.base_lr = [group["lr"] for group in self.optimizer.param_groups]
        self.per_epoch = len(self.training) // config.batch_size
        self.steps = config.epochs * self.per_epoch if config.steps is None else config.steps
        self.order = torch.empty(0, dtype=torch.int64)  # of this epoch
        self.history: list[Row] = []
        self.best: Row = {}
        self.best_state: Any = None
        self.waiting = 0  # validations since the best one
        self.validation: list[tuple[Tensor, Tensor]] | None = None

    @property
    def stopped_early(self) -> bool:
        return self.config.patience is not None and self.waiting >= self.config.patience

    def learn(self, progress: bool) -> FitResult:
        """Do the remaining steps, then restore the best parameters."""
        with tqdm(total=self.steps, initial=len(self.history), desc="fit", unit="step", disable=not progress) as bar:
            while len(self.history) < self.steps and not self.stopped_early:
                row = self.step()
                self.history.append(row)
                done = len(self.history)
                if self.held_out.numel() and (done % self.config.validate_every == 0 or done == self.steps):
                    self.validate(row)
                if done % self.config.checkpoint_every == 0 or done == self.steps or self.stopped_early:
                    self.save()
                shown = {name: value for name, value in row.items() if name != "step"}
                bar.set_postfix({**shown, "best": self.best.get("validation/loss")}, refresh=False)
                bar.update()
        if self.best_state is not None:
            self.task.load_state_dict(self.best_state)
        return FitResult(tuple(self.history), self.best or self.history[-1], len(self.history), self.stopped_early)

    def step(self) -> Row:
        """Do one optimiser step and return its row."""
        number = len(self.history)
        for group, lr in zip(self.optimizer.param_groups, self.base_lr, strict=True):
            group["lr"] = lr * self.config.lr_factor(number, self.steps)
        self.optimizer.zero_grad()
        images, labels = self.take(self.draw(number))
        loss, metrics = self.task.loss(images, labels, self.generator)
        self.refuse_nan("loss", loss, number)
        loss.backward()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        largest = float("inf") if self.config.clip_norm is None else self.config.clip_norm
        self.refuse_nan("gradient", nn.utils.clip_grad_norm_(parameters, largest), number)
        self.optimizer.step()
        self.task.after_step()
        return {"step": float(number + 1), "loss": float(loss.detach()), **metrics}

    def draw(self, number: int) -> Tensor:
        """The images of step `number`; the order of an epoch, in which each image comes once, is drawn at its start."""
        position = number % self.per_epoch
        if position == 0:
            self.order = self.training[torch.randperm(len(self.training), generator=self.generator)]
        return self.order[position * self.config.batch_size :][: self.config.batch_size]

    def take(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Images and labels of these rows of the data, on the device."""
        images, labels = fetch(self.data, rows)
        return images.to(self.device), labels.to(self.device)

    def validate(self, row: Row) -> None:
        """Add validation metrics to a row; remember the parameters if they are the best so far."""
        if self.validation is None:
            self.validation = [self.take(rows) for rows in self.held_out.split(self.config.batch_size)]
        found = self.task.validate(self.validation)
        self.refuse_nan("validation loss", torch.tensor(found["loss"]), len(self.history) - 1)
        row.update({f"validation/{name}": value for name, value in found.items()})
        self.waiting += 1
        if not self.best or row["validation/loss"] < self.best["validation/loss"]:
            self.best, self.waiting = dict(row), 0
            self.best_state = deepcopy(self.task.state_dict())

    def refuse_nan(self, what: str, value: Tensor, number: int) -> None:
        """Raise `NumericalError` for a number that is not finite."""
        found = float(value.detach())
        if isfinite(found):
            return
        kept = "no checkpoint was asked for"
        if self.path is not None:
            kept = f"the last good checkpoint is {self.path}" if self.path.exists() else "there is no checkpoint yet"
        raise NumericalError(f"{what}: expected a finite number, got {found} in step {number + 1}; {kept}")

    def save(self) -> None:
        """Write a checkpoint, if there is an output folder."""
        if self.path is None:
            return
        state = {
            "identity": self.identity,
            "task": self.task.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "order": self.order,
            "history": self.history,
            "best": self.best,
            "best_state": self.best_state,
            "waiting": self.waiting,
        }
        save_state(state, self.path, KIND)

    def resume(self) -> None:
        """Continue from the checkpoint in the output folder, if there is one."""
        assert self.path is not None
        if not self.path.exists():
            return
        state = load_state(self.path, KIND)
        saved = state.get("identity", {})
        other = sorted(key for key in self.identity | saved if self.identity.get(key) != saved.get(key))
        if other:
            raise CheckpointError(f"{self.path}: expected a checkpoint of the same fit to resume, got another {other}")
        try:
            self.task.load_state_dict(state["task"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.generator.set_state(state["generator"])
            self.order, self.history, self.best = state["order"], state["history"], state["best"]
            self.best_state, self.waiting = state["best_state"], state["waiting"]
        except (KeyError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{self.path}: a fit whose content does not fit together ({error})") from error


def _digest(data: ImageDataset) -> str:
    """A short name for the first image: of other data, or other views of it, it is another.

    Tokens are named after the image that they are made of, as their own last bits depend on the number of threads.
    """
    images, _ = fetch(data.dataset if isinstance(data, PreparedTokens) else data, [0])
    return sha256(images.cpu().contiguous().numpy().tobytes()).hexdigest()[:16]


def _optimizer(task: FitTask, config: FitConfig) -> torch.optim.Optimizer:
    """timm's optimiser of that name; `"sgd"` without momentum is timm's `"momentum"` at 0, without Nesterov's term."""
    name = "momentum" if config.optimizer == "sgd" and not config.momentum else config.optimizer
    parameters: Any = list(task.parameters())
    return create_optimizer_v2(
        parameters, opt=name, lr=config.lr, weight_decay=config.weight_decay, momentum=config.momentum
    )
