"""Where the metrics of a run go: a file of JSON lines, TensorBoard, Weights & Biases. Every update is there once.

A killed run may have logged updates that are not in its checkpoint; a resumed run does them again. Every writer is
therefore given the number of updates done, and removes the rows of later ones.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tianshou.utils import TensorboardLogger
from torch.utils.tensorboard import SummaryWriter

from ...errors import MissingPackageError
from ...files import replace_file

HISTORY_FILE = "history.jsonl"
WANDB_FILE = "wandb_run_id.txt"
Row = Mapping[str, float]


class Writer(Protocol):
    """Takes the rows of a run, one per update."""

    def write(self, row: Row, step: int) -> None:
        """Metrics of an update; `step` counts environment steps (images times sites)."""
        ...

    def show(self, picture: np.ndarray, step: int) -> None:
        """A picture, `[H, W, 3]` uint8."""
        ...

    def close(self) -> None:
        """The run has ended."""
        ...


class HistoryFile:
    """One JSON object per line and update; `pandas.read_json(path, lines=True)` reads it.

    Args:
        folder: where `history.jsonl` goes.
        done: the rows so far; all others are removed from the file.
    """

    def __init__(self, folder: Path, done: Sequence[Row]) -> None:
        self._path = replace_file(folder / HISTORY_FILE, "".join(map(_line, done)).encode())

    def write(self, row: Row, step: int) -> None:
        """Append a line."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(_line(row))

    def show(self, picture: np.ndarray, step: int) -> None:
        """The file holds numbers only."""

    def close(self) -> None:
        """The file is closed after every line."""


class TensorBoard:
    """Event files in a folder of their own.

    Args:
        folder: the run's.
        step: environment steps done; later events in the folder are marked as void.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self._writer = _last_of(folder / "tensorboard", step + 1 if step else 0)
        self._logger = TensorboardLogger(self._writer, 1, 1, 1)

    def write(self, row: Row, step: int) -> None:
        """One scalar per metric."""
        self._logger.log_training_data(dict(row), step)

    def show(self, picture: np.ndarray, step: int) -> None:
        """Under the name `tokens`."""
        self._writer.add_image("tokens", picture, step, dataformats="HWC")

    def close(self) -> None:
        """Write what is left."""
        self._logger.finalize()


class WeightsAndBiases:
    """A run of Weights & Biases, which must be installed beside the package.

    Args:
        project: name of the project.
        folder: where it keeps its files.
        config: settings to show.
        resume: whether to continue the run whose id is in the folder.

    Raises:
        MissingPackageError: if wandb is not installed.
    """

    def __init__(self, project: str, folder: Path, config: Mapping[str, Any], resume: bool = False) -> None:
        try:
            import wandb  # pyright: ignore[reportMissingImports], it is optional
        except ImportError as error:
            raise MissingPackageError(
                f"wandb: expected the package wandb to log to project {project!r}, found none; pip install wandb"
            ) from error
        self._wandb: Any = wandb
        note = folder / WANDB_FILE
        run_id = note.read_text().strip() if resume and note.exists() else None
        self._run: Any = wandb.init(project=project, dir=str(folder), config=dict(config), id=run_id, resume="allow")
        replace_file(note, str(self._run.id).encode())

    def write(self, row: Row, step: int) -> None:
        """All metrics of an update at once; wandb ignores a second row of the same step."""
        self._run.log(dict(row), step=step)

    def show(self, picture: np.ndarray, step: int) -> None:
        """Under the name `tokens`."""
        self._run.log({"tokens": self._wandb.Image(picture)}, step=step)

    def close(self) -> None:
        """End the run."""
        self._run.finish()


def open_writers(
    folder: Path, done: Sequence[Row], steps: int, project: str | None, settings: Mapping[str, Any]
) -> list[Writer]:
    """History file and TensorBoard, and Weights & Biases if a project is given.

    Args:
        folder: of the run.
        done: rows of the updates done.
        steps: environment steps of an update.
        project: of Weights & Biases; None: not used.
        settings: of the run, for Weights & Biases to show.
    """
    writers: list[Writer] = [HistoryFile(folder, done), TensorBoard(folder, len(done) * steps)]
    if project:
        writers.append(WeightsAndBiases(project, folder, settings, resume=bool(done)))
    return writers


def _last_of(folder: Path, purge_step: int) -> SummaryWriter:
    """A writer of a file that TensorBoard reads after those that are there, so that it voids events of theirs.

    Files are read in the order of their names. These begin with the second, but end with a process and a count: of two
    files of the same second, number 10 comes before number 9. The next second settles that.
    """
    older = set(folder.glob("*tfevents*"))
    writer = SummaryWriter(folder, purge_step=purge_step)
    own = max(set(folder.glob("*tfevents*")) - older)
    if all(path.name < own.name for path in older):
        return writer
    writer.close()
    own.unlink()
    time.sleep(1.0)
    return SummaryWriter(folder, purge_step=purge_step)


def _line(row: Row) -> str:
    return json.dumps(dict(row)) + "\n"
