"""What a policy is shown of image files while it learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from vitprune_env import benchmarking, load_backbone
from vitprune_env.cli import evaluate, main
from vitprune_env.cli.train import VIEWS, open_task, parse
from vitprune_env.data import Digits, ImageFiles, RandomViews, open_images


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("digits")
    main(["digits-folder", "--output", str(root), "--train", "40", "--val", "60"])
    return root


def test_image_files_are_shown_as_random_views_and_reported_on_as_they_are(folder: Path) -> None:
    backbone = load_backbone("vit_digits")
    flags = ["--data-dir", str(folder), "--model", "vit_digits", "--workers", "0", "--quick"]
    task = open_task(parse(flags), backbone)
    assert isinstance(task.training, RandomViews)
    assert len(task.training) == VIEWS * 40
    assert task.training.scale == (0.35, 1.0)
    files = open_task(parse([*flags, "--views", "0"]), backbone)
    assert isinstance(files.training, ImageFiles)
    reported, as_they_are = (next(iter(each.test))[0] for each in (task, files))
    torch.testing.assert_close(reported, as_they_are, rtol=0, atol=0)
    assert not torch.equal(task.tune[0][0], files.tune[0][0])  # rivals are calibrated on the same kind of images
    narrow = open_task(parse([*flags, "--views", "2", "--smallest-view", "0.9"]), backbone).training
    assert isinstance(narrow, RandomViews)
    assert (narrow.count, narrow.scale) == (2, (0.9, 1.0))


def test_the_built_in_task_has_no_views(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert isinstance(open_task(parse(["--quick"]), load_backbone("vit_digits")).training, Digits)
    with pytest.raises(SystemExit) as stop:
        main(["train", "--quick", "--views", "3", "--output", str(tmp_path)])
    assert stop.value.code == 2
    assert "views: expected image files to crop, got 3 of the built-in task" in capsys.readouterr().err


def test_methods_are_calibrated_on_random_views(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As policies are, in `benchmark` and in `evaluate`: the network knows its training images by heart."""
    seen: list[Any] = []
    monkeypatch.setattr(benchmarking, "benchmark", lambda *_, tune, **__: seen.append(tune) or Nothing())
    flags = ["--data-dir", str(folder), "--model", "vit_digits", "--workers", "0", "--quick", "--output", str(tmp_path)]
    main(["benchmark", *flags, "--methods", "topk"])
    assert isinstance(seen[0], RandomViews)
    args = evaluate.parse([*flags, "--policy", "evit", "--target-share", "0.5"])
    images = next(iter(args.tuning(load_backbone("vit_digits"))))[0]
    assert not torch.equal(images[0], open_images(load_backbone("vit_digits"), folder, "train")[0][0])
    assert len(images) == 10  # at most a quarter of the files, one view of each


class Nothing:
    """A result without content."""

    def table(self) -> str:
        return ""
