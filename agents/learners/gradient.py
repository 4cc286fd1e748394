"""Gradients of many agent-steps in little memory: summed over chunks whose activations fit the cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from tianshou.algorithm import Algorithm
from torch import Tensor, nn

from ..shared.processes import Processes

CHUNK_BYTES = {"cpu": 32 * 2**20, "cuda": 2**30}  # of activations kept for the backward pass
LEAST_ROWS = 256  # below, matrix products become inefficient


def chunk_rows(widths: Sequence[int], device_type: str) -> int:
    """How many agent-steps to backpropagate at once by default.

    As many as have 32 MiB of activations on a CPU: 1872 rows with the widths of RL4EViT on DeiT-S. Fewer than 1024 rows
    made its matrix products slower; more cost memory and gained no time. Elsewhere 1 GiB, because memory alone is the
    limit of a GPU; not measured.

    Args:
        widths: of all that is kept for the backward pass of one agent-step, in numbers.
        device_type: such as `cpu`.
    """
    limit = CHUNK_BYTES.get(device_type, CHUNK_BYTES["cuda"])
    return max(LEAST_ROWS, limit // (4 * sum(widths)))


class Shared:
    """Tensors that all chunks of a minibatch use, computed once; their gradients are backpropagated once at the end.

    Args:
        tensors: results of differentiable computations.

    Attributes:
        leaves: stand-ins for the tensors, for the chunks to compute with.
    """

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors = tensors
        self.leaves = [tensor.detach().requires_grad_() for tensor in tensors]

    def backward(self) -> None:
        """Backpropagate the gradients that have accumulated in `leaves` through the original tensors."""
        torch.autograd.backward(self.tensors, [leaf.grad for leaf in self.leaves])


class GradientStep(Algorithm.Optimizer):
    """tianshou's optimiser for gradients that are accumulated over several backward passes."""

    def step_along(self, accumulate: Callable[[], Tensor], processes: Processes) -> tuple[Tensor, Tensor]:
        """One optimiser step.

        Args:
            accumulate: adds the gradient to the parameters, which have none before; returns numbers to report.
            processes: their gradients are summed.

        Returns:
            The numbers that `accumulate` returned, and the norm of the gradient before clipping.
        """
        self._optim.zero_grad()
        report = accumulate()
        processes.sum_gradients(self._module.parameters())
        parameters = [parameter for parameter in self._module.parameters() if parameter.grad is not None]
        norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        if self._max_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, self._max_grad_norm, norm)
        self._optim.step()
        return report, norm
