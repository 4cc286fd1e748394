"""What the README shows runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from places import ROOT
from training_flags import TrainingFlags

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
COMMANDS = re.findall(r"^python (examples/\w+\.py)(.*)$", TEXT, flags=re.MULTILINE)


def test_snippets_run_one_after_the_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)  # one of them writes a folder
    assert len(SNIPPETS) >= 3
    namespace: dict[str, object] = {}
    for snippet in SNIPPETS:
        exec(re.sub(r"range\(200\)", "range(2)", snippet), namespace)


def test_snippets_of_the_training_docs_run() -> None:
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "docs/training.md").read_text("utf-8"), flags=re.DOTALL)
    assert len(snippets) >= 2
    for snippet in snippets:
        exec(snippet, {"__name__": "docs"})


def test_commands_name_scripts_and_flags_that_exist() -> None:
    assert len(COMMANDS) >= 5
    for script, rest in COMMANDS:
        files = (script, "examples/common.py", "examples/image_task.py")
        source = "".join((ROOT / file).read_text(encoding="utf-8") for file in files)
        for flag in re.findall(r"--([\w-]+)", rest.partition("#")[0]):
            name = flag.replace("-", "_")
            assert flag == "help" or re.search(rf"\b{name}: ", source) or hasattr(TrainingFlags(), name), (script, flag)


def test_both_set_up_commands_are_the_first_two() -> None:
    blocks = re.findall(r"```bash\n(.*?)\n```", TEXT, flags=re.DOTALL)
    assert blocks[:2] == ["pip install -e . && python examples/train_mappo.py", 'pip install -e ".[test]" && pytest']


def test_pictures_are_there() -> None:
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", TEXT)
    assert pictures
    assert all((ROOT / picture).is_file() for picture in pictures)
