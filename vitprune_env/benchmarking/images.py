"""Images to compare policies on, as batches that can be gone through more than once."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vitprune_env.data import BatchList, ImageDataset, ImageFiles, batches_of, fetch, groups_of

Batches = Iterable[tuple[Tensor, Tensor]]  # images [B, C, H, W] and labels [B]; iterated more than once
Images = ImageDataset | ImageFiles | Sequence[tuple[Tensor, Tensor]]

IN_MEMORY = 1 << 30  # bytes of images that are kept rather than read again
TUNE_IMAGES = 256  # images that policies are calibrated on, unless they are given
TUNE_SHARE = 4  # at most one in so many images is set aside for that
LOOK = 1000  # images among which those of a figure are looked for
DECODED = 64  # image files that are decoded in one batch

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Rows:
    """Some items of a dataset."""

    dataset: ImageDataset
    rows: Sequence[int]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[self.rows[index]]

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Several items at once, the way the dataset does it best."""
        return fetch(self.dataset, [self.rows[int(index)] for index in indices])

    def groups(self, indices: Sequence[int]) -> Tensor | None:
        """The group of each item, if the dataset has groups."""
        return groups_of(self.dataset, [self.rows[int(index)] for index in indices])


@dataclass(frozen=True)
class _Decoded:
    """Image files that have been read."""

    images: Tensor  # [images, C, H, W]
    labels: Tensor  # [images]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.labels[index])

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Several items at once."""
        rows = torch.as_tensor(indices)
        return self.images[rows], self.labels[rows]


@dataclass(frozen=True)
class _ReadAgain:
    """Batches of a dataset that is too large to be kept: every pass reads it again."""

    dataset: ImageDataset
    size: int
    device: torch.device

    @property
    def groups(self) -> Tensor | None:
        """The group of each image; None: each image is its own."""
        return groups_of(self.dataset, range(len(self.dataset)))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(self.dataset), self.size):
            images, labels = fetch(self.dataset, range(start, min(start + self.size, len(self.dataset))))
            yield images.to(self.device), labels.to(self.device)


def as_batches(data: Images, size: int, device: torch.device) -> Batches:
    """Images of any kind as batches on a device.

    Args:
        data: a dataset of (image, label) pairs, image files, or batches, which are only moved.
        size: images per batch of a dataset.
        device: where the batches are wanted.

    Raises:
        ValueError: for no images.
    """
    if isinstance(data, ImageFiles):
        return data.batches(size, device)
    if isinstance(data, Sequence):
        batches = BatchList((images.to(device), labels.to(device)) for images, labels in data)
        batches.groups = getattr(data, "groups", None)
        if not batches:
            raise ValueError("data: expected at least one image, got none")
        return batches
    if not len(data):
        raise ValueError("data: expected at least one image, got none")
    image, _ = fetch(data, [0])
    if image.nbytes * len(data) > IN_MEMORY:
        return _ReadAgain(data, size, device)
    return batches_of(data, size, device)


def read_once(data: Images) -> Images:
    """Image files decoded and prepared in one pass over the files, if they fit in memory; anything else as it is.

    Files that cannot be read are left out or end the program, as they were opened. What would take more than 1 GiB is
    read anew for every policy; a warning says so.

    Raises:
        ValueError: if no file can be read.
    """
    if not isinstance(data, ImageFiles):
        return data
    values = 1
    for size in data.config["input_size"]:
        values *= size
    if (needed := 4 * values * len(data)) > IN_MEMORY:
        _log.warning("%d images need %.1f GiB: they are read anew for every policy", len(data), needed / 2**30)
        return data
    batches = list(data.batches(DECODED))
    if not batches:
        raise ValueError("data: expected at least one readable image, got none")
    images, labels = (torch.cat(part) for part in zip(*batches, strict=True))
    return _Decoded(images, labels)


def set_aside(data: Images) -> tuple[Images, Images]:
    """Images to report on and images to calibrate on, without overlap, out of one set.

    At most a quarter of the images, and at most 256, are set aside, evenly spread over the set.

    Raises:
        ValueError: for fewer than two images.
    """
    if isinstance(data, Sequence):
        whole: Any = _Pairs(data)
    else:
        whole = data
    count = len(whole)
    if count < 2:
        raise ValueError(f"data: expected at least two images, one to calibrate on; got {count}")
    aside = max(1, min(TUNE_IMAGES, count // TUNE_SHARE))
    chosen = [index * count // aside for index in range(aside)]
    taken = set(chosen)
    return _Rows(whole, [index for index in range(count) if index not in taken]), _Rows(whole, chosen)


def some_images(data: ImageDataset, count: int) -> ImageDataset:
    """At most `count` items of a dataset, evenly spread over it."""
    count = min(count, len(data))
    return _Rows(data, [index * len(data) // count for index in range(count)])


class _Pairs:
    """Batches as a dataset of single images."""

    def __init__(self, batches: Sequence[tuple[Tensor, Tensor]]) -> None:
        self.batches = batches
        self.place = [(batch, row) for batch, (_, labels) in enumerate(batches) for row in range(len(labels))]

    def __len__(self) -> int:
        return len(self.place)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        batch, row = self.place[index]
        images, labels = self.batches[batch]
        return images[row], int(labels[row])

    def groups(self, indices: Sequence[int]) -> Tensor | None:
        """The group of each image, if the batches have groups."""
        groups = getattr(self.batches, "groups", None)
        return None if groups is None else groups[list(indices)]


def first_images(batches: Batches, count: int) -> tuple[Tensor, Tensor]:
    """The first `count` images and labels of some batches, fewer if there are not as many."""
    images, labels, found = [], [], 0
    for batch, targets in batches:
        images.append(batch)
        labels.append(targets)
        found += len(targets)
        if found >= count:
            break
    return torch.cat(images)[:count], torch.cat(labels)[:count]


def shown_rows(labels: Tensor, count: int) -> list[int]:
    """Which images of a set to draw: the first one of each of `count` classes, so that sorted folders show several.

    Args:
        labels: `[images]`; the first `LOOK` of them are looked at.
        count: how many images; where there are fewer classes, the first other images follow.
    """
    first: dict[int, int] = {}
    for row, label in enumerate(labels[:LOOK].tolist()):
        first.setdefault(label, row)
    chosen = list(first.values())[:count]
    return chosen + [row for row in range(len(labels)) if row not in chosen][: count - len(chosen)]


def shown_images(batches: Batches, count: int) -> tuple[Tensor, Tensor]:
    """The images and labels of `shown_rows`; no more batches are read than it takes to find them.

    Raises:
        ValueError: for no images.
    """
    kept: dict[int, Tensor] = {}
    labels = torch.empty(0, dtype=torch.int64)
    for images, targets in batches:
        start, labels = len(labels), torch.cat([labels, targets.cpu()])
        rows = shown_rows(labels, count)
        kept = {row: kept[row] if row in kept else images[row - start] for row in rows}
        if len(labels) >= LOOK or len(labels[rows].unique()) == count:
            break
    if not kept:
        raise ValueError("test: expected at least one batch of labelled images, got an empty dataset")
    images = torch.stack(list(kept.values()))
    return images, labels[list(kept)].to(images.device)


def digest(*tensors: Tensor) -> str:
    """A short name for the content of some tensors."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]
