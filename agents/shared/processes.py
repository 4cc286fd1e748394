"""Data-parallel training: every process plays its share of an update's images, and all take the same gradient step.

What an update needs from all images (advantages and returns to normalise, accuracy and MACs for the price) is gathered,
one number per agent-step or image; gradients are summed. Every process therefore computes the same numbers as one
process that plays all images, and holds the same state. Process 0 writes the files.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...errors import VitPruneError

CPU = torch.device("cpu")
TIMEOUT = timedelta(minutes=30)  # of a collective; process 0 alone opens and checks the output folder meanwhile


class ProcessError(VitPruneError):
    """Another process of a data-parallel run has ended; its own message gives the reason."""


@dataclass(frozen=True)
class Processes:
    """The processes that train together, and the rank of this one; by default there is only one.

    Every method but `share` is a collective: all processes call it, in the same sequence.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = CPU  # where collectives take place

    @property
    def is_main(self) -> bool:
        """Whether this process logs and writes."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """Which of `count` rows are this process's: consecutive ones, as evenly as possible."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def gather(self, rows: Tensor) -> Tensor:
        """The rows `[n, ...]` of all processes, process by process; n may differ, and be 0."""
        if self.size == 1:
            return rows
        counts = self._gather_counts(len(rows))
        bits = rows.view(torch.uint8) if rows.dtype == torch.bool else rows
        padded = bits.new_zeros(max(counts), *bits.shape[1:], device=self.device)
        padded[: len(bits)] = bits
        parts = [torch.empty_like(padded) for _ in counts]
        with _peers():
            dist.all_gather(parts, padded)
        everything = torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
        return everything.view(rows.dtype).to(rows.device)

    def span(self, count: int) -> tuple[int, int]:
        """Where this process's `count` rows begin among the gathered ones, and how many those are."""
        if self.size == 1:
            return 0, count
        counts = self._gather_counts(count)
        return sum(counts[: self.rank]), sum(counts)

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by its sum over the processes; one that is missing counts as zero."""
        if self.size == 1:
            return
        wanted = [parameter for parameter in parameters if parameter.requires_grad]
        for parameter in wanted:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        flat = self.sum(torch.cat([parameter.grad.flatten() for parameter in wanted if parameter.grad is not None]))
        for parameter, part in zip(wanted, flat.split([parameter.numel() for parameter in wanted]), strict=True):
            parameter.grad = part.view_as(parameter)

    def sum(self, values: Tensor) -> Tensor:
        """The sum of a tensor over the processes."""
        return self._reduce(values, dist.ReduceOp.SUM) if self.size > 1 else values

    def largest(self, number: int) -> int:
        """The largest of the processes' numbers."""
        return int(self._reduce(torch.tensor(number), dist.ReduceOp.MAX)) if self.size > 1 else number

    def same(self, module: nn.Module) -> None:
        """Give all processes the parameters and buffers of process 0's module."""
        if self.size > 1:
            for tensor in module.state_dict().values():
                if isinstance(tensor, Tensor):
                    here = tensor.detach().to(self.device)
                    with _peers():
                        dist.broadcast(here, src=0)
                    tensor.copy_(here)

    def _gather_counts(self, count: int) -> list[int]:
        counts = [torch.empty(1, dtype=torch.int64, device=self.device) for _ in range(self.size)]
        with _peers():
            dist.all_gather(counts, torch.tensor([count], device=self.device))
        return [int(each) for each in counts]

    def _reduce(self, values: Tensor, how: Any) -> Tensor:
        here = values.detach().to(self.device, copy=True)
        with _peers():
            dist.all_reduce(here, how)
        return here.to(values.device)


@contextmanager
def _peers() -> Iterator[None]:
    """Turn the errors of NCCL and gloo into one sentence: another process has ended."""
    try:
        yield
    except RuntimeError as error:
        raise ProcessError("processes: another one of this run has ended; its own message says why") from error


@contextmanager
def launched(device: str = "cpu") -> Iterator[tuple[Processes, str]]:
    """The processes that torchrun or `accelerate launch` started; outside of them just this one.

    The launcher sets the environment variables RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. gloo connects
    processes on CPUs, NCCL those on GPUs.

    Args:
        device: where to train; `cuda` means a GPU of its own for every process of a machine.

    Yields:
        The processes, and the device of this one.

    Raises:
        ValueError: for more processes on a machine than it has GPUs.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Processes(), device
        return
    own = _own_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    backend = "nccl" if own.type == "cuda" else "gloo"
    dist.init_process_group(backend, rank=int(os.environ["RANK"]), world_size=size, timeout=TIMEOUT)
    yield Processes(dist.get_rank(), size, own), str(own)
    # After success only: a process that failed must end at once. It would wait here for processes that wait for it.
    dist.destroy_process_group()


def _own_device(device: str, local_rank: int) -> torch.device:
    """The GPU of a process; a device with a number in it cannot be shared."""
    asked = torch.device(device)
    if asked.type != "cuda":
        return asked
    if asked.index is not None:
        raise ValueError(f"device: expected 'cuda' with several processes, each takes a GPU of its own; got {device!r}")
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"device: expected a GPU for each process of this machine, got {torch.cuda.device_count()} GPUs and "
            f"process {local_rank}"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
