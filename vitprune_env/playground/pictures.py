"""Pictures to choose from: labelled images of a data set, and what somebody brings along."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from PIL import Image
from timm.data import create_transform
from torch import Tensor

from vitprune_env.benchmarking.images import Batches, shown_images
from vitprune_env.data import data_config
from vitprune_env.data.image_files import as_shown
from vitprune_env.engine.backbone import Backbone
from vitprune_env.plots.render import label_text, to_rgb


@dataclass(frozen=True, eq=False)
class Picture:
    """An image as the network gets it, and as people see it."""

    pixels: Tensor  # [C, H, W], normalised
    rgb: np.ndarray  # [H, W, 3] in 0..1
    label: int | None = None  # the true class; None: unknown
    caption: str = ""


def _picture(backbone: Backbone, pixels: Tensor, label: int | None, caption: str) -> Picture:
    config = data_config(backbone)
    rgb = to_rgb(pixels[None], config["mean"], config["std"])[0].permute(1, 2, 0).numpy()
    return Picture(pixels, rgb, label, caption)


def from_batches(backbone: Backbone, batches: Batches, count: int) -> list[Picture]:
    """The first images of a data set, of as many classes as there are among them.

    Args:
        backbone: the network that they are prepared for.
        batches: labelled images, normalised.
        count: how many.

    Raises:
        ValueError: for no images.
    """
    images, labels = shown_images(batches, count)
    names = backbone.class_names or getattr(batches, "class_names", None)
    return [
        _picture(backbone, pixels, label, label_text(label, names))
        for pixels, label in zip(images, labels.tolist(), strict=True)
    ]


def from_image(backbone: Backbone, image: Image.Image, caption: str = "your picture") -> Picture:
    """A picture of one's own, of any size, brought to the network's size as its validation images are.

    Args:
        backbone: the network.
        image: as Pillow opens it.
        caption: what it is called.
    """
    config = data_config(backbone)
    shown = as_shown(image, "L" if config["input_size"][0] == 1 else "RGB")
    pixels = cast(Any, create_transform(**config))(shown).to(backbone.position.device)
    return _picture(backbone, pixels, None, caption)
