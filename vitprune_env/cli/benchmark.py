"""Every policy at the same mean GMACs: accuracy, cost, speed and figures.

    vitprune benchmark                                      # all baselines at 25, 35 and 50 % of dense
    vitprune benchmark --methods evit tome --budgets 0.3
    vitprune benchmark --checkpoints runs/mappo runs/other  # trained policies join
    vitprune benchmark --policy my_policy.py:KeepLoud       # your own join, also as package.module:KeepLoud
    vitprune benchmark --resume                             # goes on where it was interrupted
    vitprune benchmark --redraw                             # tables and figures again, nothing is measured
    vitprune benchmark --data-dir DIR --model deit_small_patch16_224 --pretrained     # your images, your network

Policies are calibrated on training images and compared on images that nothing was chosen on: the validation split
while developing, `--split test` for the final numbers. What has to be trained of a method is trained first. Controls
stay in every table: the dense model, dropping at random, an actor that never learned, and trained methods before their
training. The output folder holds table.md (command, settings and tables), table.tex, results.csv, results.json,
pareto.png and .pdf (accuracy over GMACs) and one token figure per budget.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import tyro

from vitprune_env.cli.flags import TEST_SEED, TUNE_SEED, ImageFlags, ResumableFlags, lowered, named_sites, read_flags

Amp = Literal["off", "auto", "bf16", "fp16"]  # that of engine.kernels, which would import torch


BUILT_IN: dict[str, Any] = {
    "budgets": (0.25, 0.35, 0.5),
    "images": 2000,
    "fit_images": 4096,
    "seeds": 5,
    "batch_size": 250,
    "amp": "off",
    "fits": "each",
    "pairs": 9,
    "timed_images": 128,
    "warm_up": 3,
}
# Networks for photographs take a hundred times as long for each image.
FILES: dict[str, Any] = {
    "budgets": (0.7, 0.5, 0.35),
    "images": 1010,
    "fit_images": 2048,
    "seeds": 3,
    "batch_size": 32,
    "amp": "auto",
    "fits": "middle",
    "fit_steps": 60,
    "pairs": 3,
    "timed_images": 16,
    "warm_up": 1,
}
QUICK: dict[str, int] = {"images": 64, "tune_images": 16, "fit_images": 256, "seeds": 2, "pairs": 2, "timed_images": 16}


@dataclass(frozen=True)
class Args:
    """What to compare, and on what."""

    methods: tuple[str, ...] = ()
    """Baselines to compare; none: all; random: the controls alone, which take part in any case. Parameters may follow a
    name, as in dpc:strategy=cluster or evit:fuse=False."""
    checkpoints: tuple[str, ...] = ()
    """Output folders of training runs, or policy files; LABEL=PATH names the line (default MAPPO). Those of one label
    share a line: at each budget the ones trained for the nearest budget play, their thresholds calibrated to it."""
    policies: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["--policy"])] = ()
    """Policies of your own, FILE.py:NAME or package.module:NAME; LABEL=... names the line. NAME is a policy, or a class
    or function that makes one, from a keep rate if it takes an argument."""
    budgets: tuple[float, ...] = ()
    """Mean GMACs per image as shares of the dense model's, policy included; none: 0.25 0.35 0.5 on the built-in task,
    0.7 0.5 0.35 on image files."""
    sites: tuple[str, ...] = ("both",)
    """Where methods act: `backbone` for the network's own sites, and inside every block for methods that act there;
    `published` for those of each paper; `both` for the first, and a second row for methods published at other sites;
    or the sites for all, such as 3 6 9."""
    split: str = "validation"
    """Which images to report on."""
    images: int | None = None
    """Images to report on; None: 2000 scenes of the built-in task, 1010 image files."""
    tune_images: int = 256
    """Training images to calibrate on; of image files random crops, since their network knows them by heart."""
    fit_images: int | None = None
    """Training images to fit on; None: 4096 scenes of the built-in task, 2048 image files."""
    fits: Literal["each", "middle"] | None = None
    """Fit methods for each budget, or once for the middle one and turn the result to the others; None: each on the
    built-in task, middle on image files."""
    fit_steps: int | None = None
    """Optimiser steps of each fit; None: each method's own number on the built-in task, 60 on image files."""
    seeds: int | None = None
    """Runs of whatever is random (dropping at random, untrained actors); None: 5 on the built-in task, 3 on files."""
    batch_size: int | None = None
    """Images per batch; None: 250 on the built-in task, 32 on image files."""
    amp: Amp | None = None
    """Precision of everything that is measured: off is fp32, auto is bf16 where that is faster; None: off on the
    built-in task, auto on image files."""
    pairs: int | None = None
    """Runs of dense and pruned model for the speed, in turn; None: 9 on the built-in task, 3 on image files."""
    timed_images: int | None = None
    """Images that they run on; None: 128 on the built-in task, 16 on image files."""
    published: bool = False
    """Show what papers print of the network and the methods beside the results, with paper and table: published.md,
    published.png and .pdf. They are numbers of other images."""
    redraw: bool = False
    """Write the tables and figures of the output folder again from its results.json; nothing is measured."""
    common: ResumableFlags = field(default_factory=lambda: ResumableFlags(output=Path("runs/benchmark")))
    source: ImageFlags = field(default_factory=ImageFlags)


def parse(argv: Sequence[str] | None, prog: str | None = None) -> Args:
    """Read the command line.

    Raises:
        SettingsError: for numbers of images that are none.
    """
    from vitprune_env.errors import SettingsError

    args = read_flags(Args, argv, __doc__, prog)
    for name in ("images", "tune_images", "fit_images", "fit_steps"):
        if (count := getattr(args, name)) is not None and count < 1:
            raise SettingsError(f"{name}: expected 1 or more, got {count}")
    args = replace(args, split="validation") if args.split == "val" else args
    usual = FILES if args.source.reads_files else BUILT_IN
    left = {name: value for name, value in usual.items() if getattr(args, name, value) in (None, ())}
    args = replace(args, **left)
    if not args.common.quick:
        return args
    if "budgets" in left:
        args = replace(args, budgets=(max(args.budgets),))  # one that most methods can meet
    return lowered(args, **QUICK)


def entries(args: Args) -> dict[str, Any]:
    """The policies of the flags by the labels of their lines.

    Raises:
        SettingsError: for a policy of one's own that cannot be imported.
    """
    from vitprune_env.baselines import available
    from vitprune_env.benchmarking.contestants import load_object

    found: dict[str, Any] = {name: name for name in args.methods or available()}
    trained: dict[str, list[str]] = {}
    for text in args.checkpoints:
        label, _, path = text.rpartition("=")
        trained.setdefault(label or "MAPPO", []).append(path)
    own = {}
    for text in args.policies:
        label, _, place = text.rpartition("=")
        own[label or place.rpartition(":")[2]] = load_object(place)
    return {**found, **trained, **own}


def sites_of(args: Args) -> Any:
    """The sites of the flags as `benchmark` takes them."""
    return named_sites(args.sites, "backbone", "published", "both")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what has not been measured yet, then report."""
    args = parse(argv, prog="vitprune benchmark")
    from vitprune_env.benchmarking import BenchmarkResult, Fits, Timing, benchmark
    from vitprune_env.benchmarking.published import check_published, save_beside
    from vitprune_env.data import Digits, RandomViews

    if args.redraw:
        drawn = BenchmarkResult.load(args.common.output)
        drawn.save(args.common.output)
        if args.published:
            save_beside(drawn, args.common.output)
        print(f"tables and figures are in {args.common.output}/")
        return
    policies = entries(args)  # a wrong name ends the command before any network is loaded
    common, source = args.common, args.source
    common.prepare(not source.reads_files, ("table.md", "results.json"))
    backbone = source.network(common.seed, common.device)
    tune, fit, test = source.open_apart(
        backbone,
        ("train", args.tune_images, TUNE_SEED),
        ("train", args.fit_images, common.seed),
        (args.split, args.images, TEST_SEED),
    )
    if args.published:
        from vitprune_env.engine.cost import CostModel

        check_published(backbone.name, CostModel.of(backbone).dense() / 1e9)
    warm_up = (FILES if source.reads_files else BUILT_IN)["warm_up"]
    words = sys.argv[2:] if argv is None else argv
    result = benchmark(
        policies,
        backbone,
        test,
        budgets=args.budgets,
        sites=sites_of(args),
        tune=tune if isinstance(tune, Digits) else RandomViews(tune, count=1, seed=TUNE_SEED),
        fit=fit,
        seeds=cast(int, args.seeds),
        seed=common.seed,
        timing=Timing(cast(int, args.pairs), cast(int, args.timed_images), warm_up),
        batch_size=cast(int, args.batch_size),
        amp=cast(Any, args.amp),
        fits=Fits(cast(Any, args.fits), args.fit_steps, common.quick),
        output=common.output,
        resume=common.resume,
        settings={"split": args.split, "device": common.device, "fit_images": args.fit_images},
        command=shlex.join(["vitprune", "benchmark", *words]),
    )
    if args.published:
        print(f"\n### Beside numbers of papers\n\n{save_beside(result, common.output)}")
    print(f"\n{result.table()}\nresults and figures are in {common.output}/")
