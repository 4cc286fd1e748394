"""A linear head for new classes on a network that stays as it is: features once, then logistic regression on them."""

from __future__ import annotations

from collections.abc import Callable, Sized
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from tqdm import tqdm

from ...data import fetch
from ...engine.backbone import Backbone
from ...errors import NumericalError, UnsupportedBackboneError
from ..shared.training_images import BatchedDataset

ITERATIONS = 200  # of L-BFGS, which converges in fewer


def fit_head(
    backbone: Backbone,
    dataset: BatchedDataset | Dataset[Any],
    decay: float,
    batch_size: int = 64,
    device: str | torch.device = "cpu",
    progress: bool = True,
    context: Callable[[], Any] | None = None,
) -> float:
    """Fit the linear head of a network, in place; nothing else changes.

    For the fit, features are centred and divided by their mean standard deviation; the head absorbs both. The loss is
    cross-entropy plus `decay` times the sum of the squared weights of these features, minimised by L-BFGS.

    Args:
        backbone: the network.
        dataset: training images with labels; all of them are run through the network once.
        decay: weight of the squared weights.
        batch_size: images that are run at once.
        device: where the network runs.
        progress: whether to show a progress bar.
        context: opens the context in which the network runs, such as autocast; None: none.

    Returns:
        The share of the images that the head classifies correctly, 0 to 1.

    Raises:
        UnsupportedBackboneError: for a head that is not one linear layer.
        NumericalError: for features that are not finite.
    """
    head = linear_head(backbone)
    features, labels = _features(backbone.to(device).eval(), dataset, batch_size, device, progress, context)
    if not torch.isfinite(features).all():
        raise NumericalError("linear head: features of the network are not finite; check its weights, or use amp='off'")
    mean = features.mean(dim=0)
    scale = (features - mean).square().mean().sqrt().clamp(min=1e-6)
    weight, bias = _regress((features - mean) / scale, labels, head.out_features, decay)
    with torch.no_grad():
        head.weight.copy_(weight / scale)
        head.bias.copy_(bias - head.weight @ mean)
        return float((head(features).argmax(dim=1) == labels).double().mean())


def linear_head(backbone: Backbone) -> nn.Linear:
    """The layer that gives the logits.

    Raises:
        UnsupportedBackboneError: if it is not one linear layer with a bias.
    """
    head = cast(Any, backbone.model).get_classifier()
    if not isinstance(head, nn.Linear) or head.bias is None:
        raise UnsupportedBackboneError(f"model: expected one linear layer as its head, got {type(head).__name__}")
    return head


@torch.no_grad()
def _features(
    backbone: Backbone,
    dataset: BatchedDataset | Dataset[Any],
    batch_size: int,
    device: str | torch.device,
    progress: bool,
    context: Callable[[], Any] | None,
) -> tuple[Tensor, Tensor]:
    """What the head gets from every image, `[images, D]`, and the labels `[images]`."""
    size, model = len(cast(Sized, dataset)), cast(Any, backbone.model)
    features, labels = [], []
    with tqdm(total=size, disable=not progress, desc="linear head", unit="image") as bar:
        for start in range(0, size, batch_size):
            images, targets = fetch(cast(Any, dataset), range(start, min(start + batch_size, size)))
            with torch.autocast(torch.device(device).type, enabled=False) if context is None else context():
                found = model.forward_head(model.forward_features(images.to(device)), pre_logits=True)
            features.append(found.float())
            labels.append(targets.to(device))
            bar.update(len(targets))
    return torch.cat(features), torch.cat(labels)


def _regress(features: Tensor, labels: Tensor, classes: int, decay: float) -> tuple[Tensor, Tensor]:
    """Weights `[classes, D]` and biases `[classes]` of regularised logistic regression."""
    weight = features.new_zeros(classes, features.shape[1], requires_grad=True)
    bias = features.new_zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(features, weight, bias), labels) + decay * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(cast(Any, closure))
    return weight.detach(), bias.detach()
