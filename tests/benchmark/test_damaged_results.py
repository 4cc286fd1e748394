"""Results on disk that are not what was written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vitprune_env.benchmarking import BenchmarkResult
from vitprune_env.benchmarking.measurement import Row
from vitprune_env.benchmarking.store import Store
from vitprune_env.errors import CheckpointError


def test_a_damaged_number_is_refused(tmp_path: Path) -> None:
    stored, saved = tmp_path / "results.json", tmp_path / "saved.json"
    Store(tmp_path, {"seed": 0}).add(Row("evit", out_of_reach="below 0.8125 GMACs"))
    BenchmarkResult.load(stored).json(saved)
    for path in (stored, saved):
        whole = path.read_text()
        path.write_text(whole.replace("0.8125", "0.9125"))
        with pytest.raises(CheckpointError, match=r"\.json: expected what was written, got a damaged file"):
            BenchmarkResult.load(path)
        path.write_text(re.sub(r'"sha256": "\w+"', '"other": 0', whole))  # as an earlier version wrote it
        assert BenchmarkResult.load(path).rows[0].out_of_reach == "below 0.8125 GMACs"
