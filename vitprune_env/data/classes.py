"""Names and numbers of classes: what a dataset calls its classes, and which of the head's numbers each of them gets.

The same folders are numbered differently by different libraries: timm ignores case and reads digits as numbers,
torchvision does neither. With `Faces, accordion` a head trained with one order reads every image of the other wrongly.
So classes are compared by name wherever both sides know their names.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.utils.misc import natural_key
from torch import Tensor
from torch.utils.data import Subset
from torchvision.datasets import DatasetFolder

LABELS = ("targets", "_labels", "y")  # where datasets of torchvision keep the labels of all images
SHOWN = 3  # names in a message

_log = logging.getLogger(__name__)


def names_of(source: Any) -> tuple[str, ...] | None:
    """Names of the classes of a dataset of timm or torchvision, in the order of their numbers; None: unknown."""
    if isinstance(source, Subset):
        return names_of(source.dataset)
    reader = getattr(source, "reader", source)
    numbered = getattr(reader, "class_to_idx", None)
    if isinstance(numbered, dict) and sorted(numbered.values()) == list(range(len(numbered))):
        numbered = sorted(numbered, key=numbered.__getitem__)
    for names in (numbered, *(getattr(reader, name, None) for name in ("wnids", "classes", "categories"))):
        if isinstance(names, list | tuple) and names and all(isinstance(name, str) for name in names):
            return tuple(names)
    return None


def labels_of(source: Any) -> Tensor | None:
    """Labels of a dataset of timm or torchvision, `[images]` int64, without decoding images; None: unknown."""
    if isinstance(source, Subset):
        labels = labels_of(source.dataset)
        return None if labels is None else labels[torch.as_tensor(source.indices, dtype=torch.int64)]
    reader = getattr(source, "reader", source)
    if isinstance(samples := getattr(reader, "samples", None), list):
        labels = [item[1] for item in samples]
    elif hasattr(reader, "iter_targets"):
        labels = list(reader.iter_targets())
    else:
        labels = next((found for name in LABELS if (found := getattr(reader, name, None)) is not None), [])
        labels = labels.tolist() if isinstance(labels, Tensor) else list(labels)
    known = len(labels) == len(source) and all(isinstance(label, int) for label in labels)
    return torch.tensor(labels, dtype=torch.int64) if known else None


def in_turn(labels: Tensor, generator: torch.Generator) -> Tensor:
    """A random order of images in which classes take turns: any first part of it holds them as evenly as possible.

    Args:
        labels: `[images]` int64.
        generator: draws the order.

    Returns:
        `[images]` int64, a permutation.
    """
    order = torch.randperm(len(labels), generator=generator)
    order = order[labels[order].argsort(stable=True)]  # class by class, at random inside of each
    counts = labels.unique(return_counts=True)[1]
    turn = torch.arange(len(labels)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    mixed = torch.randperm(len(labels), generator=generator)
    return order[mixed][turn[mixed].argsort(stable=True)]


def numbers_by_name(
    names: Sequence[str] | None, head: Sequence[str] | None, given: bool = False
) -> tuple[int, ...] | None:
    """The head's number of every class of a dataset.

    Args:
        names: classes of the dataset in the order of their numbers; None: unknown.
        head: classes of the network's head in its order; None: unknown.
        given: whether the user has numbered the classes of the dataset with a file, which then counts where the names
            are other ones.

    Returns:
        One number per class of the dataset; None: its own numbers stay.

    Raises:
        ValueError: for classes that the head does not have.
    """
    if names is None or head is None or tuple(names) == tuple(head):
        return None
    unknown = [name for name in names if name not in set(head)]
    if unknown and given:
        _warn(f"classes: the class map has names that the head does not have ({_few(unknown)}); its numbers are used")
        return None
    if unknown:
        others = [name for name in head if name not in set(names)]
        raise ValueError(
            f"classes: expected names of the head's classes (such as {_few(others or head)}), got {_few(unknown)}; to "
            "number the images as the head does, list their class folders in its order in a class_map file"
        )
    number = {name: index for index, name in enumerate(head)}
    numbers = tuple(number[name] for name in names)
    moved = sum(index != new for index, new in enumerate(numbers))
    if moved:
        _warn(
            f"classes: {moved} of {len(names)} have another number among the images than in the network's head; "
            "labels are mapped by name"
        )
    return numbers


def warn_of_order(source: Any, names: Sequence[str] | None) -> None:
    """Log once that timm and torchvision number these class folders differently, for a head that names no classes."""
    source = source.dataset if isinstance(source, Subset) else source
    timm_reads = isinstance(getattr(source, "reader", None), ReaderImageFolder)
    if names is None or not (timm_reads or isinstance(source, DatasetFolder)):
        return
    by_timm, by_torchvision = sorted(names, key=natural_key), sorted(names)
    moved = sum(one != other for one, other in zip(by_timm, by_torchvision, strict=True))
    rule, other = "timm (ignoring case, digits as numbers)", "torchvision's ImageFolder"
    if not timm_reads:
        rule, other = "torchvision's ImageFolder", "timm (which ignores case and reads digits as numbers)"
    if moved and list(names) == (by_timm if timm_reads else by_torchvision):
        _warn(
            f"classes: the network's head names no classes; they are numbered in the order of {rule}, and {moved} of "
            f"{len(names)} have another number with {other}; a class_map file lists them in the head's order"
        )


def _few(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:SHOWN])) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


@cache
def _warn(message: str) -> None:
    """Log a warning, the same one once per process: every split of a dataset would repeat it."""
    _log.warning(message)
