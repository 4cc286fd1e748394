"""Compare policies at the same cost, in one call, and use the result: table, CSV, LaTeX, figures.

    python examples/benchmark.py
    python examples/benchmark.py --checkpoint runs/mappo    # with a policy of train_mappo.py
    python examples/benchmark.py --resume                   # goes on where it was interrupted

`vitprune benchmark` is the whole field as a command, on the built-in task or on image files.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vitprune_env import benchmark, load_backbone
from vitprune_env.baselines import TopK
from vitprune_env.benchmarking import Timing
from vitprune_env.cli import explained
from vitprune_env.cli.flags import TEST_SEED, TUNE_SEED, ResumableFlags, read_flags
from vitprune_env.data import Digits


@dataclass(frozen=True)
class Args(ResumableFlags):
    """What to compare."""

    output: Path = Path("runs/comparison")
    """Folder for results; made if it does not exist."""
    checkpoint: Path | None = None
    """Output folder of train_mappo.py whose policy takes part."""


def main(argv: Sequence[str] | None = None) -> None:
    """Name the policies, compare, report."""
    args = read_flags(Args, argv, __doc__)
    args.prepare(results=("table.md", "results.json"))
    backbone = load_backbone("vit_digits").to(args.device)

    policies = {
        "EViT": "evit",  # a baseline by name,
        "EViT, not fused": "evit:fuse=False",  # with parameters,
        "ToMe": "tome",
        "TopK": TopK,  # a class that is made from a keep rate,
    }
    if args.checkpoint is not None:
        policies["MAPPO"] = args.checkpoint  # a saved policy; policy objects take part as well

    images = 24 if args.quick else 2000
    result = benchmark(
        policies,
        backbone,
        Digits("validation", size=images, seed=TEST_SEED),  # images to report on
        tune=Digits("train", size=min(images, 256), seed=TUNE_SEED),  # images to calibrate on
        budgets=(0.35,) if args.quick else (0.25, 0.35, 0.5),  # shares of the dense GMACs
        seeds=1 if args.quick else 5,  # runs of what is random
        seed=args.seed,
        timing=Timing(pairs=2, images=8) if args.quick else Timing(),  # dense and pruned model run in turn
        output=args.output,  # table.md, table.tex, results.csv, results.json, pareto.png, token figures
        resume=args.resume,
    )
    print(result.table())
    best = result.at(0.35)[0]
    low, high = best.interval
    print(f"best at 35 %: {best.name}, {best.accuracy:.1%} ({low:.1%} to {high:.1%}); all files are in {args.output}/")


if __name__ == "__main__":
    with explained(Args):
        main(sys.argv[1:])
