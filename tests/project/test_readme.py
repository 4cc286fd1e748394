"""What the README shows runs."""

from __future__ import annotations

import contextlib
import importlib
import io
import re
from functools import cache
from pathlib import Path

import pytest

from places import ROOT
from vitprune_env.cli import main as vitprune

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md")))
COMMANDS = sorted(
    {
        (name, flags.partition("#")[0].strip())
        for line in re.findall(r"^(?:\$ )?((?:python examples|vitprune ).*)$", TEXT + DOCS, flags=re.MULTILINE)
        for name, flags in re.findall(r"(examples/\w+\.py|vitprune [\w-]+)([^&`]*)", line)
    }
)


@cache
def shown_by_help(command: str) -> str:
    """What `--help` of an example or of a command of `vitprune` prints."""
    run, words, shown = vitprune, command.split()[1:], io.StringIO()
    if not words:
        run = importlib.import_module(f"vitprune_env.examples.{Path(command).stem}").main
    with contextlib.redirect_stdout(shown), pytest.raises(SystemExit):
        run([*words, "--help"])
    return shown.getvalue()


@pytest.mark.parametrize(("command", "flags"), COMMANDS)
def test_commands_and_their_flags_exist(command: str, flags: str) -> None:
    for flag in re.findall(r"--[a-z][\w-]*", flags):
        assert re.search(rf"{flag}\b", shown_by_help(command)), flag


def test_the_documents_show_commands() -> None:
    assert len(COMMANDS) >= 20


def test_both_set_up_commands_are_the_first_two() -> None:
    blocks = re.findall(r"```bash\n(.*?)\n```", TEXT, flags=re.DOTALL)
    assert blocks[:2] == ["pip install -e . && python examples/train_mappo.py", 'pip install -e ".[test]" && pytest']


def test_pictures_are_there() -> None:
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", TEXT)
    assert pictures
    assert all((ROOT / picture).is_file() for picture in pictures)
