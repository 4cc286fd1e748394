"""Where training images come from: a dataset, and a cache of the tokens in front of the first site."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from hashlib import sha256
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ...data import fetch
from ...engine.evidence import from_pixels
from ...engine.tokens import TokenState, start_state
from ...game.token_game import TokenGame
from .processes import Processes

CHUNK = 256


@runtime_checkable
class BatchedDataset(Protocol):
    """A dataset that makes many samples at once, such as `vitprune_env.data.Digits`."""

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """Images `[B, C, H, W]` and labels `[B]` int64."""
        ...


class TrainingImages:
    """Draws batches of images, or of states prepared up to the first site.

    Decisions do not change what happens before the first site. Those tokens can therefore be computed once and kept
    (`[cached, P + N, D]`); then only the chosen images are ever played.

    Args:
        dataset: has `batch(indices)` and a length, or is a map-style torch dataset.
        game: prepares images.
        cached: how many images to keep prepared; 0: none, all images of the dataset are played.
        generator: a CPU generator, chooses images.
        device: where to prepare and play them.
        processes: the processes that share the work: each prepares its part of the cache and draws its part of a batch.

    Raises:
        TypeError: for a dataset without a length.
        ValueError: for an empty dataset.
    """

    def __init__(
        self,
        dataset: BatchedDataset | Dataset[Any],
        game: TokenGame,
        cached: int,
        generator: torch.Generator,
        device: torch.device | str = "cpu",
        processes: Processes | None = None,
    ) -> None:
        self.processes = Processes() if processes is None else processes
        self.dataset = dataset
        self.game = game
        self.device = torch.device(device)
        self.generator = generator
        if not isinstance(dataset, Sized):
            raise TypeError(f"dataset: expected labelled images with a length, got {dataset!r}")
        size = len(dataset)
        if not size:
            raise ValueError("dataset: expected at least one image, got an empty dataset")
        order = torch.randperm(size, generator=generator)
        self.chosen = order[:cached] if cached else order
        if len(self.chosen) < self.processes.size:
            raise ValueError(
                f"cache_images: expected 0 or one image for each of {self.processes.size} processes, "
                f"got {len(self.chosen)} of {size}"
            )
        self._half = 0
        self.states, self.labels = self._prepared() if cached else (None, None)
        self._queue = torch.empty(0, dtype=torch.int64)

    def draw(self, count: int, times: int = 1) -> tuple[Tensor | TokenState, Tensor]:
        """This process's share of `count` images: `count / times` new ones, each `times` in a row.

        Every image comes once before any comes again.
        """
        images = count // times
        while len(self._queue) < images:
            order = torch.randperm(len(self.chosen), generator=self.generator)
            self._queue = torch.cat([self._queue, order])
        rows, self._queue = self._queue[:images], self._queue[images:]
        return self._take(rows.repeat_interleave(times)[self._share(count)])

    def first(self, count: int) -> list[tuple[Tensor | TokenState, Tensor]]:
        """Up to `count` images in batches, always the same ones."""
        rows = torch.arange(min(count, len(self.chosen)))
        return [self._take(chunk) for chunk in rows.split(CHUNK)]

    def raw(self, count: int) -> Tensor:
        """The first `count` images as they are, `[B, C, H, W]`."""
        return fetch(cast(Any, self.dataset), self.chosen[:count])[0].to(self.device)

    @property
    def size(self) -> int:
        """Images of the dataset."""
        return len(cast(Sized, self.dataset))

    @property
    def digest(self) -> str:
        """A short name for the first image that is drawn: of other data, or other views of it, it is another."""
        pixels = self.raw(1).cpu().contiguous().numpy()
        return sha256(pixels.tobytes()).hexdigest()[:16]

    def state(self) -> dict[str, Tensor]:
        """Which images come next, for a checkpoint."""
        return {"queue": self._queue}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Continue from the result of `state`."""
        self._queue = state["queue"]

    def _share(self, count: int) -> slice:
        own = self.processes.share(count)
        return slice(own.start, own.stop)

    def _take(self, rows: Tensor) -> tuple[Tensor | TokenState, Tensor]:
        if self.states is not None and self.labels is not None:
            x, labels = self.states[rows].to(self.device), self.labels[rows].to(self.device)
            images = self._images(rows)[0] if from_pixels(self.game.needs) else None
            return start_state(x, self.game.backbone.num_prefix, self._half, images), labels
        return self._images(rows)

    def _images(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        images, labels = fetch(cast(Any, self.dataset), self.chosen[rows])
        return images.to(self.device), labels.to(self.device)

    def _prepared(self) -> tuple[Tensor, Tensor]:
        """Tokens before the first site and labels of the chosen images, on the CPU."""
        states, labels = [], []
        for rows in self.chosen[self._share(len(self.chosen))].split(CHUNK):
            images, targets = fetch(cast(Any, self.dataset), rows)
            state = self.game.prepare(images.to(self.device))
            self._half = state.half
            states.append(state.x.view(len(rows), -1, state.x.shape[1]).cpu())
            labels.append(targets)
        return self.processes.gather(torch.cat(states)), self.processes.gather(torch.cat(labels))
