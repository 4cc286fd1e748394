"""What the training loop needs of a method: parameters, a loss, validation, and a state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

Row = dict[str, float]


class FitTask(Protocol):
    """What is trained; `ModuleTask` has defaults for everything except the loss."""

    def parameters(self) -> Iterable[nn.Parameter] | list[dict[str, Any]]:
        """What to train, or parameter groups; the `lr` of a group replaces that of the settings."""
        ...

    def loss(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Row]:
        """Loss (scalar) of a batch and metrics to log; all randomness comes from `generator` (CPU)."""
        ...

    def after_step(self) -> None:
        """Called after every step of the optimiser, for example to clamp parameters."""
        ...

    def validate(self, batches: Sequence[tuple[Tensor, Tensor]]) -> Row:
        """Metrics on held-out batches, among them `"loss"`, which early stopping minimises."""
        ...

    def state_dict(self) -> Mapping[str, Any]:
        """Everything that training changes except the optimiser's state: dicts, lists, tensors and JSON values."""
        ...

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> object:
        """Restore what `state_dict` returned."""
        ...


class ModuleTask:
    """A task whose state is the parameters and buffers of one module.

    Args:
        module: what to train.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def parameters(self) -> Iterable[nn.Parameter] | list[dict[str, Any]]:
        """All parameters that require gradients."""
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]

    def loss(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Row]:
        """Loss of a batch and metrics to log."""
        raise TypeError(f"{type(self).__name__} does not define a loss")

    def after_step(self) -> None:
        """Do nothing."""

    @torch.no_grad()
    def validate(self, batches: Sequence[tuple[Tensor, Tensor]]) -> Row:
        """Mean training loss, with the same random numbers in every validation."""
        generator = torch.Generator().manual_seed(0)
        total = sum(float(self.loss(images, labels, generator)[0]) * len(labels) for images, labels in batches)
        return {"loss": total / sum(len(labels) for _, labels in batches)}

    def state_dict(self) -> Mapping[str, Any]:
        """That of the module."""
        return self.module.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> object:
        """That of the module."""
        return self.module.load_state_dict(state_dict)


@contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """Put modules into evaluation mode without gradients, and restore both at the end."""
    modes = [(part, part.training) for module in modules for part in module.modules()]
    wanted = [(parameter, parameter.requires_grad) for module in modules for parameter in module.parameters()]
    try:
        for module in modules:
            module.eval().requires_grad_(False)
        yield
    finally:
        for part, training in modes:
            part.training = training
        for parameter, requires_grad in wanted:
            parameter.requires_grad_(requires_grad)
