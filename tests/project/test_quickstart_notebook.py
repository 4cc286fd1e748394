"""The notebook of the quickstart: its cells run one after the other, and it holds no outputs that could grow old."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from places import DOCS

CELLS = json.loads((DOCS / "quickstart.ipynb").read_text("utf-8"))["cells"]


def test_cells_run_one_after_the_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "quickstart"}
    for number, cell in enumerate(CELLS):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"cell {number}", "exec", dont_inherit=True), namespace)
    assert namespace["logits"].shape == (64, 10)
    assert namespace["result"].table().count("|") > 20


def test_no_outputs_are_stored() -> None:
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in CELLS)
