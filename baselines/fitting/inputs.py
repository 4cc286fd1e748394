"""Training inputs of a fit: the tokens of images just before the first site, kept in memory or computed when drawn."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...data import ImageDataset, fetch
from ...engine.backbone import Backbone
from ...engine.masked import MaskedState, run_masked, start_masked
from .task import frozen

CHUNK = 256  # images that are prepared together


class PreparedTokens:
    """A data set whose inputs are the tokens after the first half-blocks, `[P + N, D]` instead of `[C, H, W]`.

    A fit that does not train the network leaves the part before the first site as it is. Its output is computed once
    and kept in memory.

    Args:
        backbone: the network.
        dataset: labelled images.
        half: half-blocks to run.
        images: the first so many images; None: all.
        device: where to compute; the tokens are kept on the CPU.

    Raises:
        ValueError: for an empty dataset.
    """

    def __init__(
        self,
        backbone: Backbone,
        dataset: ImageDataset,
        half: int,
        images: int | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        size = len(dataset) if images is None else min(images, len(dataset))
        if size < 1:
            raise ValueError("dataset: expected at least one image, got an empty dataset")
        self.half, self.num_prefix = half, backbone.num_prefix
        tokens, labels = [], []
        with torch.no_grad(), frozen(backbone):
            for start in range(0, size, CHUNK):
                inputs, targets = fetch(dataset, range(start, min(start + CHUNK, size)))
                tokens.append(run_masked(backbone, start_masked(backbone, inputs.to(device)), half)[0].x.cpu())
                labels.append(targets)
        self.tokens, self.labels = torch.cat(tokens), torch.cat(labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.tokens[index], int(self.labels[index])

    def batch(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """Tokens `[B, P + N, D]` and labels `[B]` int64."""
        rows = torch.as_tensor(indices)
        return self.tokens[rows], self.labels[rows]

    def state(self, inputs: Tensor) -> MaskedState:
        """The tokens of a batch as a state that `run_masked` continues from."""
        return MaskedState(inputs, self.num_prefix, self.half)


class ImageInputs:
    """The same without memory, for data sets that are large or augmented: each batch of images is run when drawn.

    Args:
        backbone: the network.
        dataset: labelled images.
        half: half-blocks to run.

    Raises:
        ValueError: for an empty dataset.
    """

    def __init__(self, backbone: Backbone, dataset: ImageDataset, half: int) -> None:
        if not len(dataset):
            raise ValueError("dataset: expected at least one image, got an empty dataset")
        self.backbone, self.dataset, self.half = backbone, dataset, half

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.dataset[index]

    def batch(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """Images `[B, C, H, W]` and labels `[B]` int64."""
        return fetch(self.dataset, indices)

    @torch.no_grad()
    def state(self, inputs: Tensor) -> MaskedState:
        """The tokens of a batch as a state that `run_masked` continues from."""
        return run_masked(self.backbone, start_masked(self.backbone, inputs), self.half)[0]


Inputs = PreparedTokens | ImageInputs


def inputs_of(backbone: Backbone, dataset: ImageDataset, half: int, cached: int) -> Inputs:
    """The first `cached` images, prepared up to a half-block; 0: all images, each run when drawn."""
    if not cached:
        return ImageInputs(backbone, dataset, half)
    return PreparedTokens(backbone, dataset, half, cached, device_of(backbone))


def device_of(backbone: Backbone) -> torch.device:
    """The device of a network."""
    return backbone.position.device
