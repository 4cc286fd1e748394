"""Train over several processes in many ways, and write down how each run ended.

Run as a script, which loads torch once; the processes of a run are forks of it, connected by gloo.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from games import NAME, OwnLabels
from helpers import toy
from kills import CONFIG, forked
from runs import but
from vitprune_env import PaperReward
from vitprune_env.agents import MAPPO, BudgetRange, FinetuneConfig, PPOSingleConfig, Preset, train
from vitprune_env.agents.shared.processes import Processes, launched
from vitprune_env.files import save_state

SEVERAL = but(CONFIG, updates=5, images=7, epochs=2, minibatch=100, cache_images=0, checkpoint_every=2)
SINGLE = PPOSingleConfig(epochs=2, minibatch=100, value_norm=True, networks=SEVERAL.learner.networks)
TURNS = FinetuneConfig(
    when="alternate",
    every=1,
    steps=2,
    batch_size=7,
    distill=0.5,
    lr=2e-5,  # AdamW makes steps of the size of the rate out of rounding errors
    cache_images=0,
)
RUNS: dict[str, tuple[Preset, tuple[int, ...]]] = {  # settings, numbers of processes
    "uneven": (SEVERAL, (1, 2, 3)),  # 7 images: 3 + 4, 2 + 2 + 3
    "cached": (but(SEVERAL, cache_images=15, minibatch=None, images=8), (1, 2)),
    # Some processes have no row of a minibatch.
    "tiny_minibatches": (but(SEVERAL, minibatch=2, images=2, updates=1, epochs=1, sites=("1",)), (1, 2)),
    "ppo_single": (but(SEVERAL, learner=SINGLE), (1, 2)),
    "alternate": (but(SEVERAL, updates=2, finetune=TURNS), (1, 2)),
    "adaptive": (but(SEVERAL, updates=2, budget=BudgetRange(0.4, 0.8, anneal_from=0.7)), (1, 2)),
    "paper": (
        but(SEVERAL, reward=PaperReward(outcome_bonus=1.0), normalize_advantages=False, value_norm=False),
        (1, 2),
    ),
}
FAULTS = "faults"
EVERYDAY = ("uneven", FAULTS)  # the others take their time
Work = Callable[[Processes], object]


def together(size: int, work: Work) -> list[int]:
    """Let some processes work together; their exit codes, negative for a signal."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [forked(lambda rank=rank: _take_part(rank, size, port, work)) for rank in range(size)]
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def _take_part(rank: int, size: int, port: int, work: Work) -> None:
    said = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in said.items()})
    try:
        with launched() as (processes, device):
            assert (processes.rank, processes.size, device) == (rank, size, "cpu")
            work(processes)
    except SystemExit as stop:
        sys.stderr.write(f"rank {rank}: {stop}\n")
        os._exit(int(stop.code or 0))


def training(data: OwnLabels, config: Preset, folder: Path, resume: bool = False) -> Work:
    """Train, and write down what this process came to."""

    def work(processes: Processes) -> None:
        own = data if processes.is_main else OwnLabels(24)  # every process reads the images itself
        result = train(
            toy(NAME), own, **config.arguments, output=folder, progress=False, resume=resume, processes=processes
        )
        modules = {"actor": result.policy.actor.state_dict(), "critic": result.critic.state_dict()}
        modules["backbone"] = result.backbone.state_dict()
        state: dict[str, Any] = {**modules, "history": result.history, "threshold": result.policy.threshold}
        save_state(state, folder.parent / f"{folder.name}.rank{processes.rank}.safetensors")

    return work


def in_rank(rank: int, update: int, action: Callable[[], object], work: Work) -> Work:
    """The same work, with something happening in one process before an update."""

    def changed(processes: Processes) -> None:
        original, calls = MAPPO.update, []

        def patched(self: MAPPO, *args: Any, **options: Any) -> Any:
            calls.append(1)
            if processes.rank == rank and len(calls) == update:
                action()
            return original(self, *args, **options)

        MAPPO.update = patched
        work(processes)

    return changed


def fail() -> None:
    """Something unforeseen."""
    raise ZeroDivisionError("a fault of one process")


def gathering(processes: Processes) -> None:
    """Collectives on their own."""
    rank = processes.rank
    rows = torch.arange(6.0).view(6, 1)[: 2 * rank]  # process 0 has none
    assert processes.gather(rows)[:, 0].tolist() == [0, 1, 0, 1, 2, 3]
    assert processes.gather(torch.tensor([rank > 0])).tolist() == [False, True, True]
    assert processes.gather(torch.tensor([[rank, 7]])).tolist() == [[0, 7], [1, 7], [2, 7]]
    assert processes.span(2 * rank) == ((0, 0, 2)[rank], 6)
    assert processes.largest(10 - rank) == 10
    assert processes.sum(torch.tensor([1.0, rank])).tolist() == [3, 3]
    layer = torch.nn.Linear(2, 1)
    with torch.no_grad():
        layer.weight.fill_(rank)
    processes.same(layer)
    assert layer.weight.tolist() == [[0, 0]]
    if rank:  # process 0 has no gradient at all
        (layer(torch.tensor([1.0, rank])) * rank).sum().backward()
    processes.sum_gradients(layer.parameters())
    assert layer.weight.grad is not None
    assert layer.weight.grad.tolist() == [[3, 5]]
    assert layer.bias.grad is not None
    assert layer.bias.grad.tolist() == [3]


def main() -> None:
    """What the command line names; exit codes and times go to standard output."""
    root, names = Path(sys.argv[1]), sys.argv[2:]
    data = OwnLabels(24)
    codes: dict[str, list[int]] = {}
    for name in names:
        config, sizes = RUNS.get(name, (SEVERAL, ()))
        for size in sizes:
            codes[f"{name}{size}"] = together(size, training(data, config, root / f"{name}{size}"))
    seconds = what_goes_wrong(root, data, codes) if FAULTS in names else 0.0
    sys.stdout.write(json.dumps({"codes": codes, "seconds": seconds}))


def what_goes_wrong(root: Path, data: OwnLabels, codes: dict[str, list[int]]) -> float:
    """Errors and signals in one of the processes, and a run taken up again; seconds until an error ended all."""
    codes["gathering"] = together(3, gathering)
    folder, start = root / "failed", time.perf_counter()
    codes["failed"] = together(2, in_rank(1, 4, fail, training(data, SEVERAL, folder)))
    seconds = time.perf_counter() - start
    codes["resumed"] = together(3, training(data, SEVERAL, folder, resume=True))
    terminate = in_rank(1, 2, lambda: signal.raise_signal(signal.SIGTERM), training(data, SEVERAL, root / "stopped"))
    codes["stopped"] = together(2, terminate)
    return seconds


if __name__ == "__main__":
    main()
