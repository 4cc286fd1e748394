"""Flags that several commands share, and what they stand for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import tyro

if TYPE_CHECKING:
    from vitprune_env.benchmarking.images import Batches
    from vitprune_env.data import Digits, ImageFiles
    from vitprune_env.engine.backbone import Backbone

T = TypeVar("T")
Folder = Annotated[Path, tyro.conf.arg(metavar="DIR")]
TUNE_SEED = 1_000_003  # scenes to calibrate on: training digits, other compositions than those of training
TEST_SEED = 2_000_003  # scenes to report on


@dataclass(frozen=True)
class CommonFlags:
    """Flags that every command and example has."""

    output: Folder = Path("runs/latest")
    """Folder for results; made if it does not exist."""
    seed: int = 0
    """Seed of everything random: data, initial weights, exploration."""
    device: str = "cpu"
    """Where to run: cpu, cuda, cuda:1, ..."""
    threads: int | None = None
    """CPU threads; None: one for the built-in model, which is too small for more, and torch's choice for others."""
    resume: bool = False
    """Go on from what lies in the output folder; on an empty folder this starts fresh."""
    quick: bool = False
    """A small run that shows that everything works; its numbers mean nothing."""

    def prepare(self, built_in: bool = True) -> None:
        """Make the output folder and set the number of threads, for the built-in model or another.

        Raises:
            StorageError: if the folder cannot be made.
        """
        import torch

        from vitprune_env.errors import StorageError

        try:
            self.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"output: expected a folder, got {self.output} ({error.strerror})") from error
        threads = 1 if self.threads is None and built_in else self.threads
        if threads is not None:
            torch.set_num_threads(threads)


@dataclass(frozen=True)
class ImageFlags:
    """Which network, and which images; without any of these the built-in task: handwritten digits, network included."""

    data_dir: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Images to use instead of the built-in task: class folders, directly or under train and val."""
    dataset: str = ""
    """timm's name of the dataset, such as torch/cifar10 or hfds/ILSVRC/imagenet-1k; empty: folders."""
    class_map: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """File that numbers the classes; needed where the images show fewer classes than the network knows."""
    download: bool = False
    """Let torchvision download the dataset (torch/...)."""
    on_corrupt: Literal["skip", "fail"] = "skip"
    """What to do about image files that cannot be read; they are named either way."""
    workers: int = 2
    """Processes (or threads) that decode images."""
    model: str | None = None
    """Network to prune: vit_digits, lv_vit_s, or any plain ViT of timm; None: the policy's, or vit_digits."""
    pretrained: bool = False
    """Let timm download the network's weights, unless a file is given."""
    weights: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Local weights of the network instead: .pth, .safetensors or .npz."""
    img_size: int | None = None
    """Height and width of the images, in pixels; None: the network's own. Position embeddings are interpolated."""
    num_classes: int | None = None
    """Classes of the network; None: its own, 1000 for ImageNet."""

    @property
    def reads_files(self) -> bool:
        """Whether images come from files, not from the built-in task."""
        return self.data_dir is not None or bool(self.dataset)

    def network(self, seed: int, device: str, default: str = "vit_digits") -> Backbone:
        """The network of the flags, by default the one called `default`.

        Raises:
            SettingsError: for a network that cannot classify the built-in task where no images are given.
        """
        import torch

        from vitprune_env.errors import SettingsError
        from vitprune_env.models.load import load_backbone

        name = self.model or default
        if not self.reads_files and name != "vit_digits":
            raise SettingsError(f"data_dir: expected images for {name}; only vit_digits reads the built-in task")
        options = {"img_size": self.img_size, "num_classes": self.num_classes}
        given: dict[str, Any] = {key: value for key, value in options.items() if value is not None}
        pretrained = self.pretrained and self.weights is None
        if not pretrained and self.weights is None and name != "vit_digits":
            print(f"note: {name} has random weights; --pretrained downloads them, --weights reads a file")
        torch.manual_seed(seed)
        return load_backbone(name, pretrained, self.weights, **given).to(device)

    def held_out_split(self, split: str | None) -> str:
        """The split to report on: the asked one, else test of the built-in task and validation of image files."""
        return split or ("validation" if self.reads_files else "test")

    def batches(self, backbone: Backbone, split: str, count: int | None, seed: int, size: int, device: str) -> Batches:
        """Labelled images of a split, see `open`, in batches of at most `size` on a device."""
        import torch

        from vitprune_env.benchmarking.images import as_batches

        return as_batches(self.open(backbone, split, count, seed), size, torch.device(device))

    def open(self, backbone: Backbone, split: str, count: int | None, seed: int) -> Digits | ImageFiles:
        """Images of a split.

        Args:
            backbone: the network that they are prepared for.
            split: train, validation or test.
            count: how many; None: 2000 scenes of the built-in task, all image files.
            seed: which scenes of the built-in task, or which of the files.
        """
        from vitprune_env.data import Digits, open_images

        if not self.reads_files:
            return Digits(split, size=count or 2000, seed=seed)
        return open_images(
            backbone,
            self.data_dir,
            split,
            self.dataset,
            self.class_map,
            self.download,
            on_corrupt=self.on_corrupt,
            limit=count,
            seed=seed,
            workers=self.workers,
        )


def read_flags(
    flags: type[T],
    argv: Sequence[str] | None,
    description: str | None,
    prog: str | None = None,
    default: T | None = None,
) -> T:
    """Read a command line into a dataclass of flags; groups of flags are nested dataclasses, flags have short names.

    Args:
        flags: the dataclass.
        argv: command line; None: that of the process.
        description: shown above the flags by `--help`.
        prog: name of the command; None: that of the process.
        default: values of flags that are not given; None: those of the dataclass.
    """
    given: dict[str, Any] = {} if default is None else {"default": default}
    short_names = (tyro.conf.OmitArgPrefixes,)
    return tyro.cli(flags, args=argv, description=description, prog=prog, config=short_names, **given)
