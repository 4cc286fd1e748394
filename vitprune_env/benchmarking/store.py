"""Rows of a benchmark on disk, so that an interrupted comparison goes on where it stopped."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, cast

from vitprune_env.benchmarking.measurement import Row
from vitprune_env.errors import CheckpointError
from vitprune_env.files import PathLike, replace_file

RESULTS = "results.json"
PACKAGES = ("vitprune_env", "torch", "timm", "tianshou", "pettingzoo", "gymnasium", "numpy")


class Store:
    """Rows of one set of settings, written after each.

    Args:
        output: folder; None: rows are kept in memory alone.
        settings: what the numbers depend on; rows of other settings are not mixed with these.
        resume: whether to keep what is there.

    Raises:
        CheckpointError: if what is there cannot be read or was made with other settings.
    """

    def __init__(self, output: Path | None, settings: Mapping[str, Any], resume: bool = False) -> None:
        self.path = None if output is None else output / RESULTS
        self.settings: dict[str, Any] = json.loads(json_text(dict(settings)))
        self.rows: list[Row] = []
        if not resume or self.path is None or not self.path.is_file():
            return
        before, self.rows = read_results(self.path)
        other = [name for name, value in self.settings.items() if before.get(name) != value]
        if other:
            was = ", ".join(f"{name} {before.get(name)!r} (now {self.settings[name]!r})" for name in other)
            raise CheckpointError(f"{self.path}: expected results of the same settings to resume, got other {was}")

    def find(self, name: str, share: float | None, origin: str = "") -> Row | None:
        """A row that is there already."""
        key = (name, share, origin)
        return next((row for row in self.rows if (row.name, row.share, row.origin) == key), None)

    def add(self, row: Row) -> None:
        """Keep a row; it replaces one of the same name and budget."""
        key = (row.name, row.share)
        self.rows = [old for old in self.rows if (old.name, old.share) != key] + [row]
        if self.path is not None:
            write_json(self.path, results_content(self.settings, self.rows))


def results_content(settings: Mapping[str, Any], rows: list[Row]) -> dict[str, Any]:
    """Everything that `read_results` wants to find."""
    return {"settings": settings, "versions": versions(), "results": [asdict(row) for row in rows]}


def read_results(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """Settings and rows of a results file.

    Raises:
        CheckpointError: if it cannot be read.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return dict(found["settings"]), [Row.load(row) for row in found["results"]]
    except (OSError, json.JSONDecodeError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{path}: expected results of the benchmark, got something else") from error


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version(), **found}


def json_text(content: Any) -> str:
    """JSON of values, dataclasses and paths.

    Raises:
        TypeError: for anything else.
    """
    return json.dumps(content, indent=2, default=_plain) + "\n"


def write_json(path: PathLike, content: Any) -> None:
    """Write a JSON file so that readers never see half of it.

    Raises:
        StorageError: if it cannot be written.
        TypeError: for a value that JSON does not have.
    """
    replace_file(Path(path), json_text(content).encode())


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(cast(Any, value))
    raise TypeError(f"content: expected values that JSON has, got {type(value).__name__}")
