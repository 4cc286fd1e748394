"""What a run keeps on disk: checkpoint and policy; process 0 writes them, every process reads them."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from ...deploy.policy_files import save_policy
from ...engine.backbone import Backbone
from ...errors import CheckpointError, NumericalError, StorageError
from ...files import PathLike, load_state, locked, make_way, prepare_folder, save_state
from ...models.load import save_backbone
from ..finetuning.loop import STATE_FILE as FINETUNING_FILE
from ..finetuning.loop import WEIGHTS_FILE
from ..policies import TokenPolicy
from ..shared.processes import Processes
from ..shared.settings import differences
from ..shared.signals import TrainingStopped
from ..shared.writers import Row, Writer, open_writers

STATE_FILE = "training.safetensors"
POLICY_FILE = "policy.safetensors"

_log = logging.getLogger(__name__)


class RunFolder:
    """The output folder of a run.

    Attributes:
        saved: updates done when the checkpoint was written; None: there is none yet.

    Args:
        folder: made if it does not exist.
        processes: the processes that train together.

    Raises:
        StorageError: if nothing can be written there.
    """

    def __init__(self, folder: PathLike, processes: Processes) -> None:
        self.path = Path(folder)
        self.processes = processes
        self.saved: int | None = None
        if processes.is_main:
            prepare_folder(self.path)

    def alone(self) -> AbstractContextManager[None]:
        """Keep other runs out of the folder, see `files.locked`."""
        return locked(self.path) if self.processes.is_main else nullcontext()

    def make_way(self, overwrite: bool) -> None:
        """Refuse a folder that holds a run, or remove what says so, see `files.make_way`."""
        if self.processes.is_main:
            make_way(self.path, (POLICY_FILE, STATE_FILE), overwrite)

    def writers(
        self, done: Sequence[Row], steps: int, project: str | None, settings: Mapping[str, Any]
    ) -> list[Writer]:
        """Where metrics go, see `open_writers`; process 0 alone has any."""
        return open_writers(self.path, done, steps, project, settings) if self.processes.is_main else []

    def load(
        self, settings: Mapping[str, Any], facts: Mapping[str, Any], may_change: frozenset[str]
    ) -> dict[str, Any] | None:
        """The checkpoint; None if there is none.

        Args:
            settings: of this run, as `as_json` gives them.
            facts: what else must be the same: names and JSON values.
            may_change: dotted names of settings that may differ.

        Raises:
            CheckpointError: for a file that cannot be read, or belongs to another run; it says what differs.
        """
        path = self.path / STATE_FILE
        if not path.exists():
            return None
        state = load_state(path)
        if "settings" not in state:
            raise CheckpointError(
                f"{path}: expected a checkpoint with settings objects, got one of an older version; start the run "
                "again in another folder (its policy file can still be loaded)"
            )
        changed = differences(settings, state["settings"], may_change)
        names = [name.rsplit(".", 1)[-1] for name in changed]
        names += [f"{name} ({state.get(name)!r})" for name, value in facts.items() if state.get(name) != value]
        if names:
            details = f" ({'; '.join(changed.values())})" if changed else ""
            raise CheckpointError(
                f"{path}: expected a checkpoint of the same run to resume, got one with other {', '.join(names)}"
                f"{details}"
            )
        self.saved = len(state["history"])
        return state

    def save(self, state: Mapping[str, Any]) -> None:
        """Replace the checkpoint, which stays whole until the new one is."""
        if self.processes.is_main:
            save_state(state, self.path / STATE_FILE)
        self.saved = len(state["history"])

    def save_policy(self, policy: TokenPolicy) -> None:
        """Write the trained policy."""
        if self.processes.is_main:
            save_policy(policy, self.path / POLICY_FILE)

    def save_backbone(self, backbone: Backbone) -> None:
        """Write a fine-tuned network's weights, for `load_backbone(name, checkpoint=...)`."""
        if self.processes.is_main:
            save_backbone(backbone, self.path / WEIGHTS_FILE)

    @property
    def finetuning(self) -> Path:
        """The folder of the fine-tuning that comes after the updates."""
        return self.path / "finetune"

    def forget_finetuning(self) -> None:
        """Remove a checkpoint of fine-tuning; while updates are still to come, it belongs to an earlier run."""
        if self.processes.is_main:
            (self.finetuning / FINETUNING_FILE).unlink(missing_ok=True)

    @contextmanager
    def explaining(self, lr: float, max_grad_norm: float | None) -> Iterator[None]:
        """Add to errors of training which checkpoint is kept, and which settings to change."""
        try:
            yield
        except NumericalError as error:
            raise NumericalError(
                f"{error}; {self.advice}, with a smaller lr (now {lr:g}) or max_grad_norm (now {max_grad_norm})"
            ) from error
        except StorageError as error:
            raise StorageError(f"{error}; free some space: {self.advice}") from error

    def stopped(self, number: int, updates: int) -> TrainingStopped:
        """The exception to raise after a signal; its message says how to continue."""
        message = f"{signal.Signals(number).name}: stopped after update {self.saved} of {updates}; {self.advice}"
        if self.processes.is_main:
            _log.warning(message)
        return TrainingStopped(message, number)

    @property
    def advice(self) -> str:
        """How a run that failed can be continued."""
        if self.saved is None or not (self.path / STATE_FILE).is_file():
            return f"there is no checkpoint in {self.path}, start again"
        return f"the checkpoint of update {self.saved} in {self.path} is kept, resume (--resume) goes on from it"
