"""What a baseline brings to be fitted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

Row = dict[str, float]


class FitTask(Protocol):
    """What there is to train; `ModuleTask` has defaults for everything but the loss."""

    def parameters(self) -> Iterable[nn.Parameter] | list[dict[str, Any]]:
        """What to train, or parameter groups; a group's `lr` stands in place of the configuration's."""
        ...

    def loss(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Row]:
        """Loss (scalar) of a batch, and what to show beside it; the only source of randomness is `generator` (CPU)."""
        ...

    def after_step(self) -> None:
        """The optimiser has stepped: clamp parameters, for example."""
        ...

    def validate(self, batches: Sequence[tuple[Tensor, Tensor]]) -> Row:
        """Metrics on held-out batches, among them `"loss"`, which early stopping wants small."""
        ...

    def state_dict(self) -> Mapping[str, Any]:
        """Everything that training changes beside the optimiser's state: dicts, lists, tensors and JSON values."""
        ...

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> object:
        """Undo `state_dict`."""
        ...


class ModuleTask:
    """A task whose whole state is one module's parameters and buffers.

    Args:
        module: what to train.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def parameters(self) -> Iterable[nn.Parameter] | list[dict[str, Any]]:
        """All parameters that ask for gradients."""
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]

    def loss(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Row]:
        """Loss of a batch, and what to show beside it."""
        raise TypeError(f"{type(self).__name__} does not say what its loss is")

    def after_step(self) -> None:
        """Nothing to do."""

    @torch.no_grad()
    def validate(self, batches: Sequence[tuple[Tensor, Tensor]]) -> Row:
        """Mean training loss, its randomness the same each time."""
        generator = torch.Generator().manual_seed(0)
        total = sum(float(self.loss(images, labels, generator)[0]) * len(labels) for images, labels in batches)
        return {"loss": total / sum(len(labels) for _, labels in batches)}

    def state_dict(self) -> Mapping[str, Any]:
        """The module's."""
        return self.module.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> object:
        """The module's."""
        return self.module.load_state_dict(state_dict)


@contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """Modules in evaluation mode and without gradients of their own, for as long as this lasts."""
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
