"""Batches of images and labels from any map-style dataset."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class ImageDataset(Protocol):
    """Any map-style dataset of `(image [C, H, W] float, label)` pairs."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


def fetch(dataset: ImageDataset, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
    """Items of a dataset as images `[B, C, H, W]` and labels `[B]` int64.

    The dataset's own `batch(indices)` is used where it has one.

    Raises:
        ValueError: for an index outside the dataset.
        TypeError: for an item that is not a tensor with a label.
    """
    rows = [int(index) for index in indices]
    size = len(dataset)
    for index in rows:
        if not 0 <= index < size:
            raise ValueError(f"index: expected 0 to {size - 1}, got {index}")
    batch = getattr(dataset, "batch", None)
    if batch is not None:
        return batch(rows)
    items = [dataset[index] for index in rows]
    for item in items:
        if not isinstance(item, (tuple, list)) or len(item) != 2 or not isinstance(item[0], Tensor):
            raise TypeError(f"dataset: expected items (tensor [C, H, W], label), got {type(item).__name__}")
    return torch.stack([image for image, _ in items]), torch.tensor([int(label) for _, label in items])


def batches_of(
    dataset: ImageDataset, size: int, device: str | torch.device = "cpu", images: int | None = None
) -> list[tuple[Tensor, Tensor]]:
    """The first `images` items of a dataset (None: all) as a list of batches of at most `size`, on a device."""
    count = len(dataset) if images is None else min(images, len(dataset))
    starts = range(0, count, size)
    pairs = [fetch(dataset, range(start, min(start + size, count))) for start in starts]
    return [(batch.to(device), labels.to(device)) for batch, labels in pairs]
