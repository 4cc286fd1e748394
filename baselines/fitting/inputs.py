"""What fits of token policies share: inputs up to the first site, how the policy does when deployed, its budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...data import ImageDataset, batches_of, fetch
from ...engine.backbone import Backbone
from ...engine.masked import MaskedState, run_masked, start_masked
from ...engine.tokens import start_state
from ...game.rollout import play
from ...game.token_game import TokenGame
from ...policy import Policy
from ...types import Site
from ..calibration import P, calibrate
from .task import Row, frozen

CHUNK = 256  # images that are prepared together


class PreparedTokens:
    """A data set whose inputs are the tokens after the first half-blocks, `[P + N, D]` instead of `[C, H, W]`.

    What lies before the first site no fit changes (unless it trains the backbone): computed once and kept in memory.

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
        """A batch's tokens as what `run_masked` goes on from."""
        return MaskedState(inputs, self.num_prefix, self.half)


class ImageInputs:
    """The same for data sets that are too large or too varied to keep: images, run up to the half-block when needed.

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
        """A batch's tokens as what `run_masked` goes on from."""
        return run_masked(self.backbone, start_masked(self.backbone, inputs), self.half)[0]


Inputs = PreparedTokens | ImageInputs


def inputs_of(backbone: Backbone, dataset: ImageDataset, half: int, cached: int) -> Inputs:
    """The first `cached` images prepared up to a half-block; 0: all images, prepared anew whenever they are drawn."""
    if not cached:
        return ImageInputs(backbone, dataset, half)
    return PreparedTokens(backbone, dataset, half, cached, device_of(backbone))


def device_of(backbone: Backbone) -> torch.device:
    """Where a backbone is."""
    return backbone.position.device


@torch.no_grad()
def deployed(game: TokenGame, policy: Policy, inputs: Inputs, batches: Sequence[tuple[Tensor, Tensor]]) -> Row:
    """Mean cross-entropy and accuracy of the policy as it will be used, pruned tokens really gone."""
    loss = correct = images = 0.0
    for batch, labels in batches:
        state = inputs.state(batch)
        outcome = play(game, policy, start_state(state.x, state.num_prefix, state.half), labels).outcome
        loss += float(F.cross_entropy(outcome.logits, labels, reduction="sum"))
        correct += float((outcome.logits.argmax(dim=1) == labels).sum())
        images += len(labels)
    return {"loss": loss / images, "accuracy": correct / images}


def at_budget(
    make: Callable[[float], P], target_gmacs: float, backbone: Backbone, dataset: ImageDataset, sites: Sequence[Site]
) -> P:
    """The policy at the keep rate that costs `target_gmacs`, for methods whose costs are the same for all images.

    Raises:
        BudgetError: if no keep rate meets the budget.
    """
    return calibrate(make, target_gmacs, backbone, batches_of(dataset, 1, device_of(backbone), images=1), sites=sites)
