"""Write the built-in task as a folder of PNG images, to try everything that reads image folders.

    python examples/make_image_folder.py --output runs/digits
    python examples/evaluate.py --data-dir runs/digits --model vit_digits --policy evit --keep-rate 0.7

The layout is ImageNet's: train/<class>/<number>.png and val/<class>/<number>.png.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from PIL import Image

from vitprune_env.data import Digits, DigitsConfig


@dataclass(frozen=True)
class Args:
    """How much of the task to write, and where."""

    output: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("runs/digits")
    """Folder to write to; made if it does not exist."""
    train: int = 2000
    """Training images, of training digits."""
    val: int = 1000
    """Validation images, of test digits."""
    size: int = 40
    """Height and width of the images, in pixels."""
    seed: int = 0
    """Which scenes."""


def write_scenes(scenes: Digits, folder: Path) -> None:
    """Write every scene as `<folder>/<label>/<number>.png`, 8 bits per channel."""
    images, labels = scenes.batch(range(len(scenes)))
    pixels = (scenes.to_rgb(images) * 255).round().byte().movedim(1, -1).numpy()
    for index, (image, label) in enumerate(zip(pixels, labels.tolist(), strict=True)):
        path = folder / scenes.classes[label] / f"{index:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)


def main() -> None:
    """Write both splits."""
    args = tyro.cli(Args, description=__doc__)
    scene = DigitsConfig().resized(args.size)
    write_scenes(Digits("train", args.train, args.seed, scene), args.output / "train")
    write_scenes(Digits("test", args.val, args.seed, scene), args.output / "val")
    print(f"{args.train} + {args.val} images are in {args.output}/")


if __name__ == "__main__":
    main()
