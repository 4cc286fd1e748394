"""What a policy is shown of image files while it learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from vitprune_env import benchmarking, load_backbone
from vitprune_env.cli import evaluate, main
from vitprune_env.cli.flags import ImageFlags
from vitprune_env.cli.train import open_task, parse
from vitprune_env.data import Digits, ImageFiles, RandomViews, open_images


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("digits")
    main(["digits-folder", "--output", str(root), "--train", "40", "--val", "60"])
    return root


def test_thresholds_are_set_on_random_views_and_files_are_reported_on_as_they_are(folder: Path) -> None:
    backbone = load_backbone("vit_digits")
    flags = ["--data-dir", str(folder), "--model", "vit_digits", "--workers", "0", "--quick"]
    task = open_task(parse(flags), backbone)
    assert isinstance(task.training, ImageFiles)
    assert isinstance(task.calibration, RandomViews)
    assert len(task.calibration) == len(task.training) == 40
    tuned = task.tune[0][0]  # rivals are calibrated on the same kind of images
    assert torch.equal(tuned, task.calibration.batch([row * 40 // len(tuned) for row in range(len(tuned))])[0])
    plain = ImageFlags(data_dir=folder, workers=0).open(backbone, "validation", None, 0)
    torch.testing.assert_close(next(iter(task.test))[0], plain.batch(range(60))[0], rtol=0, atol=0)


def test_a_policy_learns_from_random_views_if_asked_to(folder: Path) -> None:
    flags = ["--data-dir", str(folder), "--model", "vit_digits", "--workers", "0", "--quick"]
    learnt = open_task(parse([*flags, "--views", "2", "--smallest-view", "0.9"]), load_backbone("vit_digits")).training
    assert isinstance(learnt, RandomViews)
    assert (learnt.count, learnt.scale) == (2, (0.9, 1.0))


def test_the_built_in_task_has_no_views(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = open_task(parse(["--quick"]), load_backbone("vit_digits"))
    assert isinstance(task.training, Digits)
    assert task.calibration is None
    with pytest.raises(SystemExit) as stop:
        main(["train", "--quick", "--views", "3", "--output", str(tmp_path)])
    assert stop.value.code == 2
    assert "--views: expected image files to crop, got 3 of the built-in task" in capsys.readouterr().err


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
