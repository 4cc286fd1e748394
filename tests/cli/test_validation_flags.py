"""Held-out images of the command that trains: where they come from, when they are played, and what they decide."""

from __future__ import annotations

from pathlib import Path

import pytest

from vitprune_env import load_backbone
from vitprune_env.cli import main, reward_ratio
from vitprune_env.cli.train import open_task, parse
from vitprune_env.data import Digits, ImageFiles, RandomViews


def test_flags_become_settings_and_the_built_in_task_is_watched() -> None:
    run = parse(["--validate-every", "7", "--patience", "3", "--validation-images", "90"]).settings.run
    assert (run.validate_every, run.patience, run.validation_images) == (7, 3, 90)
    assert [parse(argv).settings.run.validate_every for argv in ([], ["--preset", "rl4evit"])] == [10, 10]
    for files in (["--data-dir", "x"], ["--data_dir=x"], ["--dataset", "torch/cifar10"]):
        assert parse(files).settings.run.validate_every == 0
    assert parse(["--data-dir", "x", "--validate-every", "20"]).settings.run.validate_every == 20
    assert parse([], start=reward_ratio.Args()).settings.run.validate_every == 0


@pytest.mark.parametrize(("reported", "watched"), [("test", "validation"), ("validation", "train")])
def test_scenes_that_are_reported_on_decide_nothing(reported: str, watched: str) -> None:
    task = open_task(parse(["--quick", "--split", reported]), load_backbone("vit_digits"))
    assert isinstance(task.validation, Digits)
    assert len(task.validation) == 64
    assert task.validation.split == watched
    assert isinstance(task.training, Digits)
    assert task.validation.seed != task.training.seed


def test_photographs_to_watch_are_set_aside_from_those_to_train_on(tmp_path: Path) -> None:
    main(["digits-folder", "--output", str(tmp_path), "--train", "40", "--val", "60"])
    backbone = load_backbone("vit_digits")
    flags = ["--data-dir", str(tmp_path), "--model", "vit_digits", "--workers", "0"]
    everything = open_task(parse([*flags, "--quick"]), backbone)
    assert everything.validation is None
    assert isinstance(everything.training, ImageFiles)
    task = open_task(parse([*flags, "--validate-every", "5"]), backbone)
    assert isinstance(task.validation, RandomViews)
    assert isinstance(task.training, ImageFiles)
    watched, trained = (set(files.rows.tolist()) for files in (task.validation.files, task.training))
    assert len(watched) == 10  # a quarter at most
    assert watched | trained == set(everything.training.rows.tolist())
    assert not watched & trained
    assert task.calibration is not None
    assert set(task.calibration.files.rows.tolist()) == trained


def test_patience_without_validation_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["train", "--quick", "--output", str(tmp_path), "--validate-every", "0", "--patience", "2"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: --patience: expected 0 with --validate-every 0, got 2\n"
