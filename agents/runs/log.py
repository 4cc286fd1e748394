"""tianshou logger of a run: passes every update on to its history, its progress bar, and its writers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tianshou.utils import LazyLogger
from tqdm import tqdm

from ...errors import StorageError
from ..shared.writers import Writer

AfterUpdate = Callable[[dict[str, Any], dict[str, float]], dict[str, float]]


class RunLog(LazyLogger):
    """Passes every update on, and gives tianshou's trainer the state of a resumed run.

    Args:
        after_update: from the statistics of play and of the update to the row to show and log.
        updates: of the whole run.
        done: updates done before.
        steps: environment steps (images times sites) of an update.
        writers: where rows are written.
        progress: whether to show a bar.
        picture: every how many updates to show a picture, and how to make it; None: never.
    """

    def __init__(
        self,
        after_update: AfterUpdate,
        updates: int,
        done: int,
        steps: int,
        writers: Sequence[Writer] = (),
        progress: bool = False,
        picture: tuple[int, Callable[[], Any]] | None = None,
    ) -> None:
        super().__init__()
        self.after_update = after_update
        self.writers = writers
        self.picture = picture
        self.resume_from = (done, done * steps, done)
        self._bar = tqdm(total=updates, initial=done, desc="train", unit="update", disable=not progress)
        self._learnt: dict[str, float] = {}
        self._shown: dict[str, float] = {}  # with the last validation, also between two of them

    def log_update_data(self, log_data: dict[str, Any], step: int) -> None:
        """Called after the gradient steps of an update, before `log_training_data`."""
        self._learnt = {name: _mean(log_data[name]) for name in log_data if name in _LEARNT}
        self._learnt |= log_data.get("metrics", {})

    def log_training_data(self, log_data: dict[str, Any], step: int) -> None:
        """Called last in an update."""
        row = self.after_update(log_data, self._learnt)
        self._shown |= row
        self._bar.set_postfix_str(postfix(self._shown))
        self._bar.update()
        self._to_all(lambda writer: writer.write(row, step))
        if self.writers and self.picture is not None and row["update"] % self.picture[0] == 0:
            picture = self.picture[1]()
            self._to_all(lambda writer: writer.show(picture, step))

    def save_data(
        self,
        epoch: int,
        env_step: int,
        update_step: int,
        save_checkpoint_fn: Callable[[int, int, int], str] | None = None,
    ) -> None:
        """Called after an update, with a function that saves a checkpoint if one is due."""
        if save_checkpoint_fn is not None:
            save_checkpoint_fn(epoch, env_step, update_step)

    def restore_data(self) -> tuple[int, int, int]:
        """Epochs, environment steps and updates done before."""
        return self.resume_from

    def finalize(self) -> None:
        """Close bar and files."""
        self._bar.close()
        self._to_all(lambda writer: writer.close())

    def _to_all(self, what: Callable[[Writer], None]) -> None:
        for writer in self.writers:
            try:
                what(writer)
            except OSError as error:
                raise StorageError(f"{type(writer).__name__}: could not be written ({error})") from error


def postfix(row: Mapping[str, float]) -> str:
    """The metrics of an update in one line, for the progress bar."""
    keep = " ".join(f"{rate:.2f}" for name, rate in row.items() if name.startswith("keep/"))
    parts = [
        f"accuracy {row['accuracy']:.3f}",
        f"GMACs {row['gmacs']:.4f} ({row['share']:.0%} of dense, target {row['target_share']:.0%})",
        f"keep {keep}",
        f"price {row['price']:.3g}",
        *(f"{name} {row[key]:.3g}" for name, key in _SHOWN.items() if key in row),
    ]
    return ", ".join(parts)


_SHOWN = {
    "loss": "loss",
    "entropy": "ent_loss",
    "kl": "approx_kl",
    "clip": "clip_frac",
    "ev": "explained_variance",
    "validation": "validation_accuracy",
}
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
