"""What a run keeps on disk: its checkpoint and its policy; process 0 writes them, every process reads them."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...deploy.policy_files import save_policy
from ...engine.backbone import Backbone
from ...errors import CheckpointError, NumericalError, StorageError
from ...files import PathLike, load_state, prepare_folder, save_state
from ..finetuning.loop import STATE_FILE as FINETUNING_FILE
from ..finetuning.loop import WEIGHTS_FILE, save_weights
from ..policies import TokenPolicy
from .config import TrainConfig
from .processes import Processes
from .signals import TrainingStopped
from .writers import Row, Sink, open_sinks

STATE_FILE = "training.safetensors"
POLICY_FILE = "policy.safetensors"

_log = logging.getLogger(__name__)


class RunFolder:
    """The output folder of a run.

    Attributes:
        saved: updates that the checkpoint there has seen; None: there is none yet.

    Args:
        folder: made if it does not exist.
        processes: who trains together.

    Raises:
        StorageError: if nothing can be written there; better now than after hours.
    """

    def __init__(self, folder: PathLike, processes: Processes) -> None:
        self.path = Path(folder)
        self.processes = processes
        self.saved: int | None = None
        if processes.is_main:
            prepare_folder(self.path)

    def sinks(self, config: TrainConfig, done: Sequence[Row], steps: int) -> list[Sink]:
        """Where metrics go, see `open_sinks`; nowhere but in process 0."""
        return open_sinks(self.path, config, done, steps) if self.processes.is_main else []

    def load(self, config: TrainConfig, facts: Mapping[str, Any]) -> dict[str, Any] | None:
        """The checkpoint; None if there is none.

        Args:
            config: settings of this run.
            facts: what else must be as it was: names and JSON values.

        Raises:
            CheckpointError: for a file that cannot be read, or belongs to another run.
        """
        path = self.path / STATE_FILE
        if not path.exists():
            return None
        state = load_state(path)
        differences = config.differences(state.get("config", {}))
        differences += [f"{name} ({state.get(name)!r})" for name, value in facts.items() if state.get(name) != value]
        if differences:
            raise CheckpointError(
                f"{path}: expected a checkpoint of the same run to resume, got one with other {', '.join(differences)}"
            )
        self.saved = len(state["history"])
        return state

    def save(self, state: Mapping[str, Any]) -> None:
        """Replace the checkpoint, which stays whole until the new one is."""
        if self.processes.is_main:
            save_state(state, self.path / STATE_FILE)
        self.saved = len(state["history"])

    def save_policy(self, policy: TokenPolicy) -> None:
        """Write what training is for."""
        if self.processes.is_main:
            save_policy(policy, self.path / POLICY_FILE)

    def save_backbone(self, backbone: Backbone) -> None:
        """Write a fine-tuned network's weights, for `load_backbone(name, checkpoint=...)`."""
        if self.processes.is_main:
            save_weights(backbone, self.path / WEIGHTS_FILE)

    @property
    def finetuning(self) -> Path:
        """The folder of the fine-tuning that comes after the updates."""
        return self.path / "finetune"

    def forget_finetuning(self) -> None:
        """Remove a checkpoint of fine-tuning: while updates are to come, it can only be that of another run."""
        if self.processes.is_main:
            (self.finetuning / FINETUNING_FILE).unlink(missing_ok=True)

    @contextmanager
    def explaining(self, config: TrainConfig) -> Iterator[None]:
        """Add to what goes wrong in training where the run stands and what to change."""
        try:
            yield
        except NumericalError as error:
            raise NumericalError(
                f"{error}; {self.advice}, with a smaller lr (now {config.lr:g}) or max_grad_norm "
                f"(now {config.max_grad_norm})"
            ) from error
        except StorageError as error:
            raise StorageError(f"{error}; free some space: {self.advice}") from error

    def stopped(self, number: int, updates: int) -> TrainingStopped:
        """What to raise after a signal, with a word to the user."""
        message = f"{signal.Signals(number).name}: stopped after update {self.saved} of {updates}; {self.advice}"
        if self.processes.is_main:
            _log.warning(message)
        return TrainingStopped(message, number)

    @property
    def advice(self) -> str:
        """Where a run that failed can be taken up again."""
        if self.saved is None:
            return f"there is no checkpoint in {self.path} yet, start again"
        return f"the checkpoint of update {self.saved} in {self.path} is kept, resume (--resume) goes on from it"
