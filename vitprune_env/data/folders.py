"""Class folders, read as timm reads them, but more kinds of images, no circles, and nothing that is no file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from timm.data.readers.class_map import load_class_map
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.utils.misc import natural_key

KINDS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"}  # endings of image files
TRAINING = ("train", "training")
HELD_OUT = ("validation", "val", "valid", "eval", "evaluation")
SPLITS = (*TRAINING, *HELD_OUT, "test")


class ClassFolders(ReaderImageFolder):
    """Images in folders that are named after their classes, at any depth; images outside of such folders are left out.

    Classes are numbered as timm does it: in natural order, ignoring case, unless a file lists them.

    Args:
        root: where to look.
        class_map: file with a class name per line, in its own folder or in `root`; None: all folders with images.

    Raises:
        ValueError: for a class map that is a pickle, which could run code.
        RuntimeError: for no images.
    """

    def __init__(self, root: Path, class_map: str | None = None) -> None:
        self.root = str(root)
        if class_map is not None and Path(class_map).suffix != ".txt":
            raise ValueError(f"class_map: expected a text file (.txt) with a class name per line, got {class_map}")
        files = list(_image_files(root))
        if not files:
            raise RuntimeError(f"found no images ({', '.join(sorted(KINDS))}) in the folders of {root}")
        names = sorted({file.parent.name for file in files}, key=natural_key)
        numbers: Mapping[str, int] = {name: number for number, name in enumerate(names)}
        if class_map is not None:
            numbers = load_class_map(class_map, self.root)
        self.class_to_idx = dict(numbers)
        found = [(str(file), numbers[file.parent.name]) for file in files if file.parent.name in numbers]
        self.samples = sorted(found, key=lambda sample: (natural_key(sample[0]), sample[0]))


def split_folder(root: Path, split: str) -> Path:
    """The folder of a split, or `root` itself if it holds class folders.

    Raises:
        ValueError: for a split that has another name than those of `SPLITS`, or a folder of splits without this one.
    """
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
    alike = next((names for names in (TRAINING, HELD_OUT) if split in names), ())
    for name in (split, *alike):
        if (root / name).is_dir():
            return root / name
    others = sorted({path.name for path in root.iterdir() if path.is_dir()} & set(SPLITS))
    if others:
        raise ValueError(f"split: expected a folder for {split!r} in {root}, got {others}")
    return root


def _image_files(root: Path) -> Iterator[Path]:
    """Image files in the folders below `root`; links are followed, unless they lead back to a folder around them."""
    for folder, inside, names in os.walk(root, followlinks=True):
        place = Path(folder)
        if os.path.realpath(place) in map(os.path.realpath, place.parents):
            inside.clear()
            continue
        for name in names if place != root else ():
            path = place / name
            if path.suffix.lower() in KINDS and path.is_file():
                yield path
