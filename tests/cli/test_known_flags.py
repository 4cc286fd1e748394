"""Flags that are known without loading what trains."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module

import pytest

from places import ROOT
from vitprune_env.cli import COMMANDS
from vitprune_env.cli.flags.known import OWN, SHARED, misspelt
from vitprune_env.cli.flags.reading import names_of


@pytest.mark.parametrize("command", OWN)
def test_the_list_is_that_of_the_flags(command: str) -> None:
    flags = import_module(f"vitprune_env.cli.{command.replace('-', '_')}").Args
    shared = {name for group in SHARED for name in names_of(group)}
    assert set(names_of(flags)) - shared == set(OWN[command].split()) - shared
    assert not set(OWN[command].split()) & shared


def test_what_can_be_read_is_not_refused() -> None:
    for words in (
        ["--target-share", "0.5", "--target_gmacs=1", "--no-scaled", "--no_scaled", "--price", "-1", "--wandb", "--"],
        ["--epoch", "--help"],
        ["--tyro-print-completion", "bash"],
    ):
        assert misspelt("train", words) is None
    assert misspelt("evaluate", ["--epoch"]) is None  # reads its flags quickly itself
    assert misspelt("finetune-backbone", ["--epochs", "1"]) is None
    assert misspelt("finetune", ["--no-shedule"]) == "Unrecognized options: --no-shedule; did you mean --schedule?"
    assert misspelt("train", ["--xyz=1"]) == "Unrecognized options: --xyz"


def test_a_misspelt_flag_is_refused_without_loading_torch() -> None:
    code = """
import sys
from vitprune_env.cli import COMMANDS, main
for command in COMMANDS:
    try:
        main([command, "--quickly"])
    except SystemExit as stopped:
        assert stopped.code == 2
print(*sorted({"torch", "timm", "tianshou", "matplotlib", "sklearn", "scipy"} & set(sys.modules)), "loaded")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "loaded\n"
    lines = done.stderr.splitlines()
    assert len(lines) == len(COMMANDS)
    assert all(line.startswith("error: Unrecognized options: --quickly") for line in lines)
