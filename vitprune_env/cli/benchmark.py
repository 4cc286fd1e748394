"""Every policy at the same mean GMACs: accuracy, cost, speed and figures.

    vitprune benchmark                                      # all baselines at 25, 35 and 50 % of dense
    vitprune benchmark --methods evit tome --budgets 0.3
    vitprune benchmark --checkpoints runs/mappo runs/other  # trained policies join
    vitprune benchmark --resume                             # goes on where it was interrupted
    vitprune benchmark --data-dir DIR --model deit_small_patch16_224 --pretrained --methods evit tome topk

Policies are calibrated on training images and compared on images that nothing was chosen on: the validation split
while developing, `--split test` for the final numbers. What has to be trained of a method is trained for each budget.
Controls stay in every table: the dense model, dropping at random, an actor that never learned, and trained methods
before their training. The output folder holds table.md, table.tex, results.csv, results.json, pareto.png (accuracy over
GMACs) and one token figure per budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from vitprune_env.cli.flags import TEST_SEED, TUNE_SEED, CommonFlags, ImageFlags, lowered, read_flags


@dataclass(frozen=True)
class Args:
    """What to compare, and on what."""

    methods: tuple[str, ...] = ()
    """Baselines to compare; none: all. The controls take part in any case. Parameters may follow a name, as in
    dpc:strategy=cluster or evit:fuse=False."""
    checkpoints: tuple[str, ...] = ()
    """Output folders of training runs, or policy files; LABEL=PATH names the line (default MAPPO). Those of one label
    share a line: at each budget the ones trained for the nearest budget play, their thresholds calibrated to it."""
    budgets: tuple[float, ...] = (0.25, 0.35, 0.5)
    """Mean GMACs per image as shares of the dense model's, policy included."""
    sites: tuple[str, ...] = ("backbone",)
    """Where methods act: `backbone` for the network's own sites, and inside every block for methods that act there;
    `published` for those of each paper; or the sites for all, such as 3 6 9."""
    split: str = "validation"
    """Which images to report on."""
    images: int = 2000
    """Images to report on."""
    tune_images: int = 256
    """Training images to calibrate on."""
    fit_images: int = 4096
    """Training images to fit on."""
    seeds: int = 5
    """Runs of whatever is random (dropping at random, untrained actors)."""
    batch_size: int = 250
    """Images per batch."""
    pairs: int = 9
    """Runs of dense and pruned model for the speed, in turn."""
    timed_images: int = 128
    """Images that they run on."""
    common: CommonFlags = field(default_factory=lambda: CommonFlags(output=Path("runs/benchmark")))
    source: ImageFlags = field(default_factory=ImageFlags)


def parse(argv: Sequence[str] | None, prog: str | None = None) -> Args:
    """Read the command line.

    Raises:
        SettingsError: for numbers of images that are none.
    """
    from vitprune_env.errors import SettingsError

    args = read_flags(Args, argv, __doc__, prog)
    for name in ("images", "tune_images", "fit_images"):
        if getattr(args, name) < 1:
            raise SettingsError(f"{name}: expected 1 or more, got {getattr(args, name)}")
    args = replace(args, split="validation") if args.split == "val" else args
    if not args.common.quick:
        return args
    args = replace(args, budgets=(max(args.budgets),))  # which most methods can meet
    return lowered(args, images=64, tune_images=16, fit_images=256, seeds=2, pairs=2, timed_images=16)


def entries(args: Args) -> dict[str, str | list[str]]:
    """The policies of the flags by the labels of their lines."""
    from vitprune_env.baselines import available

    found: dict[str, str | list[str]] = {name: name for name in args.methods or available()}
    trained: dict[str, list[str]] = {}
    for text in args.checkpoints:
        label, _, path = text.rpartition("=")
        trained.setdefault(label or "MAPPO", []).append(path)
    return {**found, **trained}


def sites_of(args: Args) -> tuple[str, ...] | Literal["published"] | None:
    """The sites of the flags as `benchmark` takes them."""
    if args.sites == ("backbone",):
        return None
    return "published" if args.sites == ("published",) else args.sites


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what has not been measured yet, then report."""
    args = parse(argv, prog="vitprune benchmark")
    from vitprune_env.benchmarking import Timing, benchmark

    common, source = args.common, args.source
    common.prepare(built_in=not source.reads_files)
    backbone = source.network(common.seed, common.device)
    tune, fit, test = source.open_apart(
        backbone,
        ("train", args.tune_images, TUNE_SEED),
        ("train", args.fit_images, common.seed),
        (args.split, args.images, TEST_SEED),
    )
    result = benchmark(
        entries(args),
        backbone,
        test,
        budgets=args.budgets,
        sites=sites_of(args),
        tune=tune,
        fit=fit,
        seeds=args.seeds,
        seed=common.seed,
        timing=Timing(args.pairs, args.timed_images),
        batch_size=args.batch_size,
        output=common.output,
        resume=common.resume,
        quick=common.quick,
        settings={"split": args.split, "device": common.device, "fit_images": args.fit_images},
    )
    print(f"\n{result.table()}\nresults and figures are in {common.output}/")
