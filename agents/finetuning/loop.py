"""Fine-tune a network on what its policy leaves of the images: the second half of Algorithm 1 (RL4EViT).

The policy is frozen. The pruned forward pass runs packed and is differentiable, so that no masks are needed. Any policy
will do, learnt or heuristic; the keep rate of those that have one may fall during training, as in EViT and in Long et
al. (2023).
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from copy import copy, deepcopy
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from ...engine.backbone import Backbone
from ...errors import CheckpointError
from ...files import PathLike, load_state, locked, make_way, prepare_folder, save_state
from ...models.load import save_backbone, weights_digest
from ...policy import Policy, check_keep_rate
from ...types import Site
from ..shared.processes import Processes
from ..shared.signals import StopSignals, TrainingStopped
from ..shared.training_images import BatchedDataset
from ..shared.writers import HistoryFile
from .settings import CosineKeepRate, FinetuneConfig, LastBlocks
from .step import FineTuner

__all__ = ["CosineKeepRate", "FineTuner", "FinetuneConfig", "FinetuneResult", "LastBlocks", "finetune"]

STATE_FILE = "finetuning.safetensors"
WEIGHTS_FILE = "backbone.safetensors"
RESULTS = (WEIGHTS_FILE, STATE_FILE)


@dataclass(frozen=True)
class FinetuneResult:
    """What fine-tuning leaves behind."""

    backbone: Backbone  # a fine-tuned copy
    history: tuple[dict[str, float], ...]  # one row per step: loss, accuracy, gmacs, keep_rate, lr


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
    overwrite: bool = False,
    processes: Processes | None = None,
    after_step: Callable[[int, Backbone], Mapping[str, float]] | None = None,
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
        output: folder for checkpoints, `history.jsonl` and, in the end, `backbone.safetensors`, which
            `load_backbone(name, checkpoint=...)` reads; None: nothing is written. With it, SIGTERM and Ctrl-C let the
            current step finish and save.
        device: where to train.
        progress: whether to show a progress bar.
        resume: whether to go on from the checkpoint in `output`; on an empty folder training starts afresh.
        overwrite: whether to replace a run that is in `output`, which is refused otherwise.
        processes: those that train together; each gets the same arguments and the same result.
        after_step: called with the number of steps done and the network; what it returns joins the step's row of the
            history.

    Returns:
        The fine-tuned copy, in evaluation mode, and the history.

    Raises:
        TrainingStopped: (a `SystemExit`) after a signal, once everything is saved.
        StorageError: for an `output` that cannot be written, at once; when the disk is full, as soon as it is.
        ValueError: for a schedule with a policy that has no keep rate, `resume` without `output`, an `output` that
            holds a run, or fewer images per step than processes.
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
    state_file = None if folder is None else _prepared(folder, resume, overwrite, processes)
    tuner = FineTuner(student, dataset, config, scheduled(0.0), generator, sites, device, processes)
    facts = {} if folder is None else _facts(tuner, policy)
    drawn = getattr(policy, "generator", None)  # policies such as RandomDrop draw from a stream of their own
    streams = [generator, *([drawn] if isinstance(drawn, torch.Generator) else [])]
    history: list[dict[str, float]] = []
    if resume and state_file is not None and state_file.exists():
        history = _resume(state_file, tuner, facts, streams)
    bar = tqdm(total=config.steps, initial=len(history), disable=not progress, desc="fine-tune", unit="step")
    signals = StopSignals(grace=1.0 if processes.size > 1 else 0.0)
    alone = locked(folder) if folder is not None and processes.is_main else nullcontext()
    with alone, bar, nullcontext() if state_file is None else signals:
        for step in range(len(history), config.steps):
            rate = {} if schedule is None else {"keep_rate": schedule(step / config.steps)}
            history.append({**tuner.step(scheduled(step / config.steps)), **rate})
            if after_step is not None:
                history[-1].update(after_step(step + 1, student))
            bar.set_postfix({name: f"{value:.4g}" for name, value in history[-1].items()})
            bar.update()
            done, number = step + 1, processes.largest(signals.received)
            due = number or done % config.checkpoint_every == 0 or done == config.steps
            if state_file is not None and processes.is_main and due:
                random = [stream.get_state() for stream in streams]
                state = {**facts, "tuner": tuner.state(), "random": random, "history": history}
                save_state(state, state_file, kind="fine-tuning")
                HistoryFile(state_file.parent, history)
            if number and done < config.steps:
                name = signal.Signals(number).name
                raise TrainingStopped(f"{name}: fine-tuning stopped after step {done} of {config.steps}, saved", number)
    if folder is not None and processes.is_main:
        save_backbone(student, folder / WEIGHTS_FILE)
    for mine, given in zip(student.parameters(), backbone.parameters(), strict=True):
        mine.requires_grad_(given.requires_grad)  # as it was before fine-tuning froze some of them
    return FinetuneResult(student.eval(), tuple(history))


def _prepared(folder: Path, resume: bool, overwrite: bool, processes: Processes) -> Path:
    """Check that the folder can be written and holds no run, unless it is resumed; the checkpoint's path."""
    if processes.is_main:
        prepare_folder(folder)
        if not resume:
            make_way(folder, RESULTS, overwrite)
    return folder / STATE_FILE


def _facts(tuner: FineTuner, policy: Policy) -> dict[str, Any]:
    """What a run that is resumed must have in common with its checkpoint."""
    return {
        "config": asdict(tuner.config),
        "backbone": tuner.backbone.name,
        "weights": weights_digest(tuner.backbone),
        "dataset_size": tuner.images.size,
        "first_image": tuner.images.digest,
        "policy": type(policy).__name__,
        "sites": [site.label for site in tuner.game.sites],
    }


def _resume(
    path: Path, tuner: FineTuner, facts: Mapping[str, Any], streams: Sequence[torch.Generator]
) -> list[dict[str, float]]:
    state = load_state(path, kind="fine-tuning")
    before, now = state.get("config", {}), facts["config"]
    fixed = [field.name for field in fields(FinetuneConfig) if field.name not in FinetuneConfig.may_change]
    others = [name for name in fixed if before.get(name) != now[name]]
    others += [name for name, value in facts.items() if name != "config" and state.get(name) != value]
    if others:
        raise CheckpointError(
            f"{path}: expected a checkpoint of the same run to resume, got one with other {', '.join(others)}"
        )
    tuner.restore(state["tuner"])
    for stream, saved in zip(streams, state["random"], strict=True):
        stream.set_state(saved)
    return list(state["history"])


def _scheduled(policy: Policy, schedule: Callable[[float], float]) -> Callable[[float], Policy]:
    """The policy, sharing its weights and its random stream, with the keep rate that a schedule gives."""
    if not hasattr(policy, "keep_rate"):
        raise ValueError(
            f"schedule: expected a policy with a keep_rate, got {type(policy).__name__}; pass schedule=None"
        )

    def at(progress: float) -> Policy:
        rate, made = schedule(progress), copy(policy)
        check_keep_rate(rate)
        object.__setattr__(made, "keep_rate", rate)  # also where the policy is a frozen dataclass
        return made

    return at
