"""tianshou logger of a run: its history, its progress bar, and TensorBoard if there is an output folder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tianshou.utils import LazyLogger, TensorboardLogger
from tqdm import tqdm

AfterUpdate = Callable[[dict[str, Any], dict[str, float]], dict[str, float]]


class RunLog(LazyLogger):
    """Passes every update on, and tells tianshou's trainer where a resumed run stands.

    Args:
        after_update: gets what was played and what was learnt, returns the row to show and log.
        updates: of the whole run.
        done: updates done before.
        steps: environment steps (images times sites) of an update.
        save_every: updates between checkpoints; the last update is always saved.
        tensorboard: where to write besides; None: nowhere.
        progress: whether to show a bar.
    """

    def __init__(
        self,
        after_update: AfterUpdate,
        updates: int,
        done: int,
        steps: int,
        save_every: int,
        tensorboard: TensorboardLogger | None,
        progress: bool,
    ) -> None:
        super().__init__()
        self.after_update = after_update
        self.updates = updates
        self.save_every = save_every
        self.tensorboard = tensorboard
        self.resume_from = (done, done * steps, done)
        self._bar = tqdm(total=updates, initial=done, desc="train", unit="update", disable=not progress)
        self._learnt: dict[str, float] = {}

    def log_update_data(self, log_data: dict[str, Any], step: int) -> None:
        """Called after the gradient steps of an update, before `log_training_data`."""
        self._learnt = {name: _mean(log_data[name]) for name in log_data if name in _LEARNT}

    def log_training_data(self, log_data: dict[str, Any], step: int) -> None:
        """Called last in an update."""
        row = self.after_update(log_data, self._learnt)
        keep = " ".join(f"{rate:.2f}" for name, rate in row.items() if name.startswith("keep/"))
        self._bar.set_postfix_str(
            f"accuracy {row['accuracy']:.3f}, GMACs {row['gmacs']:.4f} ({row['share']:.0%} of dense, "
            f"target {row['target_share']:.0%}), keep {keep}, price {row['price']:.3g}"
        )
        self._bar.update()
        if self.tensorboard is not None:
            self.tensorboard.log_training_data(dict(row), step)

    def save_data(
        self,
        epoch: int,
        env_step: int,
        update_step: int,
        save_checkpoint_fn: Callable[[int, int, int], str] | None = None,
    ) -> None:
        """Let a checkpoint be written when one is due."""
        if save_checkpoint_fn is not None and (epoch % self.save_every == 0 or epoch == self.updates):
            save_checkpoint_fn(epoch, env_step, update_step)

    def restore_data(self) -> tuple[int, int, int]:
        """Epochs, environment steps and updates done before."""
        return self.resume_from

    def finalize(self) -> None:
        """Close bar and files."""
        self._bar.close()
        if self.tensorboard is not None:
            self.tensorboard.finalize()


_LEARNT = (
    "loss",
    "actor_loss",
    "vf_loss",
    "ent_loss",
    "approx_kl",
    "clip_frac",
    "explained_variance",
    "grad_norm",
    "gradient_steps",
    "train_time",
)


def _mean(value: Any) -> float:
    """tianshou logs statistics of a sequence as a dict with its mean."""
    return float(value["mean"] if isinstance(value, dict) else value)
