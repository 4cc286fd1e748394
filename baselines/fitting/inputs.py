"""Training inputs of a fit: the tokens of images just before the first site, kept in memory or computed when drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ...data import ImageDataset, fetch
from ...engine.backbone import Backbone
from ...engine.masked import MaskedState, run_masked, start_masked
from .task import frozen

MEMORY = 2.0  # GiB for prepared tokens


class PreparedTokens:
    """A data set whose inputs are tokens inside the network, `[K, P + N, D]`, instead of images `[C, H, W]`.

    A fit that does not train the network leaves the part before the first site as it is, and the whole dense network
    where that is the teacher. Both come from one pass per image. It is made when the image is first drawn, and the
    tokens stay in memory while there is room; the other images are run whenever they are drawn. Which ones are kept
    depends on their numbers alone, and they are run one by one, so that a resumed fit sees the same bits.

    Args:
        backbone: the network.
        dataset: labelled images.
        half: half-blocks before the first site.
        images: so many images, spread evenly over the data set; None: all.
        device: where to compute; the tokens are kept on the CPU.
        dense: whether the tokens that leave the last block are wanted as well (K = 2, else 1).
        memory: GiB for the tokens.

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
        dense: bool = False,
        memory: float = MEMORY,
    ) -> None:
        size = len(dataset) if images is None else min(images, len(dataset))
        if size < 1:
            raise ValueError("dataset: expected at least one image, got an empty dataset")
        self.backbone, self.dataset, self.device = backbone, dataset, torch.device(device)
        self.rows = [index * len(dataset) // size for index in range(size)]
        self.halves = (half, 2 * backbone.depth) if dense else (half,)
        values = len(self.halves) * (backbone.num_prefix + backbone.num_patches) * backbone.embed_dim
        self.room = int(memory * 2**30 // (4 * values))  # images, in single precision
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        tokens, labels = self.batch([index])
        return tokens[0], int(labels[0])

    def batch(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """Tokens `[B, K, P + N, D]` and labels `[B]` int64."""
        wanted = [int(index) for index in indices]
        new = sorted({index for index in wanted if index not in self.kept})
        found = self._prepared(new) if new else {}
        self.kept |= {index: item for index, item in found.items() if index < self.room}
        tokens, labels = zip(*(found.get(index) or self.kept[index] for index in wanted), strict=True)
        return torch.stack(tokens), torch.stack(labels)

    def state(self, inputs: Tensor) -> MaskedState:
        """The tokens of a batch as a state that `run_masked` continues from."""
        return MaskedState(inputs[:, 0], self.backbone.num_prefix, self.halves[0])

    def dense(self, inputs: Tensor, state: MaskedState) -> MaskedState:
        """The tokens of a batch, here with `state`, after the last block of the dense network."""
        return replace(state, x=inputs[:, 1], half=self.halves[1])

    @torch.no_grad()
    def _prepared(self, indices: Sequence[int]) -> dict[int, tuple[Tensor, Tensor]]:
        """Tokens `[K, P + N, D]` and label of some images, in rising order; those that will be kept are run alone."""
        images, labels = fetch(self.dataset, [self.rows[index] for index in indices])
        alone = sum(index < self.room for index in indices)
        with frozen(self.backbone):
            parts = [self._run(part) for part in (*images[:alone, None], images[alone:]) if len(part)]
        return dict(zip(indices, zip(torch.cat(parts), labels, strict=True), strict=True))

    def _run(self, images: Tensor) -> Tensor:
        """Tokens `[B, K, P + N, D]` of images, on the CPU."""
        state, found = start_masked(self.backbone, images.to(self.device)), []
        for half in self.halves:
            state, _ = run_masked(self.backbone, state, half)
            found.append(state.x.cpu())
        return torch.stack(found, dim=1)


class ImageInputs:
    """The same without memory, for data sets that are augmented: each batch of images is run when drawn.

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

    @torch.no_grad()
    def dense(self, inputs: Tensor, state: MaskedState) -> MaskedState:
        """The tokens of a batch, here with `state`, after the last block of the dense network."""
        return run_masked(self.backbone, state, 2 * self.backbone.depth)[0]


Inputs = PreparedTokens | ImageInputs


def inputs_of(backbone: Backbone, dataset: ImageDataset, half: int, images: int, dense: bool = False) -> Inputs:
    """So many images, prepared up to a half-block and kept; 0: all images, each run when drawn."""
    if not images:
        return ImageInputs(backbone, dataset, half)
    return PreparedTokens(backbone, dataset, half, images, device_of(backbone), dense)


def device_of(backbone: Backbone) -> torch.device:
    """The device of a network."""
    return backbone.position.device
