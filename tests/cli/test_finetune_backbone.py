"""The command that makes a network bear missing tokens: what it leaves, what it reports, what it refuses."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from vitprune_env import KeepAll, TokenGame, evaluate, load_backbone
from vitprune_env.cli import finetune_backbone, main
from vitprune_env.data import open_images

MODEL = "vit_tiny_patch16_224"
COLOURS = {"Red": (255, 0, 0), "blue": (0, 0, 255)}  # in timm's order blue comes first
Run = Callable[..., None]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights without a head, and eight images to learn from and ten others of each of two classes."""
    place = tmp_path_factory.mktemp("photographs")
    torch.manual_seed(0)
    headless = timm.create_model(MODEL, img_size=64, num_classes=0)
    save_file(headless.state_dict(), place / "headless.safetensors")
    for split, count in (("train", 8), ("val", 10)):
        for name, colour in COLOURS.items():
            folder = place / "data" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                shade = tuple(max(part, 8 * number) for part in colour)
                Image.new("RGB", (40, 32), shade).save(folder / f"{number}.png")
    return place


@pytest.fixture(scope="module")
def run(place: Path) -> Run:
    """The command with the folder's images and weights."""

    def call(output: Path, *argv: object) -> None:
        given = ["--model", MODEL, "--weights", place / "headless.safetensors", "--data-dir", place / "data",
                 "--img-size", 48, "--output", output, "--quick", "--workers", 0, "--threads", 1]  # fmt: skip
        main(["finetune-backbone", *map(str, [*given, *argv])])

    return call


@pytest.fixture(scope="module")
def trained(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("backbone")
    run(output)
    return output


def accuracies(table: Path) -> dict[str, float]:
    rows = [line.split("|") for line in table.read_text().splitlines() if line.startswith("|")]
    return {row[1].strip(): float(row[2].split("(")[0]) for row in rows[2:]}


def test_the_network_knows_its_classes_and_is_as_good_as_reported(trained: Path, place: Path) -> None:
    backbone = load_backbone(MODEL, checkpoint=trained / "backbone.safetensors")
    assert (backbone.class_names, backbone.image_size, backbone.num_classes) == (("blue", "Red"), (48, 48), 2)
    held_out = open_images(backbone, place / "data", "validation").batches(20)
    found = evaluate(TokenGame(backbone), KeepAll(), held_out)
    reported = accuracies(trained / "table.md")
    assert reported["dense"] == pytest.approx(100 * found.accuracy)
    assert list(reported)[:3] == ["dense", "random at 70% of the MACs", "random at 50% of the MACs"]
    history = [json.loads(line) for line in (trained / "history.jsonl").read_text().splitlines()]
    assert history[-1]["validation/dense"] == pytest.approx(found.accuracy)
    assert [step for step, row in enumerate(history, start=1) if "validation/random" in row] == [2, 4]


def test_other_commands_read_it_without_saying_sizes(trained: Path, place: Path, tmp_path: Path) -> None:
    main(["evaluate", "--model", MODEL, "--weights", str(trained / "backbone.safetensors"), "--policy", "evit",
          "--keep-rate", "0.8", "--data-dir", str(place / "data"), "--output", str(tmp_path), "--quick"])  # fmt: skip
    rows = json.loads((tmp_path / "evaluation.json").read_text())["rows"]
    assert 100 * rows[0]["accuracy"] == pytest.approx(accuracies(trained / "table.md")["dense"])


def test_a_finished_network_is_not_overwritten(run: Run, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = load_file(trained / "backbone.safetensors")
    with pytest.raises(SystemExit) as stopped:
        run(trained, "--no-quick")
    assert stopped.value.code == 2
    assert "which holds a finished run" in capsys.readouterr().err
    run(trained, "--resume")
    after = load_file(trained / "backbone.safetensors")
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_head_in_the_file_gives_way_to_the_new_one(run: Run, trained: Path, tmp_path: Path) -> None:
    """From its own output, which has a head of two classes."""
    run(tmp_path, "--weights", trained / "backbone.safetensors")
    assert load_backbone(MODEL, checkpoint=tmp_path / "backbone.safetensors").class_names == ("blue", "Red")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", MODEL, "--pretrained"], "data.dir: expected a folder of photographs"),
        (["--data-dir", "DATA", "--pretrained"], "model: expected a ViT of timm"),
        (["--data-dir", "DATA", "--model", MODEL], "weights: expected pretrained ones"),
        (["--data-dir", "DATA/train", "--model", MODEL, "--weights", "nowhere.safetensors"], "checkpoint|weights"),
        (
            ["--data-dir", "DATA", "--model", MODEL, "--weights", "WEIGHTS", "--blocks", "13"],
            "blocks: expected at most",
        ),
        (["--data-dir", "DATA", "--model", MODEL, "--weights", "WEIGHTS", "--dense", "2"], "dense: expected 0 to 1"),
    ],
)
def test_what_cannot_work_ends_in_one_line(
    argv: list[str], message: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named: dict[str, Any] = {"DATA": place / "data", "WEIGHTS": place / "headless.safetensors"}
    words = [re.sub("^(DATA|WEIGHTS)", lambda found: str(named[found[0]]), word) for word in argv]
    with pytest.raises(SystemExit) as stopped:
        main(["finetune-backbone", *words, "--img-size", "48", "--output", str(tmp_path), "--quick"])
    assert stopped.value.code == 2
    shown = capsys.readouterr().err
    assert re.search(f"error: (--)?({message})", shown), shown


def test_quick_is_small() -> None:
    args = finetune_backbone.parse(["--quick", "--keep-rates", "0.2", "0.7"])
    assert args.config.steps == 4
    assert args.config.dropping.keep_rates == (0.2, 0.7)
