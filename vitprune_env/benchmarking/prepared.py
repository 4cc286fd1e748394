"""Images whose way through the network up to the first decision is computed once, for all policies."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from vitprune_env.benchmarking.images import Batches
from vitprune_env.engine.backbone import Backbone
from vitprune_env.engine.tokens import TokenState
from vitprune_env.engine.walk import Packed
from vitprune_env.game.token_game import TokenGame

STATES_IN_MEMORY = 1 << 30  # bytes of tokens that are kept rather than computed again

_log = logging.getLogger(__name__)


class PreparedImages:
    """Labelled images, and their tokens before the first site of a game.

    All policies whose first decisions fall in the same place share these tokens. They are computed in the same way
    whichever policy asks first, so that an interrupted comparison ends with the same numbers. Those asked for longest
    ago leave when memory is short.

    Args:
        backbone: the network.
        batches: images and labels, on the network's device.
        memory: bytes of tokens to keep.
    """

    def __init__(self, backbone: Backbone, batches: Batches, memory: int = STATES_IN_MEMORY) -> None:
        self.backbone, self.batches, self.memory = backbone, batches, memory
        self._states: dict[int, list[TokenState]] = {}  # by half-blocks that have run

    @property
    def groups(self) -> Tensor | None:
        """The group of each image; None: each image is its own."""
        return getattr(self.batches, "groups", None)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.batches)

    def __len__(self) -> int:
        """Number of images."""
        return sum(len(labels) for _, labels in self.batches)

    def inputs(self, game: TokenGame) -> Iterator[tuple[Tensor | TokenState, Tensor]]:
        """What `play` takes, batch by batch: tokens before the first site of the game, and labels."""
        half = game.prepared_halves
        if half == 0:  # nothing but the embedding comes before the first site
            yield from self.batches
        elif half in self._states:
            states = self._states[half] = self._states.pop(half)  # asked for last
            for state, (_, labels) in zip(states, self.batches, strict=True):
                yield state, labels
        else:
            yield from self._prepared(half)

    @torch.inference_mode()
    def _states_of(self, images: Tensor, half: int) -> TokenState:
        self.backbone.check_images(images)
        return Packed(self.backbone).run(self.backbone.embed(images), half)[0]

    def _prepared(self, half: int) -> Iterator[tuple[TokenState, Tensor]]:
        """Compute the tokens, and keep them if they fit."""
        kept: list[TokenState] | None = []
        used = 0
        for images, labels in self.batches:
            state = self._states_of(images, half)
            used += state.x.nbytes
            if kept is not None and used > self.memory:
                _log.warning("tokens before the first site do not fit in memory: every policy computes them again")
                kept = None
            if kept is not None:
                kept.append(state)
            yield state, labels
        if kept is not None:
            while self._states and used + self._size() > self.memory:
                self._states.pop(next(iter(self._states)))
            self._states[half] = kept

    def _size(self) -> int:
        return sum(state.x.nbytes for states in self._states.values() for state in states)

    def spread(self, count: int) -> PreparedImages:
        """At most `count` of the images, evenly spread, as one batch."""
        rows = set(spread_rows(len(self), count))
        images, labels, start = [], [], 0
        for batch, targets in self.batches:
            chosen = [row - start for row in range(start, start + len(targets)) if row in rows]
            images.append(batch[chosen])
            labels.append(targets[chosen])
            start += len(targets)
        return PreparedImages(self.backbone, [(torch.cat(images), torch.cat(labels))], self.memory)


def spread_rows(total: int, count: int) -> Sequence[int]:
    """At most `count` of the numbers below `total`, evenly spread."""
    count = min(count, total)
    return [index * total // count for index in range(count)]
