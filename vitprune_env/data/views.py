"""Random views of image files, to train on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import functional as transforms
from torchvision.transforms.functional import InterpolationMode

from vitprune_env.data.image_files import ImageFiles

SPREAD = 2_654_435_761  # keeps the views of neighbouring seeds apart; torch's generator takes 32 bits of a seed


class RandomViews(Dataset[tuple[Tensor, int]]):
    """Several random crops of every image, as a dataset of its own.

    A network has learnt its training images by heart: it classifies nearly all of them, and its attention there is
    surer than on images that it has not seen. A part of an image, scaled to full size and perhaps mirrored, is closer
    to an image that it has not seen.

    View `v` of image `i` has the index `v * len(files) + i`. It depends on the seed and this index only.

    Args:
        files: the images.
        count: views of each.
        scale: smallest and largest part of the image's area that a view shows, above 0 and at most 1.
        ratio: smallest and largest ratio of width to height of that part.
        flip: whether half of the views are mirrored.
        seed: of the views.

    Raises:
        ValueError: for a count, scale or ratio out of range.
    """

    def __init__(
        self,
        files: ImageFiles,
        count: int = 8,
        scale: tuple[float, float] = (0.35, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: bool = True,
        seed: int = 0,
    ) -> None:
        if count < 1:
            raise ValueError(f"count: expected at least 1 view of every image, got {count}")
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"scale: expected two parts above 0 and at most 1, the smaller first, got {scale}")
        if not 0 < ratio[0] <= ratio[1]:
            raise ValueError(f"ratio: expected two ratios above 0, the smaller first, got {ratio}")
        self.files, self.count, self.scale, self.ratio, self.flip, self.seed = files, count, scale, ratio, flip, seed

    def __len__(self) -> int:
        return self.count * len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Normalised view `[C, H, W]` and label; an unreadable image is replaced by the next readable one."""
        picture, label = self.files.picture(index % len(self.files))
        return self._view(picture, torch.Generator().manual_seed((self.seed * SPREAD + index) % 2**32)), label

    def batch(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """Several views at once: images `[B, C, H, W]` and labels `[B]` int64."""
        with ThreadPoolExecutor(max(1, self.files.workers)) as pool:
            items = list(pool.map(self.__getitem__, [int(index) for index in indices]))
        return torch.stack([image for image, _ in items]), torch.tensor([label for _, label in items])

    def _view(self, picture: Image.Image, generator: torch.Generator) -> Tensor:
        config = self.files.config
        area, aspect, across, down, mirror = torch.rand(5, generator=generator, dtype=torch.float64).tolist()
        area = self.scale[0] + area * (self.scale[1] - self.scale[0])
        low, high = (math.log(end) for end in self.ratio)
        aspect = math.exp(low + aspect * (high - low))
        width = min(picture.width, max(1, round(math.sqrt(area * picture.width * picture.height * aspect))))
        height = min(picture.height, max(1, round(math.sqrt(area * picture.width * picture.height / aspect))))
        left, top = round(across * (picture.width - width)), round(down * (picture.height - height))
        size = list(config["input_size"][1:])
        how = InterpolationMode(config["interpolation"])
        view: Any = transforms.resized_crop(cast(Any, picture), top, left, height, width, size, how)
        if self.flip and mirror < 0.5:
            view = transforms.hflip(view)
        return transforms.normalize(transforms.to_tensor(view), config["mean"], config["std"])
