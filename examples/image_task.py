"""Flags and functions of the examples for image files: which network, which images."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor

from vitprune_env import Backbone, load_backbone
from vitprune_env.data import ImageFiles, open_images


@dataclass(frozen=True)
class ImageArgs:
    """Which network to prune, and on which images; the built-in task without any of these."""

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


def load_network(args: ImageArgs, default: str, seed: int, device: str) -> Backbone:
    """The network of the flags, by default the one called `default`.

    Raises:
        ValueError: for a network that cannot classify the built-in task where no images are given.
    """
    name = args.model or default
    if not args.reads_files and name != "vit_digits":
        raise ValueError(f"data_dir: expected images for {name}; only vit_digits reads the built-in task")
    options = {"img_size": args.img_size, "num_classes": args.num_classes}
    given: dict[str, Any] = {key: value for key, value in options.items() if value is not None}
    pretrained = args.pretrained and args.weights is None
    if not pretrained and args.weights is None and name != "vit_digits":
        print(f"note: {name} has random weights; --pretrained downloads them, --weights reads a file")
    torch.manual_seed(seed)
    return load_backbone(name, pretrained, args.weights, **given).to(device)


def open_split(args: ImageArgs, backbone: Backbone, split: str, limit: int | None, seed: int) -> ImageFiles:
    """Images of a split, at most `limit` of them (None: all)."""
    return open_images(
        backbone,
        args.data_dir,
        split,
        args.dataset,
        args.class_map,
        args.download,
        on_corrupt=args.on_corrupt,
        limit=limit,
        seed=seed,
        workers=args.workers,
    )


def first_images(batches: Iterable[tuple[Tensor, Tensor]], count: int) -> tuple[Tensor, Tensor]:
    """The first `count` images and labels of some batches, fewer if there are not as many."""
    images, labels, found = [], [], 0
    for batch, targets in batches:
        images.append(batch)
        labels.append(targets)
        found += len(targets)
        if found >= count:
            break
    return torch.cat(images)[:count], torch.cat(labels)[:count]
