"""Image files: what a backbone sees of them, subsets, classes that do not fit, files that cannot be read."""

from __future__ import annotations

import io
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.dataset import ImageDataset as TimmDataset

from vitprune_env import Backbone, load_backbone
from vitprune_env.cli.digits_folder import with_every_class, write_scenes
from vitprune_env.data import Digits, ImageFiles, batches_of, data_config, fetch, open_images
from vitprune_env.errors import SettingsError, UnreadableImageError

TINY: dict[str, Any] = {"img_size": 32, "depth": 1, "embed_dim": 24, "num_heads": 3, "num_classes": 10}
SCENES = Digits("test", 60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty scenes as PNG files under val/<digit>/, all ten digits among them."""
    root = tmp_path_factory.mktemp("images")
    write_scenes(SCENES, root / "val")
    assert len(list((root / "val").iterdir())) == 10
    return root


def test_a_folder_gets_images_once(folder: Path) -> None:
    with pytest.raises(SettingsError, match=r"output: expected a folder without images, got one .*; two would mix"):
        write_scenes(Digits("test", 70), folder / "val")
    assert len(list((folder / "val").rglob("*.png"))) == 60


@pytest.fixture
def damaged(folder: Path, tmp_path: Path) -> tuple[Path, list[str]]:
    """A copy in which two files cannot be decoded."""
    root = tmp_path / "damaged"
    shutil.copytree(folder, root)
    files = sorted(root.rglob("*.png"))
    files[3].write_bytes(files[3].read_bytes()[:60])
    files[7].write_bytes(b"no image at all")
    return root, [str(files[3]), str(files[7])]


@pytest.fixture(scope="module")
def digits() -> Backbone:
    return load_backbone("vit_digits")


def test_files_show_what_the_scenes_are_to_eight_bits(folder: Path, digits: Backbone) -> None:
    files = open_images(digits, folder)
    images, labels = fetch(files, range(60))
    order = [int(Path(files.name(index)).stem) for index in range(60)]
    expected, classes = SCENES.batch(order)
    assert torch.equal(labels, classes)
    dark, light = -SCENES.config.mean / SCENES.config.std, (1 - SCENES.config.mean) / SCENES.config.std
    assert (images - expected.clamp(dark, light)).abs().max() <= 0.5 / 255 / SCENES.config.std + 1e-5


def test_preprocessing_is_the_models_own() -> None:
    deit = data_config(load_backbone("deit_tiny_patch16_224", **TINY))
    assert deit["input_size"] == (3, 32, 32)
    assert deit["mean"] == (0.485, 0.456, 0.406)
    assert (deit["crop_pct"], deit["interpolation"]) == (0.9, "bicubic")
    augreg = data_config(load_backbone("vit_tiny_patch16_224", **(TINY | {"img_size": (32, 48)})))
    assert augreg["input_size"] == (3, 32, 48)
    assert augreg["mean"] == augreg["std"] == (0.5, 0.5, 0.5)


def test_grey_models_get_grey_images(folder: Path) -> None:
    backbone = load_backbone("deit_tiny_patch16_224", in_chans=1, **TINY)
    images, _ = fetch(open_images(backbone, folder), [0, 1])
    assert images.shape == (2, 1, 32, 32)
    assert data_config(backbone)["mean"] == pytest.approx((sum((0.485, 0.456, 0.406)) / 3,))
    assert backbone(images).shape == (2, 10)


def test_models_for_other_channels_are_refused(folder: Path) -> None:
    backbone = load_backbone("deit_tiny_patch16_224", in_chans=4, **TINY)
    with pytest.raises(ValueError, match=r"model: expected one .* 3 channels \(RGB\) or 1 \(grey\), got .* for 4"):
        open_images(backbone, folder)


@pytest.mark.parametrize("workers", [0, 2])
def test_items_batches_and_loaders_agree(folder: Path, digits: Backbone, workers: int) -> None:
    files = open_images(digits, folder, workers=workers)
    loaded = list(files.batches(25))
    assert [len(labels) for _, labels in loaded] == [25, 25, 10]
    assert len(files.batches(25)) == 3
    for (images, labels), (others, same) in zip(loaded, batches_of(files, 25), strict=True):
        assert torch.equal(images, others)
        assert torch.equal(labels, same)
    image, label = files[31]
    assert torch.equal(image, loaded[1][0][6])
    assert label == loaded[1][1][6]


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_shown_as_they_were(folder: Path, channels: int) -> None:
    size = {"img_size": 40, "patch_size": 8}
    backbone = load_backbone("deit_tiny_patch16_224", in_chans=channels, **(TINY | size))
    files = ImageFiles(open_images(backbone, folder).source, data_config(backbone) | {"crop_pct": 1.0})
    image = Image.open(files.name(4)).convert("L" if channels == 1 else "RGB")
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(40, 40, channels).movedim(2, 0) / 255
    assert torch.allclose(files.to_rgb(files[4][0][None])[0], pixels.expand(3, -1, -1), atol=1e-5)


def test_a_limit_draws_the_same_subset_again(folder: Path, digits: Backbone) -> None:
    some, again, others = (open_images(digits, folder, limit=20, seed=seed) for seed in (0, 0, 1))
    names = [some.name(index) for index in range(20)]
    assert len(set(names)) == len(some) == 20
    assert names == [again.name(index) for index in range(20)]
    assert names != [others.name(index) for index in range(20)]
    assert len({label for _, label in (some[index] for index in range(20))}) > 4  # not the first classes only
    assert len(batches_of(some, 8, images=12)[1][1]) == 4


def test_unreadable_files_are_named_and_left_out(
    damaged: tuple[Path, list[str]], digits: Backbone, caplog: pytest.LogCaptureFixture
) -> None:
    root, names = damaged
    batches = open_images(digits, root).batches(16)
    with caplog.at_level(logging.WARNING):
        sizes = [len(labels) for _, labels in batches]
    assert sizes == [14, 16, 16, 12]
    assert batches.skipped == names
    assert all(name in caplog.text for name in names)
    assert [len(labels) for _, labels in batches] == sizes  # a second pass counts anew
    assert batches.skipped == names


def test_unreadable_files_can_be_fatal(damaged: tuple[Path, list[str]], digits: Backbone) -> None:
    root, names = damaged
    files = open_images(digits, root, on_corrupt="fail", workers=1)
    with pytest.raises(UnreadableImageError, match=f"{names[0]}: not a readable image"):
        list(files.batches(16))
    with pytest.raises(UnreadableImageError, match="not a readable image"):
        fetch(files, range(10))


def test_training_takes_the_next_readable_file(damaged: tuple[Path, list[str]], digits: Backbone) -> None:
    files = open_images(digits, damaged[0])
    assert torch.equal(files[3][0], files[4][0])
    assert fetch(files, range(10))[0].shape == (10, 3, 40, 40)


def test_a_set_without_a_readable_image(tmp_path: Path, digits: Backbone) -> None:
    for label in SCENES.classes:
        (tmp_path / label).mkdir()
    (tmp_path / "3" / "only.png").write_bytes(b"nothing")
    files = open_images(digits, tmp_path, class_map=_class_map(tmp_path))
    with pytest.raises(UnreadableImageError, match="expected at least one readable image"):
        files[0]
    assert list(files.batches(4)) == []


def _class_map(folder: Path) -> Path:
    path = folder / "classes.txt"
    path.write_text("\n".join(SCENES.classes) + "\n")
    return path


def test_classes_that_do_not_fit_the_head(folder: Path, tmp_path: Path) -> None:
    few, many = (load_backbone("deit_tiny_patch16_224", **(TINY | {"num_classes": n})) for n in (7, 1000))
    with pytest.raises(ValueError, match=r"classes: expected .* the images have 10, the head of .* has 7"):
        open_images(few, folder)
    with pytest.raises(ValueError, match=r"has 1000; load the model with num_classes=10, or number the classes"):
        open_images(many, folder)
    assert open_images(many, folder, class_map=_class_map(tmp_path)).num_classes == 10
    with pytest.raises(ValueError, match=r"classes: expected .* the images have 10"):
        open_images(few, folder, class_map=_class_map(tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"root": None}, "expected a folder of images, found none at None"),
        ({"root": __file__}, "expected a folder of images, found none at .*test_image_data"),
        ({"root": "nowhere"}, "expected a folder of images, found none at nowhere"),
        ({"split": "train"}, r"split: expected a folder for 'train' in .*, got \['val'\]"),
        ({"name": "torch/no_such_set"}, "data_dir: expected torch/no_such_set with 'validation' images"),
        ({"limit": 0}, "limit: expected at least 1 image, got 0"),
        ({"on_corrupt": "ignore"}, "on_corrupt: expected 'skip' or 'fail', got 'ignore'"),
    ],
)
def test_what_cannot_be_opened_is_said(folder: Path, digits: Backbone, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_images(digits, **({"root": folder} | options))


def test_an_empty_folder(tmp_path: Path, digits: Backbone) -> None:
    with pytest.raises(ValueError, match="data_dir: expected a folder of images with"):
        open_images(digits, tmp_path)


def test_torchvision_datasets_by_name(folder: Path, tmp_path: Path, digits: Backbone) -> None:
    files = open_images(digits, folder, name="torch/image_folder")
    assert torch.equal(fetch(files, [5])[0], fetch(open_images(digits, folder), [5])[0])
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        header = bytes([0, 0, 8, 3, *(4).to_bytes(4), *(28).to_bytes(4), *(28).to_bytes(4)])
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + bytes(4 * 28 * 28))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1, *(4).to_bytes(4), 3, 1, 4, 1]))
    mnist = open_images(digits, tmp_path, name="torch/mnist")
    images, labels = fetch(mnist, range(4))
    assert labels.tolist() == [3, 1, 4, 1]
    assert images.shape == (4, 3, 40, 40)
    assert images.std() == 0
    assert (mnist.num_classes, mnist.name(2)) == (10, "image 2")


class _HubReader:
    """Hands out encoded images and labels, as timm's reader of Hugging Face datasets does."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> tuple[io.BytesIO, int]:
        file = io.BytesIO()
        Image.new("RGBA", (50, 60), (255, 0, 0, 128)).save(file, "png")
        return (file if index else io.BytesIO(b"cut off")), index

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        return f"row-{index}"


def test_readers_of_other_stores(digits: Backbone) -> None:
    source = TimmDataset("", reader=_HubReader())
    batches = ImageFiles(source, data_config(digits)).batches(4)
    images, labels = next(iter(batches))
    assert labels.tolist() == [1, 2]
    assert images.shape == (2, 3, 40, 40)
    assert batches.skipped == ["row-0"]


class Labelled(list[Any]):
    """Items with labels of any type."""


@pytest.mark.parametrize("label", [3.7, 3.0, True, "3", None, torch.tensor(3.7)])
def test_labels_are_whole_numbers(label: Any) -> None:
    with pytest.raises(TypeError, match="label: expected a whole number, got"):
        fetch(Labelled([(torch.zeros(3, 2, 2), label)]), [0])
    assert fetch(Labelled([(torch.zeros(3, 2, 2), torch.tensor(2))]), [0])[1].tolist() == [2]


@pytest.mark.parametrize(
    "rows", [torch.tensor([True, False]), [0.5], np.array([True, False]), [True], torch.tensor([1.0])]
)
def test_masks_and_fractions_are_no_indices(rows: Any, folder: Path) -> None:
    items = Labelled([(torch.zeros(3, 2, 2), 0)] * 3)
    files = open_images(load_backbone(), folder)
    for read in (SCENES.batch, files.batch, lambda rows: fetch(items, rows)):
        with pytest.raises(TypeError, match="index: expected"):
            read(rows)


def test_batches_have_images() -> None:
    with pytest.raises(ValueError, match="size: expected at least 1 image per batch, got 0"):
        batches_of(SCENES, 0)


def test_a_small_folder_has_every_class() -> None:
    labels = [3, 3, 1, 3, 1, 0, 2, 2]
    assert with_every_class(labels, 8) == list(range(8))
    assert with_every_class(labels, 7) == list(range(7)), "nothing changes where all classes are there"
    assert with_every_class(labels, 5) == [0, 1, 2, 5, 6]
    assert with_every_class(labels, 2) == [0, 2]
