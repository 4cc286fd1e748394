"""Folders of images: which files count, what they show, and classes that two splits number differently."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.readers.reader_image_folder import ReaderImageFolder

from vitprune_env.cli.flags import ImageFlags
from vitprune_env.data import open_images
from vitprune_env.data.folders import ClassFolders, split_folder
from vitprune_env.data.image_files import as_shown
from vitprune_env.engine.backbone import Backbone
from vitprune_env.errors import SettingsError
from vitprune_env.models.load import load_backbone


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Classes `b10`, `B2` and `a`, one of them a level deeper."""
    for name in ("b10/2.png", "b10/10.png", "B2/x.JPG", "group/a/y.jpeg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    return tmp_path


def test_what_timm_reads_is_read_alike(root: Path) -> None:
    ours, theirs = ClassFolders(root), ReaderImageFolder(str(root))
    assert (ours.samples, ours.class_to_idx) == (theirs.samples, theirs.class_to_idx)
    assert list(ours.class_to_idx) == ["a", "B2", "b10"]
    (root / "map.txt").write_text("b10\nother\na\n")
    ours, theirs = ClassFolders(root, "map.txt"), ReaderImageFolder(str(root), "map.txt")
    assert (ours.samples, ours.class_to_idx) == (theirs.samples, theirs.class_to_idx)


def test_further_kinds_of_images_are_read(root: Path) -> None:
    (root / "c").mkdir()
    for kind in ("webp", "bmp", "tif", "tiff", "gif"):
        Image.new("RGB", (4, 4)).save(root / "c" / f"x.{kind}")
    (root / "c" / "notes.md").write_text("no image")
    assert sum(label == 3 for _, label in ClassFolders(root).samples) == 5


def test_links_in_circles_pipes_and_stray_files_do_no_harm(root: Path) -> None:
    before = ClassFolders(root).samples
    (root / "b10" / "again").symlink_to(root)
    (root / "B2" / "again").symlink_to(root)
    os.mkfifo(root / "B2" / "pipe.png")
    Image.new("RGB", (4, 4)).save(root / "cover.png")
    assert [label for _, label in ClassFolders(root).samples] == [label for _, label in before]
    assert len(ClassFolders(root).samples) == len(before)


def test_a_class_map_that_could_run_code_is_refused(root: Path) -> None:
    (root / "map.pkl").write_bytes(b"cos\nsystem\n(S'touch hacked'\ntR.")
    with pytest.raises(ValueError, match=r"class_map: expected a text file"):
        ClassFolders(root, "map.pkl")


def test_splits_are_known_by_name(root: Path) -> None:
    assert split_folder(root, "validation") == root
    with pytest.raises(ValueError, match=r"split: expected one of train, .* got 'nonsense'"):
        split_folder(root, "nonsense")
    (root / "val").mkdir()
    assert split_folder(root, "validation") == root / "val"
    with pytest.raises(ValueError, match=r"expected a folder for 'train' in .* got \['val'\]"):
        split_folder(root, "train")


def test_images_look_as_in_a_viewer() -> None:
    grey = np.array([[0, 257, 65535]], dtype=np.uint16)
    assert np.asarray(as_shown(Image.fromarray(grey), "L")).tolist() == [[0, 1, 255]]
    assert np.asarray(as_shown(Image.fromarray(grey.astype(np.int32)), "RGB"))[0, 1].tolist() == [1, 1, 1]
    glass = Image.new("RGBA", (1, 1), (255, 0, 0, 51))  # a fifth of red on white
    assert as_shown(glass, "RGB").getpixel((0, 0)) == (255, 204, 204)
    turned = Image.new("RGB", (2, 1))
    turned.putpixel((0, 0), (9, 9, 9))
    turned.getexif()[0x0112] = 6  # orientation: to be shown turned clockwise by 90 degrees
    shown = as_shown(turned, "RGB")
    assert (shown.size, shown.getpixel((0, 0))) == ((1, 2), (9, 9, 9))


def _network(names: tuple[str, ...] | None) -> Backbone:
    tiny = {"img_size": 32, "depth": 1, "embed_dim": 24, "num_heads": 3, "num_classes": 3}
    return load_backbone("vit_tiny_patch16_224", class_names=names, **tiny)


def test_splits_with_other_classes_are_refused_unless_names_number_them(tmp_path: Path) -> None:
    for name in ("train/a", "train/b", "train/c", "val/a", "val/c", "val/d"):
        (tmp_path / name).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / name / "0.png")
    flags = ImageFlags(data_dir=tmp_path)
    parts = ("validation", None, 0), ("train", None, 0)
    with pytest.raises(SettingsError, match="same classes in validation and train, but b, d are"):
        flags.open_apart(_network(None), *parts)
    (tmp_path / "val" / "d").rename(tmp_path / "val" / "b")
    held_out, learnt = flags.open_apart(_network(None), *parts)
    assert torch.equal(held_out.batch([0, 1, 2])[1], learnt.batch([0, 1, 2])[1])


def test_one_class_less_is_numbered_by_the_networks_names(tmp_path: Path) -> None:
    for name in ("val/a", "val/c"):
        (tmp_path / name).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / name / "0.png")
    assert open_images(_network(("a", "b", "c")), tmp_path).batch([0, 1])[1].tolist() == [0, 2]
