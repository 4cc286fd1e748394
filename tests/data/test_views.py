"""Random views of image files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image

from vitprune_env import Backbone
from vitprune_env.data import ImageFiles, RandomViews, open_images


@pytest.fixture
def files(tmp_path: Path) -> ImageFiles:
    """Four images that are red left and blue right, wider than high."""
    for number in range(4):
        folder = tmp_path / f"class{number % 2}"
        folder.mkdir(exist_ok=True)
        image = Image.new("RGB", (60, 40), (255, 0, 0))
        image.paste((0, 0, 255), (30, 0, 60, 40))
        image.save(folder / f"{number}.png")
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=12, depth=2, num_heads=2, num_classes=2
    )
    return open_images(Backbone(model), tmp_path)


def test_a_view_depends_on_seed_and_index_alone(files: ImageFiles) -> None:
    views = RandomViews(files, count=3)
    assert len(views) == 12
    images, labels = views.batch([7, 3, 7])
    torch.testing.assert_close(images[0], images[2], rtol=0, atol=0)
    torch.testing.assert_close(views[7][0], images[0], rtol=0, atol=0)
    assert labels.tolist() == [files[7 % 4][1], files[3][1], files[7 % 4][1]]
    assert not torch.equal(views[3][0], views[7][0])  # two views of the same image
    assert not torch.equal(RandomViews(files, count=3, seed=1)[7][0], images[0])


def test_the_whole_image_unmirrored_is_what_evaluation_squeezes(files: ImageFiles) -> None:
    whole = RandomViews(files, scale=(1.0, 1.0), ratio=(1.5, 1.5), flip=False)[0][0]
    shown = files.to_rgb(whole[None])[0]
    assert shown.shape == (3, 32, 32)
    assert shown[0, :, :12].min() > 0.95
    assert shown[2, :, 20:].min() > 0.95


def test_half_of_the_views_are_mirrored_and_they_show_the_parts_asked_for(files: ImageFiles) -> None:
    views = RandomViews(files, count=60, scale=(0.9, 1.0), ratio=(1.5, 1.5))
    red_left = [bool(files.to_rgb(views[index][0][None])[0, 0, :, :4].mean() > 0.5) for index in range(240)]
    assert 90 < sum(red_left) < 150
    small = RandomViews(files, count=60, scale=(0.05, 0.05), flip=False)
    mixed = 0  # a view of a twentieth of the area rarely sees the border between the colours
    for index in range(240):
        red = files.to_rgb(small[index][0][None])[0, 0]
        mixed += bool(red.min() < 0.3 and red.max() > 0.7)
    assert mixed < 120


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "count: expected at least 1"),
        ({"scale": (0.5, 0.2)}, "scale: expected two parts"),
        ({"scale": (0.0, 1.0)}, "scale: expected two parts"),
        ({"ratio": (2.0, 1.0)}, "ratio: expected two ratios"),
    ],
)
def test_refuses(files: ImageFiles, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RandomViews(files, **options)
