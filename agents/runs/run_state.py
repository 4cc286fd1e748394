"""What a checkpoint holds: all that the coming updates of a run depend on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch.optim.lr_scheduler import LambdaLR, LRScheduler

if TYPE_CHECKING:
    from .trainer import Run


def facts(run: Run) -> dict[str, Any]:
    """What a run that is resumed must have in common with its checkpoint, beside its settings."""
    return {"backbone": run.game.backbone.name, "dataset_size": run.images.size}


def state_of(run: Run) -> dict[str, Any]:
    """Networks, value normalisation, optimiser, learning-rate schedule, random stream, place in the data, price.

    Exploration needs no state: its noise follows from the seed and the number of the update.
    """
    return {
        "config": run.config.as_json(),
        **facts(run),
        "target_macs": run.target,
        "algorithm": run.algorithm.state_dict(),
        "lr_schedule": [_plain(scheduler.state_dict()) for scheduler in run.algorithm.lr_schedulers],
        "generator": run.generator.get_state(),
        "images": run.images.state(),
        "schedule": run.schedule.state(),
        "finetune": {} if run.alternation is None else run.alternation.state(),
        "collapse_streak": run.collapse.streak,
        "history": run.history,
    }


def restore(run: Run, state: Mapping[str, Any]) -> None:
    """Go on from what `state_of` gave.

    Args:
        run: made with the same settings; another learning rate than before takes effect at once.
        state: of the same run.
    """
    run.algorithm.load_state_dict(dict(state["algorithm"]))  # tianshou pops the optimisers from what it is given
    for scheduler, saved in zip(run.algorithm.lr_schedulers, state["lr_schedule"], strict=True):
        scheduler.load_state_dict({**scheduler.state_dict(), **saved})
        if any(base != run.config.lr for base in scheduler.base_lrs):
            _set_lr(scheduler, run.config.lr)
    run.generator.set_state(state["generator"])
    run.images.restore(state["images"])
    run.schedule.restore(state["schedule"])
    if run.alternation is not None:
        run.alternation.restore(state["finetune"])
    run.collapse.streak = state["collapse_streak"]
    run.history = list(state["history"])
    run.collector.played = run.updates_done * run.config.images


def _set_lr(scheduler: LRScheduler, lr: float) -> None:
    assert isinstance(scheduler, LambdaLR)
    scheduler.base_lrs = [lr for _ in scheduler.base_lrs]
    for group, factor in zip(scheduler.optimizer.param_groups, scheduler.lr_lambdas, strict=True):
        group["initial_lr"], group["lr"] = lr, lr * factor(scheduler.last_epoch)


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    """What of a scheduler's state is numbers; its functions are made anew."""
    return {name: value for name, value in state.items() if name != "lr_lambdas"}
