"""What the examples share: flags, the comparison at equal GMACs, timing, tables, summary files."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import tyro
from torch import Tensor

from vitprune_env import Backbone, Policy, TokenGame, play
from vitprune_env.baselines import calibrate
from vitprune_env.data import batches_of as batches_of  # the examples take it from here
from vitprune_env.errors import StorageError, VitPruneError
from vitprune_env.game.rollout import Evaluation, evaluate
from vitprune_env.types import Site

Batches = Iterable[tuple[Tensor, Tensor]]  # iterated more than once


@dataclass(frozen=True)
class CommonArgs:
    """Flags that every example has."""

    seed: int = 0
    """Seed of everything random: data, initial weights, exploration."""
    device: str = "cpu"
    """Where to run: cpu, cuda, cuda:1, ..."""
    threads: int | None = None
    """CPU threads; None: one for the built-in model, which is too small for more, and torch's choice for others."""
    output: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("runs/latest")
    """Folder for results; made if it does not exist."""
    resume: bool = False
    """Go on from what lies in the output folder; on an empty folder this starts fresh."""
    quick: bool = False
    """A small run that shows that everything works; its numbers mean nothing."""

    def prepare(self, built_in: bool = True) -> None:
        """Make the output folder and set the number of threads, for the built-in model or another.

        Raises:
            StorageError: if the folder cannot be made.
        """
        try:
            self.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"output: expected a folder, got {self.output} ({error.strerror})") from error
        threads = 1 if self.threads is None and built_in else self.threads
        if threads is not None:
            torch.set_num_threads(threads)


@dataclass(frozen=True)
class Row:
    """One line of a comparison."""

    name: str
    accuracy: float  # 0 to 1
    stderr: float  # of the accuracy
    gmacs: float  # mean per image, policy included
    policy_gmacs: float  # the policy's and its evidence's part
    keep_per_site: tuple[float, ...]
    speedup: float | None = None  # throughput over the dense model's, measured
    top5: float | None = None  # accuracy of the five best classes, 0 to 1

    @classmethod
    def of(cls, name: str, result: Evaluation, speedup: float | None = None) -> Row:
        """The row of one evaluated policy."""
        return cls(name, result.accuracy, result.stderr, result.gmacs, result.policy_macs / 1e9,
                   result.keep_per_site, speedup, result.top5)  # fmt: skip

    @classmethod
    def mean(cls, name: str, rows: Sequence[Row]) -> Row:
        """The average of several rows, with the spread of their accuracies as the error."""
        accuracies = [row.accuracy for row in rows]
        spread = statistics.stdev(accuracies) / len(rows) ** 0.5 if len(rows) > 1 else rows[0].stderr
        sites = zip(*(row.keep_per_site for row in rows), strict=True)
        return cls(
            name,
            statistics.mean(accuracies),
            spread,
            statistics.mean(row.gmacs for row in rows),
            statistics.mean(row.policy_gmacs for row in rows),
            tuple(statistics.mean(site) for site in sites),
        )


def table(rows: Sequence[Row], dense_gmacs: float) -> str:
    """The comparison as a markdown table."""
    lines = [
        "| policy | accuracy % | GMACs | of dense % | without policy % | kept per site % | speed-up |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        kept = " / ".join(f"{100 * rate:.0f}" for rate in row.keep_per_site)
        speedup = "" if row.speedup is None else f"{row.speedup:.2f}x"
        net = 100 * (row.gmacs - row.policy_gmacs) / dense_gmacs
        lines.append(
            f"| {row.name} | {100 * row.accuracy:.1f} ± {100 * row.stderr:.1f} | {row.gmacs:.5f} "
            f"| {100 * row.gmacs / dense_gmacs:.1f} | {net:.1f} | {kept} | {speedup} |"
        )
    return "\n".join(lines)


def at_budget(
    name: str,
    make: Callable[[float], Policy],
    target_gmacs: float,
    backbone: Backbone,
    tune: Sequence[tuple[Tensor, Tensor]],
    test: Batches,
) -> tuple[Row, Policy]:
    """Calibrate a baseline to a budget on `tune` and evaluate it on `test`, at the backbone's own sites."""
    sites = backbone.default_sites
    policy = calibrate(make, target_gmacs, backbone, tune, sites=sites)
    game = TokenGame.for_policy(backbone, policy, sites=sites)
    return Row.of(name, evaluate(game, policy, test)), policy


@torch.inference_mode()
def measure_speedup(
    backbone: Backbone, policy: Policy, images: Tensor, pairs: int, sites: Sequence[int | str | Site] | None = None
) -> float:
    """How many times faster the pruned model is than the plain timm model, on the same images.

    Both run in turn in one process; the answer is the median over the pairs. The policy acts at `sites`; None: where it
    wants to.
    """
    where = {} if sites is None else {"sites": sites}
    game = TokenGame.for_policy(backbone, policy, check=False, **where)
    times = race(lambda: backbone(images), lambda: play(game, policy, images), images.device, pairs)
    return statistics.median(dense / pruned for dense, pruned in times)


def race(
    first: Callable[[], object], second: Callable[[], object], device: torch.device, pairs: int
) -> list[tuple[float, float]]:
    """Seconds of two functions that run in turn, after two pairs to warm up."""

    def seconds(run: Callable[[], object]) -> float:
        _synchronise(device)
        start = time.perf_counter()
        run()
        _synchronise(device)
        return time.perf_counter() - start

    times = [(seconds(first), seconds(second)) for _ in range(2 + pairs)]
    return times[2:]


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def run(main: Callable[[], None]) -> None:
    """Run a script; what was asked for wrongly is said in one line, without a traceback."""
    try:
        main()
    except (VitPruneError, ConnectionError) as error:
        sys.exit(f"error: {error}")


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    packages = ("vitprune_env", "torch", "timm", "tianshou", "pettingzoo", "gymnasium", "numpy")
    found = {name: importlib.metadata.version(name) for name in packages}
    return {"python": platform.python_version(), **found}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file so that readers never see half of it."""
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps(content, indent=2, default=_plain) + "\n")
    os.replace(scratch, path)


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return asdict(cast(Any, value))
