"""Image files, read by timm and prepared for a backbone.

`open_images` reads all that `timm.data.create_dataset` reads (class folders, `torch/...`, `hfds/...`) and prepares it
as the backbone's `pretrained_cfg` says. timm silently replaces an unreadable image by the next one. Here it is reported
by name, and `on_corrupt` decides whether it is skipped or ends the program.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, cast

import torch
from PIL import Image
from timm.data import create_dataset, create_loader, create_transform, resolve_model_data_config
from timm.data.dataset import ImageDataset as TimmDataset
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from vitprune_env.engine.backbone import Backbone
from vitprune_env.errors import UnreadableImageError

OnCorrupt = Literal["skip", "fail"]
SPLIT_FOLDERS = {"train", "training", "val", "valid", "validation", "eval", "evaluation", "test"}

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
        raise ValueError(f"channels: image files give 3 (RGB) or 1 (grey), {backbone.name} takes {channels}")
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
        limit: use this many images, drawn at random from all; None: all.
        seed: of that draw.
        workers: threads that decode for `batch`, processes that decode for `batches`.

    Raises:
        ValueError: for no images, or a limit below 1.
    """

    def __init__(
        self,
        source: Any,
        config: dict[str, Any],
        on_corrupt: OnCorrupt = "skip",
        limit: int | None = None,
        seed: int = 0,
        workers: int = 0,
    ) -> None:
        if not len(source):
            raise ValueError("data: expected at least one image, got an empty dataset")
        if limit is not None and limit < 1:
            raise ValueError(f"limit: expected at least 1 image, got {limit}")
        if on_corrupt not in ("skip", "fail"):
            raise ValueError(f"on_corrupt: expected 'skip' or 'fail', got {on_corrupt!r}")
        self.source, self.config, self.on_corrupt, self.workers = source, config, on_corrupt, workers
        self.transform: Callable[[Image.Image], Tensor] = cast(Any, create_transform(**config))
        rows = torch.arange(len(source))
        if limit is not None and limit < len(source):
            rows = torch.randperm(len(source), generator=torch.Generator().manual_seed(seed))[:limit].sort().values
        self.rows = rows  # [images] int64, their numbers in the source

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Normalised image `[C, H, W]` and label; those of the next readable image if this one is skipped."""
        picture, label = self.picture(index)
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
            items = list(pool.map(self.__getitem__, [int(index) for index in indices]))
        return torch.stack([image for image, _ in items]), torch.tensor([label for _, label in items])

    def batches(self, size: int, device: str | torch.device = "cpu") -> ImageBatches:
        """All images in order, each once, in batches of at most `size` on a device."""
        return ImageBatches(self, size, device)

    def read(self, index: int) -> tuple[Tensor, int] | UnreadableImageError:
        """Item `index`, or the error that says what is wrong with its file."""
        item = self._opened(index)
        return item if isinstance(item, UnreadableImageError) else (self.transform(item[0]), item[1])

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
        reader = getattr(self.source, "reader", self.source)
        known = getattr(reader, "class_to_idx", None) or getattr(reader, "classes", None)
        return len(known) if known else None

    def _opened(self, index: int) -> tuple[Image.Image, int] | UnreadableImageError:
        """Item `index` before it is prepared, or the error that says what is wrong with its file."""
        try:
            image, label = self._decode(int(self.rows[index]))
        except (OSError, EOFError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            return UnreadableImageError(f"{self.name(index)}: not a readable image ({error})")
        return image, int(label)

    def _decode(self, row: int) -> tuple[Image.Image, int]:
        mode = "L" if self.config["input_size"][0] == 1 else "RGB"
        if not isinstance(self.source, TimmDataset):
            image, label = self.source[row]
            return image.convert(mode), label
        file, label, *_ = cast(Any, self.source.reader)[row]
        with file:
            return Image.open(file).convert(mode), label


class ImageBatches:
    """Batches of `(images, labels)` on a device, without the unreadable images; may be iterated repeatedly.

    Attributes:
        skipped: the unreadable files of the last iteration.
    """

    def __init__(self, files: ImageFiles, size: int, device: str | torch.device) -> None:
        self.files, self.size, self.device = files, size, torch.device(device)
        self.skipped: list[str] = []

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
        class_map: file that numbers the classes, as timm reads it; None: in the order of the folder names.
        download: whether a `torch/` dataset may be downloaded.
        **options: of `ImageFiles`: on_corrupt, limit, seed, workers.

    Raises:
        ValueError: for a folder that is missing or empty, an unknown name or split, or more classes than the model has.
        ImportError: for a kind of dataset whose library is not installed.
    """
    config = data_config(backbone)
    if not name and (root is None or not Path(root).is_dir()):  # timm cannot read tar files in threads or processes
        raise ValueError(f"data_dir: expected a folder of images, found none at {root}")
    place, classes = (None if path is None else str(path) for path in (root, class_map))
    try:
        source = create_dataset(name, place, split, class_map=cast(Any, classes), download=download)
    except (AssertionError, RuntimeError, OSError, KeyError, TypeError) as error:
        raise ValueError(f"data_dir: could not open {name or 'image folder'} {split!r} at {root} ({error})") from error
    if isinstance(source, IterableDataset):
        raise ValueError(f"dataset: expected one with random access (folder, torch/, hfds/), got the stream {name!r}")
    files = ImageFiles(source, config, **options)
    if not name:
        _check_split(source, Path(cast(str, place)), split)
    _check_classes(files, backbone, given=class_map is not None)
    return files


def _check_split(source: Any, root: Path, split: str) -> None:
    """Refuse a folder of splits without the one asked for; timm would read the class folders of all splits."""
    if Path(source.reader.root) == root:
        others = sorted(SPLIT_FOLDERS & {path.name for path in root.iterdir() if path.is_dir()})
        if others:
            raise ValueError(f"split: found no folder for {split!r} in {root}, but {others}")


def _check_classes(files: ImageFiles, backbone: Backbone, given: bool) -> None:
    """Refuse images whose number of classes does not fit the model's head."""
    count, head = files.num_classes, backbone.num_classes
    if count is not None and (count > head or (count < head and not given)):
        raise ValueError(
            f"classes: the images have {count}, the head of {backbone.name} has {head}; load the model with "
            f"num_classes={count}, or number the classes as the model does with a class_map file"
        )
