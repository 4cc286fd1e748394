"""Batches of images and labels from any map-style dataset."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor


def whole_numbers(name: str, values: Iterable[Any]) -> list[int]:
    """Numbers of any type of integers as ints.

    Raises:
        TypeError: for a number of another type, `True` and `False` included.
    """
    plain = values.tolist() if isinstance(values, Tensor | np.ndarray) else values
    return [_whole(name, value) for value in plain]


def _whole(name: str, value: Any) -> int:
    value = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a whole number, got {value!r}")
    return int(value)


class ImageDataset(Protocol):
    """Any map-style dataset of `(image [C, H, W] float, label)` pairs.

    Two methods are used where a dataset has them: `batch(indices)`, several items at once, and `groups(indices)`, the
    group of each item, `[B]` int64. Images of one group were made from the same original (one person, one video, one
    handwritten digit), so that standard errors must not count them as independent.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


def fetch(dataset: ImageDataset, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
    """Items of a dataset as images `[B, C, H, W]` and labels `[B]` int64.

    The dataset's own `batch(indices)` is used where it has one.

    Raises:
        ValueError: for an index outside the dataset.
        TypeError: for an item that is not a tensor with a label, or for indices or labels that are no whole numbers:
            a mask and a label of 3.7 would otherwise mean other images and another class.
    """
    rows = whole_numbers("index", indices)
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
    return torch.stack([image for image, _ in items]), torch.tensor(whole_numbers("label", [item[1] for item in items]))


class BatchList(list[tuple[Tensor, Tensor]]):
    """Batches of images `[B, C, H, W]` and labels `[B]`.

    Attributes:
        groups: the group of each image, `[images]` int64; None: each image is its own.
    """

    groups: Tensor | None = None


def groups_of(dataset: ImageDataset, indices: Sequence[int] | Tensor) -> Tensor | None:
    """The group of each item, `[B]` int64; None where the dataset has no groups."""
    groups = getattr(dataset, "groups", None)
    return None if groups is None else groups(indices)


def batches_of(
    dataset: ImageDataset, size: int, device: str | torch.device = "cpu", images: int | None = None
) -> BatchList:
    """The first `images` items of a dataset (None: all) as batches of at most `size`, on a device, with groups."""
    count = len(dataset) if images is None else min(images, len(dataset))
    if size < 1:
        raise ValueError(f"size: expected at least 1 image per batch, got {size}")
    starts = range(0, count, size)
    pairs = [fetch(dataset, range(start, min(start + size, count))) for start in starts]
    batches = BatchList((batch.to(device), labels.to(device)) for batch, labels in pairs)
    batches.groups = groups_of(dataset, range(count))
    return batches
