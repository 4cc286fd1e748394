"""Every flag of every command with odd values: one line and exit code 2, or a value in its range reaches the work."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import MISSING, fields, is_dataclass
from importlib import import_module
from io import StringIO
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuzzing import TIMES, in_time, inputs
from vitprune_env.cli import COMMANDS, explained, main
from vitprune_env.cli.flags import check_ranges, read_flags
from vitprune_env.cli.flags.common import CommonFlags, ImageFlags
from vitprune_env.cli.flags.ranges import RANGES
from vitprune_env.errors import SettingsError

VALUES = ("-1", "0", "1", "2", "0.5", "-0.5", "nan", "inf", "1e300", str(10**30), "", " ", "x", "True", "--", "meta")
NEEDED = {
    "evaluate": ["--policy", "evit"],
    "export": ["--policy", "evit"],
    "finetune-backbone": ["--model", "deit_tiny_patch16_224", "--pretrained", "--data-dir", "images"],
}
# What is not a number of its own range: settings of training, whose classes check them (tests/fuzz/test_settings.py).
SETTINGS = ("train", "reward-ratio", "finetune", "finetune-backbone")


class Reached(Exception):  # noqa: N818, not an error
    """The work would begin now."""


def work(*_: Any, **__: Any) -> Any:
    raise Reached


def args_of(command: str) -> Any:
    """The dataclass of a command's flags."""
    return import_module(f"vitprune_env.cli.{command.replace('-', '_')}").Args


def names(flags: Any) -> Iterator[tuple[str, Any]]:
    """Names and types of all flags."""
    for name, kind in get_type_hints(flags).items():
        if is_dataclass(kind):
            yield from names(kind)
        elif name in {each.name for each in fields(flags)}:
            yield name, kind


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Commands stop where they would load a network or draw images."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ImageFlags, "network", work)
    monkeypatch.setattr("vitprune_env.cli.finetune_backbone.new_network", work)
    monkeypatch.setattr("vitprune_env.models.load.load_backbone", work)
    monkeypatch.setattr("vitprune_env.cli.digits_folder.write_scenes", work)
    monkeypatch.setattr("vitprune_env.data.Digits", work)
    monkeypatch.setattr("torch.set_num_threads", lambda _: None)
    for name in ("overview", "about_method", "about_policy", "about_network"):
        monkeypatch.setattr(f"vitprune_env.cli.info.{name}", work)


def run(command: str, words: list[str]) -> bool:
    """Whether the work was reached; otherwise it was refused as it should be."""
    said, code = StringIO(), None
    try:
        with in_time(), redirect_stderr(said), redirect_stdout(StringIO()):
            main([command, *NEEDED.get(command, []), *words])
    except Reached:
        return True
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2, words
    (line,) = said.getvalue().splitlines()
    assert line.startswith("error: ")
    assert len(line) > len("error: x")
    return False


@pytest.mark.usefixtures("no_work")
@TIMES
def test_flags_are_refused_in_one_line_or_in_range(times: int) -> None:
    every = [(command, name) for command in COMMANDS for name, _ in names(args_of(command))]

    @inputs(60 * times)
    @given(st.sampled_from(every), st.sampled_from(VALUES))
    def check(flag: tuple[str, str], value: str) -> None:
        command, name = flag
        reached = run(command, [f"--{name.replace('_', '-')}", value])
        if reached and name in RANGES:
            assert float(value) in RANGES[name], (command, name, value)

    check()


@TIMES
def test_numbers_out_of_range_are_refused(times: int) -> None:
    """As above, without reading a command line, which takes long."""
    groups = [CommonFlags, ImageFlags, *(args_of(command) for command in COMMANDS)]

    @inputs(200 * times)
    @given(st.sampled_from(groups), st.data(), st.one_of(st.integers(-3, 3), st.floats(), st.integers()))
    def check(group: Any, data: st.DataObject, value: float) -> None:
        usual = group()
        name = data.draw(st.sampled_from([each.name for each in fields(group)]))
        changed = group.__new__(group)
        vars(changed).update({**vars(usual), name: (value,) if isinstance(vars(usual)[name], tuple) else value})
        if name not in RANGES or is_dataclass(vars(usual)[name]):
            return
        if value in RANGES[name] or vars(changed)[name] == vars(usual)[name]:
            check_ranges(changed, usual)
        else:
            with pytest.raises(SettingsError, match=f"^{name}: expected "):
                check_ranges(changed, usual)

    check()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_number_has_a_range(command: str) -> None:
    """In the table of the flags, or in the settings of training."""
    numbers = {name for name, kind in names(args_of(command)) if re.search(r"\b(int|float)\b", str(kind))}
    known = set(RANGES) | {"budgets"}  # refused by `benchmark`, which knows what a budget is
    if command in SETTINGS:
        from vitprune_env.cli import finetune, finetune_backbone
        from vitprune_env.cli.flags.training import TrainingFlags

        groups = (TrainingFlags, finetune.OptimiserFlags, finetune.LifeFlags, finetune_backbone.RecipeFlags)
        known |= {name for group in (*groups, finetune_backbone.DroppingFlags) for name, _ in names(group)}
        known |= {"validate_every"}
    assert numbers <= known


def test_defaults_stand_as_they_are() -> None:
    """Those of a command, also where its flag is hidden."""
    for command in COMMANDS:
        kind = args_of(command)
        assert all(each.default is not MISSING or each.default_factory is not MISSING for each in fields(kind))
        check_ranges(kind(), kind())
        assert read_flags(kind, [], "") == kind()


def test_an_empty_list_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["speedup", "--keep"])
    assert capsys.readouterr().err == "error: --keep: expected at least one, got none\n"


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9\nat x")])
def test_too_little_memory_is_one_line(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), explained():
        raise error
    assert capsys.readouterr().err.startswith("error: out of memory; fewer or smaller images need less")
