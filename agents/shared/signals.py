"""Stopping a run: after SIGTERM or Ctrl-C it finishes its update and saves; a second signal ends it at once."""

from __future__ import annotations

import logging
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)

_log = logging.getLogger(__name__)


class TrainingStopped(SystemExit):
    """Training was stopped by a signal, and saved; unless caught, the process ends with 128 + the signal's number.

    Attributes:
        message: where the run stands and how to go on.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(128 + number)
        self.message = message

    def __str__(self) -> str:
        return self.message


class StopSignals:
    """While this context is open, the first signal is only noted.

    Signals can be caught in the main thread alone; elsewhere they do what they always do.

    Attributes:
        received: number of the signal, 0 if none came.

    Args:
        grace: seconds during which further signals are taken for the first one. Launchers pass on to each process the
            signal that a cluster has already sent it.
    """

    def __init__(self, grace: float = 0.0) -> None:
        self.received = 0
        self.grace = grace
        self._since = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            if time.monotonic() - self._since > self.grace:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            return
        self.received, self._since = number, time.monotonic()
        if not self.grace:  # the system's own answer comes even in the middle of a long computation
            for each in SIGNALS:
                signal.signal(each, signal.SIG_DFL)
        name = signal.Signals(number).name
        _log.warning("%s: finishing the update, then saving; once more ends the run at once", name)
