"""Output folders of commands: called after what runs, never overwritten silently, resumed with their own flags."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_cli import mistake

from vitprune_env.cli import benchmark, evaluate, finetune, reward_ratio
from vitprune_env.cli.analyse import command as analyse
from vitprune_env.cli.flags import ResumableFlags, read_flags
from vitprune_env.cli.train import parse
from vitprune_env.errors import CheckpointError, SettingsError

RESULTS = ("table.md", "checkpoint")


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("", "mappo"),
        ("--quick", "mappo-quick"),
        ("--algorithm ppo_single --seed 2", "ppo_single-seed_2"),
        ("--preset rl4evit", "rl4evit-mappo"),
        ("--preset merge --target-share 0.5", "merge-pgpe-0.5"),
        ("--task twins --target-share 0.2 --sites 1.attn 3", "mappo-twins-0.2-1.attn-3"),
        ("--adaptive 0.2 0.6 --finetune after", "mappo-0.2-0.6-finetune_after"),
        ("--data-dir /data/my_cats --target-gmacs 3", "mappo-my_cats-3"),
        ("--dataset torch/cifar10", "mappo-torch_cifar10"),
    ],
)
def test_a_training_run_is_called_after_what_is_trained(words: str, name: str) -> None:
    assert parse(words.split()).common.output == Path("runs", name)


def test_other_processes_may_come_when_the_first_has_begun(tmp_path: Path) -> None:
    args = parse(["--output", str(tmp_path)])
    args.on("cpu", is_main=True)
    (tmp_path / "policy.safetensors").touch()
    (tmp_path / "training.safetensors").touch()
    assert args.on("cpu", is_main=False).common.output == tmp_path
    with pytest.raises(SettingsError, match="--resume goes on"):
        args.on("cpu", is_main=True)


def test_other_commands_are_called_after_what_they_do() -> None:
    assert parse(["--output", "runs/x", "--quick"]).common.output == Path("runs/x")
    assert parse([], start=reward_ratio.Args()).common.output == Path("runs/reward_ratio")
    assert benchmark.parse(["--quick"]).common.output == Path("runs/benchmark-quick")
    assert evaluate.parse(["--policy", "tome:r=2"]).common.output == Path("runs/evaluation-tome_r_2")
    assert finetune.parse(["--policy", "tome"]).common.output == Path("runs/finetune-tome")


def start(folder: Path, *words: str, results: tuple[str, ...] = RESULTS) -> ResumableFlags:
    """What a command does first."""
    flags = read_flags(ResumableFlags, ["--output", str(folder), *words], "")
    flags.prepare(results=results)
    return flags


def test_a_run_is_never_overwritten_silently(tmp_path: Path) -> None:
    start(tmp_path)
    start(tmp_path)  # nothing has come out of it
    (tmp_path / "checkpoint").touch()
    with pytest.raises(SettingsError, match="which holds an interrupted run"):
        start(tmp_path)
    (tmp_path / "table.md").touch()
    for words in ((), ("--quick",)):
        with pytest.raises(SettingsError, match=r"a finished run \(see table.md there\); --resume .* --overwrite"):
            start(tmp_path, *words)
    start(tmp_path, "--resume")
    assert (tmp_path / "table.md").exists()
    with pytest.raises(SettingsError, match="expected either --resume or --overwrite"):
        start(tmp_path, "--resume", "--overwrite")
    start(tmp_path, "--overwrite", "--quick")
    assert not any((tmp_path / name).exists() for name in RESULTS)  # an interrupted run is not taken for a finished one
    (tmp_path / "table.md").touch()
    start(tmp_path, "--quick")  # nobody misses a small run


def test_resume_takes_the_flags_that_the_run_was_started_with(tmp_path: Path) -> None:
    folder = ("--output", str(tmp_path))
    args = parse(["--preset", "rl4evit", f"--output={tmp_path}", "--updates", "7", "--seed", "3"])
    args.common.prepare(results=RESULTS)
    stored = json.loads((tmp_path / "flags.json").read_text())["flags"]
    assert stored == ["--preset", "rl4evit", "--updates", "7", "--seed", "3"]
    again = parse([*folder, "--resume", "--updates", "9"])
    assert (again.preset, again.training.run.updates, again.common.seed) == ("rl4evit", 9, 3)
    assert again.common.resume
    assert again.common.output == tmp_path
    assert parse([*folder]).preset == "default"
    (tmp_path / "flags.json").write_text("[]")
    with pytest.raises(CheckpointError, match="expected the flags of a run"):
        parse([*folder, "--resume"])


def test_a_command_line_read_later_does_not_get_into_the_folder(tmp_path: Path) -> None:
    first = parse([f"--output={tmp_path}", "--seed", "3"])
    finetune.parse(["--policy", "tome"])
    first.on("cpu", is_main=True)
    assert json.loads((tmp_path / "flags.json").read_text())["flags"] == ["--seed", "3"]


@pytest.mark.parametrize(
    "words",
    [
        *("speedup --resume", "oracle --resume", "export --overwrite", "play --resume", "play --quick"),
        *("digits-folder --overwrite", "digits-folder --device cpu", "info --output x", "train --words x"),
    ],
)
def test_a_flag_that_would_do_nothing_is_unknown(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    flag = words.split()[1]
    assert mistake(capsys, *words.split()).startswith(f"error: Unrecognized options: {flag}")


@pytest.mark.parametrize("command", ["evaluate", "analyse"])
def test_only_training_is_resumed(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("--resume", "--overwrite"):
        for words in (("--checkpoint", "mine"), ("--policy", "mine")):
            line = mistake(capsys, command, flag, *words, "--output", tmp_path)
            assert line == f"error: {flag}: expected a policy that is trained first, such as dynamicvit, got mine"
    (tmp_path / "fit").mkdir()  # of a training that was interrupted
    line = mistake(capsys, command, "--policy", "ltmp", "--target-share", 0.5, "--output", tmp_path)
    assert "which holds an interrupted run (fit); --resume goes on with it" in line


def test_policies_beside_another_may_be_trained() -> None:
    words = ["--resume", "--checkpoint", "mine", "--budgets", "0.5", "--beside", "evit"]
    with pytest.raises(SettingsError, match="resume: expected a policy that is trained first"):
        analyse.parse(words)
    assert analyse.parse([*words, "ltmp"]).fits


@pytest.mark.parametrize("command", ["train", "benchmark", "finetune", "finetune-backbone", "reward-ratio"])
def test_every_command_that_takes_time_refuses(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("table.md", "summary.json"):
        (tmp_path / name).touch()
    line = mistake(capsys, command, "--output", tmp_path)
    assert line.startswith(f"error: --output: expected a folder without a run, got {tmp_path}, which holds a finished")
