"""Image files, read by timm and prepared for a backbone.

`open_images` reads class folders and all else that `timm.data.create_dataset` reads (`torch/...`, `hfds/...`), prepared
as the backbone's `pretrained_cfg` says; `ImageFiles.for_backbone` prepares a dataset object. Labels are the numbers of
the backbone's head, see `classes`. timm silently replaces an unreadable image by the next one. Here it is reported by
name, and `on_corrupt` decides whether it is skipped or ends the program.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import create_dataset, create_loader, create_transform, resolve_model_data_config
from timm.data.dataset import ImageDataset as TimmDataset
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from vitprune_env.data.batches import whole_numbers
from vitprune_env.data.classes import in_turn, labels_of, names_of, numbers_by_name, warn_of_order
from vitprune_env.data.folders import ClassFolders, split_folder
from vitprune_env.engine.backbone import Backbone
from vitprune_env.errors import UnreadableImageError

OnCorrupt = Literal["skip", "fail"]
DEEP = 257  # 16-bit values to the unit of 8 bits

_log = logging.getLogger(__name__)


def data_config(backbone: Backbone) -> dict[str, Any]:
    """How images are prepared for a backbone: timm's data configuration of the model, at the size it was built for.

    Returns:
        `input_size` (C, H, W), `mean` and `std` per channel, `interpolation`, `crop_pct`, `crop_mode`.

    Raises:
        ValueError: for a model that takes neither RGB nor grey images.
    """
    channels = backbone.in_chans
    if channels not in (1, 3):
        raise ValueError(
            f"model: expected one for images of 3 channels (RGB) or 1 (grey), got {backbone.name} for {channels}"
        )
    size = {"input_size": (channels, *backbone.image_size)}
    config = resolve_model_data_config(cast(Any, backbone.model), args=size)
    for name in ("mean", "std"):
        values = config[name]
        if len(values) != channels:  # for a model built for grey images, timm still gives RGB statistics
            config[name] = (sum(values) / len(values),) * channels
    return config


class ImageFiles(Dataset[tuple[Tensor, int]]):
    """Images of a timm dataset, decoded and prepared on access.

    Indexing (training) replaces an unreadable image by the next readable one; `batches` (evaluation) leaves it out.

    Args:
        source: map-style dataset of timm or torchvision, without a transform.
        config: the result of `data_config`.
        on_corrupt: `"skip"` leaves out an unreadable image with a warning that names it; `"fail"` raises an
            `UnreadableImageError`.
        limit: use this many images, drawn at random and evenly over the classes, in the order of the source; None: all.
            Where labels are not known without decoding, the draw is from all images alike.
        seed: of that draw.
        workers: threads that decode for `batch`, processes that decode for `batches`.
        head: the class names of the network (`backbone.class_names`), to whose numbers labels are mapped by name; None:
            the source's own numbers.
        numbered: whether a file of the user numbers the source's classes; it wins over other names of the head's.

    Attributes:
        rows: `[images]` int64, their numbers in the source.
        class_names: names of the classes by label; None: unknown.

    Raises:
        ValueError: for no images, a limit below 1, or classes that the head does not have.
    """

    def __init__(
        self,
        source: Any,
        config: dict[str, Any],
        on_corrupt: OnCorrupt = "skip",
        limit: int | None = None,
        seed: int = 0,
        workers: int = 0,
        head: Sequence[str] | None = None,
        numbered: bool = False,
    ) -> None:
        if not len(source):
            raise ValueError("data: expected at least one image, got an empty dataset")
        if limit is not None and limit < 1:
            raise ValueError(f"limit: expected at least 1 image, got {limit}")
        if on_corrupt not in ("skip", "fail"):
            raise ValueError(f"on_corrupt: expected 'skip' or 'fail', got {on_corrupt!r}")
        self.source, self.config, self.on_corrupt, self.workers = source, config, on_corrupt, workers
        self.transform: Callable[[Image.Image], Tensor] = cast(Any, create_transform(**config))
        names = names_of(source)
        self._numbers = numbers_by_name(names, head, numbered)
        self.class_names = names if self._numbers is None else tuple(cast(Any, head))
        if head is None and not numbered:
            warn_of_order(source, names)
        self.rows = torch.arange(len(source))
        if limit is not None and limit < len(source):
            self.rows = self._drawn(limit, seed)[0]

    @classmethod
    def for_backbone(cls, source: Any, backbone: Backbone, **options: Any) -> ImageFiles:
        """A dataset of timm or torchvision, prepared for a network, its labels in the numbers of the network's head.

        Args:
            source: the dataset, without a transform.
            backbone: the network.
            **options: of `ImageFiles`: on_corrupt, limit, seed, workers, numbered.

        Raises:
            ValueError: for classes that do not fit the head.
        """
        files = cls(source, data_config(backbone), head=backbone.class_names, **options)
        _check_classes(files, backbone, options.get("numbered", False))
        return files

    def split(self, count: int, seed: int = 0) -> tuple[ImageFiles, ImageFiles]:
        """Two parts without a common image: `count` images, drawn as for `limit`, and all others.

        Args:
            count: images of the first part; at least one must be left.
            seed: of the draw.

        Raises:
            ValueError: for a count that leaves one part empty.
        """
        if not 0 < count < len(self):
            raise ValueError(f"count: expected 1 to {len(self) - 1} of {len(self)} images, got {count}")
        parts = copy.copy(self), copy.copy(self)
        for part, rows in zip(parts, self._drawn(count, seed), strict=True):
            part.rows = rows
        return parts

    def _drawn(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        """Rows of `count` images, as many of each class as possible, and the rows of the others."""
        generator, labels = torch.Generator().manual_seed(seed), labels_of(self.source)
        size = len(self.rows)
        order = torch.randperm(size, generator=generator) if labels is None else in_turn(labels[self.rows], generator)
        return self.rows[order[:count].sort().values], self.rows[order[count:].sort().values]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Normalised image `[C, H, W]` and label; those of the next readable image if this one is skipped."""
        start = range(len(self))[index]  # an IndexError outside of it ends loops over all images
        picture, label = self.picture(start)
        return self.transform(picture), label

    def picture(self, index: int) -> tuple[Image.Image, int]:
        """The image as it is in its file, and its label; those of the next readable one if this one is skipped.

        Raises:
            UnreadableImageError: for one that cannot be read, unless such are skipped; and if none can be read.
        """
        for step in range(len(self)):
            item = self._opened((index + step) % len(self))
            if not isinstance(item, UnreadableImageError):
                return item
            self.report(item)
        raise UnreadableImageError("data: expected at least one readable image, got none")

    def batch(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """Several items at once: images `[B, C, H, W]` and labels `[B]` int64."""
        with ThreadPoolExecutor(max(1, self.workers)) as pool:
            items = list(pool.map(self.__getitem__, whole_numbers("index", indices)))
        return torch.stack([image for image, _ in items]), torch.tensor([label for _, label in items])

    def batches(self, size: int, device: str | torch.device = "cpu") -> ImageBatches:
        """All images in order, each once, in batches of at most `size` on a device."""
        return ImageBatches(self, size, device)

    def read(self, index: int) -> tuple[Tensor, int] | UnreadableImageError:
        """Item `index`, or the error that says what is wrong with its file."""
        item = self._opened(index)
        return item if isinstance(item, UnreadableImageError) else (self.transform(item[0]), item[1])

    def _number(self, label: int) -> int:
        """The head's number of a class of the source."""
        return label if self._numbers is None else self._numbers[label]

    @property
    def labels(self) -> Tensor | None:
        """Labels of all images, `[images]` int64, without decoding them; None where the source does not know them."""
        labels = labels_of(self.source)
        return None if labels is None else torch.tensor([self._number(label) for label in labels[self.rows].tolist()])

    def report(self, error: UnreadableImageError) -> None:
        """Log a warning about an unreadable image, or raise the error if `on_corrupt` is `"fail"`."""
        if self.on_corrupt == "fail":
            raise error
        _log.warning("skipped %s", error)

    def name(self, index: int) -> str:
        """The file of item `index`, or its number where the source has no files."""
        row = int(self.rows[index])
        if isinstance(self.source, TimmDataset):
            return str(self.source.filename(row, absolute=True) or f"image {row}")
        return f"image {row}"

    def to_rgb(self, images: Tensor) -> Tensor:
        """Undo the normalisation of `images [B, C, H, W]`: `[B, 3, H, W]` in [0, 1], for display."""
        mean, std = (torch.tensor(self.config[name])[:, None, None] for name in ("mean", "std"))
        return (images.float().cpu() * std + mean).clamp(0, 1).expand(-1, 3, -1, -1)

    @property
    def num_classes(self) -> int | None:
        """Number of classes of the source; None if it is unknown."""
        names = names_of(self.source)
        return None if names is None else len(names)

    def _opened(self, index: int) -> tuple[Image.Image, int] | UnreadableImageError:
        """Item `index` before it is prepared, or the error that says what is wrong with its file."""
        try:
            image, label = self._decode(int(self.rows[index]))
        except (OSError, EOFError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            return UnreadableImageError(f"{self.name(index)}: not a readable image ({error})")
        return image, self._number(int(label))

    def _decode(self, row: int) -> tuple[Image.Image, int]:
        mode = "L" if self.config["input_size"][0] == 1 else "RGB"
        if not isinstance(self.source, TimmDataset):
            image, label = self.source[row]
            return as_shown(image, mode), label
        file, label, *_ = cast(Any, self.source.reader)[row]
        with file:
            return as_shown(Image.open(file), mode), label


def as_shown(image: Image.Image, mode: str) -> Image.Image:
    """An image as viewers show it: turned as the camera was held, 16 bits brought to 8, on white where transparent.

    Args:
        image: as Pillow opens it.
        mode: of the result, `"RGB"` or `"L"`.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image) / DEEP).clip(0, 255).astype(np.uint8)).convert(mode)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


class ImageBatches:
    """Batches of `(images, labels)` on a device, without the unreadable images; may be iterated repeatedly.

    Attributes:
        skipped: the unreadable files of the last iteration.
    """

    def __init__(self, files: ImageFiles, size: int, device: str | torch.device) -> None:
        self.files, self.size, self.device = files, size, torch.device(device)
        self.skipped: list[str] = []

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes by label; None: unknown."""
        return self.files.class_names

    def __len__(self) -> int:
        return -(-len(self.files) // self.size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.skipped = []
        loader = create_loader(
            cast(Any, _Readable(self.files)),
            batch_size=self.size,
            num_workers=self.files.workers,
            use_prefetcher=False,
            collate_fn=_collate,
            pin_memory=self.device.type == "cuda",
            persistent_workers=False,
            **self.files.config,
        )
        for images, labels, errors in cast(Any, loader):
            for error in errors:
                self.files.report(error)
                self.skipped.append(str(error).partition(": ")[0])
            if len(labels):
                yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)


class _Readable(Dataset[Any]):
    """The results of `ImageFiles.read` as a dataset whose `transform` timm's loader may set without effect."""

    def __init__(self, files: ImageFiles) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | UnreadableImageError:
        return self.files.read(index)


def _collate(items: list[Any]) -> tuple[Tensor, Tensor, list[UnreadableImageError]]:
    """Stack the readable items; pass the errors on to the main process, which reports them."""
    errors = [item for item in items if isinstance(item, UnreadableImageError)]
    good = [item for item in items if not isinstance(item, UnreadableImageError)]
    images = torch.stack([image for image, _ in good]) if good else torch.empty(0)
    return images, torch.tensor([label for _, label in good], dtype=torch.int64), errors


def open_images(
    backbone: Backbone,
    root: str | Path | None,
    split: str = "validation",
    name: str = "",
    class_map: str | Path | None = None,
    download: bool = False,
    **options: Any,
) -> ImageFiles:
    """Open labelled images, prepared for a backbone, through `timm.data.create_dataset`.

    Args:
        backbone: the network that will get them; it determines size, normalisation and crop.
        root: folder with one folder per class, or with such folders under `train` and `val`; for the other kinds of
            dataset the folder that they are stored in, None for the default of their library.
        split: timm's name of the part: "train", "validation", ...
        name: timm's name of the dataset: "" for folders, `torch/<name>`, `hfds/<name>`.
        class_map: file that numbers the classes, as timm reads it; None: the backbone's class names do, or, where it
            has none, the order of the folder names.
        download: whether a `torch/` dataset may be downloaded.
        **options: of `ImageFiles`: on_corrupt, limit, seed, workers.

    Raises:
        ValueError: for a folder that is missing or empty, an unknown name or split, classes that the model's head does
            not have, or a number of classes that does not fit it.
        ImportError: for a kind of dataset whose library is not installed.
    """
    data_config(backbone)  # refuses models for other images, before folders are read
    source = open_source(root, split, name, class_map, download)
    return ImageFiles.for_backbone(source, backbone, numbered=class_map is not None, **options)


def open_source(
    root: str | Path | None,
    split: str = "validation",
    name: str = "",
    class_map: str | Path | None = None,
    download: bool = False,
) -> Any:
    """A dataset of timm or torchvision as `open_images` reads it, for any network; `names_of` tells its classes.

    Raises:
        ValueError: for a folder that is missing or empty, an unknown name or split.
        ImportError: for a kind of dataset whose library is not installed.
    """
    if not name and (root is None or not Path(root).is_dir()):  # timm cannot read tar files in threads or processes
        raise ValueError(f"data_dir: expected a folder of images, found none at {root}")
    if class_map is not None and not any(path.is_file() for path in (Path(class_map), Path(root or "", class_map))):
        raise ValueError(f"class_map: expected a file with a class name per line, found none at {class_map}")
    place, classes = (None if path is None else str(path) for path in (root, class_map))
    try:
        if not name:
            folder = split_folder(Path(cast(str, place)), split)
            return TimmDataset(str(folder), reader=cast(Any, ClassFolders(folder, classes)))
        source = create_dataset(name, place, split, class_map=cast(Any, classes), download=download)
    except (AssertionError, RuntimeError, OSError, KeyError, TypeError) as error:
        kind = name or "a folder of images"
        raise ValueError(f"data_dir: expected {kind} with {split!r} images, got {root} ({error})") from error
    if isinstance(source, IterableDataset):
        raise ValueError(f"dataset: expected one with random access (folder, torch/, hfds/), got the stream {name!r}")
    return source


def _check_classes(files: ImageFiles, backbone: Backbone, given: bool) -> None:
    """Refuse images whose number of classes does not fit the model's head."""
    count, head = files.num_classes, backbone.num_classes
    by_name = backbone.class_names is not None and files.class_names == backbone.class_names
    if count is not None and (count > head or (count < head and not given and not by_name)):
        raise ValueError(
            f"classes: expected those of the head; the images have {count}, the head of {backbone.name} has {head}; "
            f"load the model with num_classes={count}, or number the classes as the model does with a class_map file"
        )
