"""Rows of a benchmark on disk, and runs of unfinished ones, so that an interrupted comparison goes on."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from vitprune_env.benchmarking.measurement import Row, Run
from vitprune_env.errors import CheckpointError
from vitprune_env.files import CHECKSUM, PathLike, replace_file

RESULTS = "results.json"
Key = tuple[str, float | None, str]  # name, budget and origin of a row
PACKAGES = ("vitprune_env", "torch", "timm", "tianshou", "pettingzoo", "gymnasium", "numpy")


class Store:
    """Rows of one set of settings, written after each run.

    Args:
        output: folder; None: rows are kept in memory alone.
        settings: what the numbers depend on; rows of other settings are not mixed with these.
        resume: whether to keep what is there.
        about: what else is to be known of the run, such as the command and the machine.

    Raises:
        CheckpointError: if what is there cannot be read or was made with other settings.
    """

    def __init__(
        self,
        output: Path | None,
        settings: Mapping[str, Any],
        resume: bool = False,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = None if output is None else output / RESULTS
        self.settings: dict[str, Any] = json.loads(json_text(dict(settings)))
        self.about = dict(about or {})
        self.rows: list[Row] = []
        self._runs: dict[Key, list[Run]] = {}  # of rows that are not finished
        if not resume or self.path is None or not self.path.is_file():
            return
        content = _content(self.path)
        before, self.rows = content.settings, content.rows
        self._runs = content.runs
        other = [name for name, value in self.settings.items() if before.get(name) != value]
        if other:
            was = ", ".join(f"{name} {before.get(name)!r} (now {self.settings[name]!r})" for name in other)
            raise CheckpointError(f"{self.path}: expected results of the same settings to resume, got other {was}")

    def find(self, name: str, share: float | None, origin: str = "") -> Row | None:
        """A row that is there already."""
        key = (name, share, origin)
        return next((row for row in self.rows if (row.name, row.share, row.origin) == key), None)

    def add(self, row: Row) -> None:
        """Keep a row; it replaces one of the same name and budget, and its runs."""
        key = (row.name, row.share)
        self.rows = [old for old in self.rows if (old.name, old.share) != key] + [row]
        self._runs = {known: runs for known, runs in self._runs.items() if known[:2] != key}
        self._write()

    def runs(self, name: str, share: float | None, origin: str = "") -> list[Run]:
        """The runs so far of a row that is not finished."""
        return list(self._runs.get((name, share, origin), []))

    def add_run(self, run: Run, name: str, share: float | None, origin: str = "") -> None:
        """Keep the next run of a row that is not finished."""
        self._runs.setdefault((name, share, origin), []).append(run)
        self._write()

    def _write(self) -> None:
        if self.path is None:
            return
        unfinished = [
            {"name": name, "share": share, "origin": origin, "runs": [asdict(run) for run in runs]}
            for (name, share, origin), runs in self._runs.items()
        ]
        content = {**results_content(self.settings, self.rows, self.about), "unfinished": unfinished}
        write_json(self.path, sealed(content))


class Content(NamedTuple):
    """What a results file holds."""

    settings: dict[str, Any]
    about: dict[str, Any]
    rows: list[Row]
    runs: dict[Key, list[Run]]


def results_content(settings: Mapping[str, Any], rows: list[Row], about: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that `read_results` wants to find."""
    results = [asdict(row) for row in rows]
    return {"settings": settings, "about": about, "results": results}


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a results file with a checksum of it, by which damage is noticed."""
    return {**content, CHECKSUM: sha256(json_text(content).encode()).hexdigest()}


def read_results(path: Path) -> tuple[dict[str, Any], dict[str, Any], list[Row]]:
    """Settings, what else is known of the run, and rows of a results file.

    Raises:
        CheckpointError: if it cannot be read, or is not what was written; one without a checksum is believed.
    """
    return _content(path)[:3]


def _content(path: Path) -> Content:
    try:
        found = dict(json.loads(path.read_text(encoding="utf-8")))
        written = found.pop(CHECKSUM, None)
        if written is not None and written != sealed(found)[CHECKSUM]:
            raise CheckpointError(f"{path}: expected what was written, got a damaged file (its checksum differs)")
        runs = {
            (each["name"], each["share"], each["origin"]): [Run.load(run) for run in each["runs"]]
            for each in found.get("unfinished", [])
        }
        rows = [Row.load(row) for row in found["results"]]
        return Content(dict(found["settings"]), dict(found.get("about", {})), rows, runs)
    except CheckpointError:
        raise
    except (OSError, json.JSONDecodeError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{path}: expected results of the benchmark, got something else") from error


def machine() -> dict[str, Any]:
    """Processor, threads and versions."""
    return {"processor": _processor(), "threads": torch.get_num_threads(), "versions": versions()}


def _processor() -> str:
    """Its name as Linux knows it, or whatever Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


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
