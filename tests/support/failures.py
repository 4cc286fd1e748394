"""Things that go wrong: full disks and hostile files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


def fill_the_disk(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """From now on files of a folder can be opened but not written to: the system itself says that no space is left."""
    make = Path.open

    def full(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        is_written = folder in path.parents and not mode.startswith("r")
        return make(Path("/dev/full") if is_written else path, mode, *args, **options)

    monkeypatch.setattr(Path, "open", full)


class Hostile:
    """Unpickled, it makes a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)
