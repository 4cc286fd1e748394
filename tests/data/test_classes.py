"""Classes are numbered as the head numbers them, whatever order a library reads the folders in."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.data import Subset
from torchvision.datasets import DatasetFolder, ImageFolder

from vitprune_env import Backbone, load_backbone
from vitprune_env.data import ImageFiles, classes, data_config, labels_of, names_of, open_images, open_source
from vitprune_env.data.classes import in_turn, numbers_by_name

NAMES = ("Bee", "ant", "Cow", "dog")  # torchvision: Bee, Cow, ant, dog; timm: ant, Bee, Cow, dog
GREY = {"ant": 10, "Bee": 60, "Cow": 120, "dog": 250}  # the images of a class, of one shade


@pytest.fixture(autouse=True)
def every_warning() -> None:
    """Warnings come once per process; here once per test."""
    classes._warn.cache_clear()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three images of each class, five of Cow."""
    root = tmp_path_factory.mktemp("animals")
    for name, grey in GREY.items():
        (root / name).mkdir()
        for index in range(5 if name == "Cow" else 3):
            Image.new("L", (16, 16), grey).save(root / name / f"{index}.png")
    return root


def network(names: tuple[str, ...] | None, count: int = 4) -> Backbone:
    sizes: dict[str, Any] = {"img_size": 16, "depth": 1, "embed_dim": 24, "num_heads": 3, "num_classes": count}
    return load_backbone("deit_tiny_patch16_224", class_names=names, **sizes)


def names_read(files: ImageFiles, names: tuple[str, ...]) -> None:
    """Every image has the number that its class has in `names`."""
    shade = {round(255 * float(files.to_rgb(image[None]).mean())): names[label] for image, label in files}
    assert {GREY[name]: name for name in shade.values()} == shade
    assert files.labels is not None
    assert files.labels.tolist() == [label for _, label in files]


@pytest.mark.parametrize("read_by", ["timm", "torchvision", "a subset"])
def test_labels_are_mapped_to_the_head_by_name(folder: Path, read_by: str, caplog: pytest.LogCaptureFixture) -> None:
    backbone = network(NAMES)
    if read_by == "timm":
        files = open_images(backbone, folder)
    else:
        whole = ImageFolder(folder)
        source = whole if read_by == "torchvision" else Subset(whole, [0, 3, 8, 11])
        files = ImageFiles(source, data_config(backbone), head=backbone.class_names)
    names_read(files, NAMES)
    assert files.class_names == NAMES
    (warning,) = caplog.messages
    moved = 2  # ant, Bee, Cow, dog: ant and Bee change places; Bee, Cow, ant, dog: Cow and ant do
    assert warning.startswith(f"classes: {moved} of 4 have another number among the images")
    assert "mapped by name" in warning


def test_the_same_order_needs_no_word(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    timms = ("ant", "Bee", "Cow", "dog")
    names_read(open_images(network(timms), folder), timms)
    names_read(ImageFiles.for_backbone(ImageFolder(folder), network(tuple(sorted(timms)))), tuple(sorted(timms)))
    assert not caplog.messages


def test_folders_may_show_some_of_the_heads_classes(folder: Path) -> None:
    names = ("cat", "dog", "Bee", "eel", "Cow", "ant")
    files = open_images(network(names, 6), folder)
    names_read(files, names)
    assert (files.class_names, files.num_classes) == (names, 4)


def test_classes_that_the_head_does_not_have_are_named(folder: Path) -> None:
    with pytest.raises(
        ValueError, match=r"classes: expected names of the head's classes \(such as 'bear'\), got 'dog';"
    ):
        open_images(network(("ant", "Bee", "Cow", "bear")), folder)
    with pytest.raises(ValueError, match=r"got 'ant', 'Bee', 'Cow' and 1 more; to number .* class_map file"):
        open_images(network(("1", "2", "3", "4")), folder)


def test_a_class_map_counts_where_the_head_has_other_names(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "map.txt"
    path.write_text("dog\nCow\nBee\nant\n")
    files = open_images(network(("1", "2", "3", "4")), folder, class_map=path)
    names_read(files, ("dog", "Cow", "Bee", "ant"))
    assert "its numbers are used" in caplog.text
    names_read(open_images(network(NAMES), folder, class_map=path), NAMES)


def test_a_head_without_names_gets_one_warning_of_the_order(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    open_images(network(None), folder)
    files = open_images(network(None), folder)
    assert files.class_names == ("ant", "Bee", "Cow", "dog")
    (warning,) = caplog.messages
    assert "in the order of timm" in warning
    assert "3 of 4 have another number with torchvision's ImageFolder" in warning  # all but dog
    assert "class_map" in warning
    caplog.clear()
    ImageFiles.for_backbone(ImageFolder(folder), network(None))
    assert "in the order of torchvision's ImageFolder, and 3 of 4" in caplog.text
    caplog.clear()
    (tmp_path / "map.txt").write_text("ant\nBee\nCow\ndog\n")
    open_images(network(None), folder, class_map=tmp_path / "map.txt")
    assert not caplog.messages


def test_numbers_are_worked_out_by_name() -> None:
    assert numbers_by_name(("a", "b", "c"), ("c", "a", "x", "b")) == (1, 3, 0)
    assert numbers_by_name(("a", "b"), ("a", "b")) is None
    assert numbers_by_name(None, ("a",)) is None
    assert numbers_by_name(("a",), None) is None


def test_names_and_labels_of_the_datasets_of_libraries(folder: Path) -> None:
    timms, torchvisions = open_source(folder), ImageFolder(folder)
    assert names_of(timms) == ("ant", "Bee", "Cow", "dog")
    assert names_of(torchvisions) == names_of(Subset(torchvisions, [1])) == ("Bee", "Cow", "ant", "dog")
    assert labels_of(timms) is not None
    assert sorted(labels_of(timms).tolist()) == [0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2, 3, 3, 3]  # pyright: ignore[reportOptionalMemberAccess]
    part = labels_of(Subset(torchvisions, [0, 3, 13]))
    assert part is not None
    assert part.tolist() == [0, 1, 3]
    imagenet = _Set(wnids=["n1", "n2"], classes=[("a", "b"), ("c",)], class_to_idx={"a": 0, "b": 0, "c": 1})
    assert names_of(imagenet) == ("n1", "n2")
    caltech = _Set(categories=["Faces", "ant", "bass"], y=[2, 0])
    assert names_of(caltech) == ("Faces", "ant", "bass")
    assert labels_of(caltech) is not None
    hub = SimpleNamespace(reader=SimpleNamespace(class_to_idx={"x": 0, "y": 1}, iter_targets=lambda: iter([1, 0])))
    assert names_of(hub) == ("x", "y")
    assert names_of(_Set()) is labels_of(_Set()) is labels_of(_Set(targets=[[0, 1], [1]])) is None


class _Set:
    """Two items, and what a library says of them."""

    def __init__(self, **facts: Any) -> None:
        vars(self).update(facts)

    def __len__(self) -> int:
        return 2


def test_classes_take_turns() -> None:
    labels = torch.tensor([0] * 7 + [5] * 2 + [3] * 4)
    order = in_turn(labels, torch.Generator().manual_seed(0))
    assert sorted(order.tolist()) == list(range(13))
    counts = [torch.bincount(labels[order[:size]], minlength=6)[[0, 3, 5]].tolist() for size in (3, 6, 8, 10)]
    assert counts[:3] == [[1, 1, 1], [2, 2, 2], [3, 3, 2]]
    assert counts[3] == [4, 4, 2]  # class 5 has no more
    firsts = {int(labels[in_turn(labels, torch.Generator().manual_seed(seed))[0]]) for seed in range(20)}
    assert firsts == {0, 3, 5}  # whose turn comes first is drawn, too


def test_a_limit_takes_as_many_of_each_class(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_decoding(*_: Any) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFiles, "read", no_decoding)
    monkeypatch.setattr(DatasetFolder, "__getitem__", no_decoding)
    for source in (open_source(folder), ImageFolder(folder)):
        files = ImageFiles.for_backbone(source, network(NAMES), limit=9, seed=1)
        assert files.labels is not None
        assert sorted(torch.bincount(files.labels).tolist()) == [2, 2, 2, 3]
        assert files.rows.tolist() == sorted(files.rows.tolist())
        again = ImageFiles.for_backbone(source, network(NAMES), limit=9, seed=1)
        assert torch.equal(again.rows, files.rows)
        draws = {tuple(ImageFiles.for_backbone(source, network(NAMES), limit=9, seed=seed).rows) for seed in range(9)}
        assert len(draws) > 1


def test_parts_have_no_image_in_common(folder: Path) -> None:
    files = open_images(network(NAMES), folder)
    some, rest = files.split(4, seed=3)
    assert (len(files), len(some), len(rest)) == (14, 4, 10)
    assert sorted([*some.rows.tolist(), *rest.rows.tolist()]) == list(range(14))
    assert some.labels is not None
    assert sorted(some.labels.tolist()) == [0, 1, 2, 3]
    assert torch.equal(some.rows, open_images(network(NAMES), folder, limit=4, seed=3).rows)
    image, label = rest[0]
    assert torch.equal(image, files[int(rest.rows[0])][0])
    assert label == files[int(rest.rows[0])][1]
    assert len(rest.split(9)[1]) == 1
    for count in (0, 14):
        with pytest.raises(ValueError, match=f"count: expected 1 to 13 of 14 images, got {count}"):
            files.split(count)


def test_images_of_unknown_labels_are_drawn_alike() -> None:
    class Unlabelled:
        def __len__(self) -> int:
            return 14

    files = ImageFiles(Unlabelled(), data_config(network(NAMES)), limit=5, seed=2)
    expected = torch.randperm(14, generator=torch.Generator().manual_seed(2))[:5].sort().values
    assert torch.equal(files.rows, expected)
    assert files.labels is None
