"""Write a built-in task as a folder of PNG images, to try everything that reads image folders.

    vitprune digits-folder --output runs/digits
    vitprune evaluate --data-dir runs/digits --model vit_digits --policy evit --keep-rate 0.7

The layout is ImageNet's: train/<class>/<number>.png and val/<class>/<number>.png.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from vitprune_env.cli.flags import OutputFlags, TaskName, lowered, read_flags

if TYPE_CHECKING:
    from vitprune_env.data import Digits


ENOUGH = 200  # scenes in which every class occurs


@dataclass(frozen=True)
class Args:
    """How much of the task to write."""

    task: TaskName = "digits"
    """Built-in task: one digit in each scene, or twins, two copies of it."""
    train: int = 2000
    """Training images, of training digits."""
    val: int = 1000
    """Validation images, of test digits."""
    size: int = 40
    """Height and width of the images, in pixels."""
    common: OutputFlags = field(default_factory=lambda: OutputFlags(output=Path("runs/digits")))


def check_free(folder: Path) -> None:
    """Refuse a folder that exists: images that are there would mix with new ones.

    Raises:
        SettingsError: naming it.
    """
    from vitprune_env.errors import SettingsError

    if folder.exists():
        raise SettingsError(f"output: expected a folder without images, got one with {folder}; two would mix")


def write_scenes(scenes: Digits, folder: Path, count: int | None = None) -> None:
    """Write scenes as `<folder>/<label>/<number>.png`, 8 bits per channel.

    Args:
        scenes: the scenes to choose from.
        folder: the new folder.
        count: how many to write, the first ones, but every class that fits; None: all of them.

    Raises:
        SettingsError: for a folder that exists.
    """
    from PIL import Image

    check_free(folder)
    images, labels = scenes.batch(range(len(scenes)))
    pixels = (scenes.to_rgb(images) * 255).round().byte().movedim(1, -1).numpy()
    for index in with_every_class(labels.tolist(), len(labels) if count is None else count):
        path = folder / scenes.classes[int(labels[index])] / f"{index:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[index]).save(path)


def with_every_class(labels: Sequence[int], count: int) -> list[int]:
    """The first `count` rows, the last of which give way to the first row of each class that is not among them."""
    firsts = sorted({label: row for row, label in reversed(list(enumerate(labels)))}.values())[:count]
    others = [row for row in range(len(labels)) if row not in set(firsts)]
    return sorted(firsts + others[: count - len(firsts)])


def main(argv: Sequence[str] | None = None) -> None:
    """Write both splits."""
    args = read_flags(Args, argv, __doc__, prog="vitprune digits-folder")
    args = lowered(args, train=20, val=20) if args.common.quick else args
    from vitprune_env.data import TASKS, Digits

    for folder in (args.common.output / "train", args.common.output / "val"):
        check_free(folder)
    scene, seed, output = TASKS[args.task].resized(args.size), args.common.seed, args.common.output
    for split, name, count in (("train", "train", args.train), ("test", "val", args.val)):
        write_scenes(Digits(split, max(count, ENOUGH), seed, scene), output / name, count)
    print(f"{args.train} + {args.val} images are in {output}/")
