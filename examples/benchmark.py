"""Every policy at the same mean GMACs: accuracy, cost, speed and pictures, on the built-in task.

    python examples/benchmark.py                                      # all baselines at 25, 35 and 50 % of dense
    python examples/benchmark.py --methods evit tome --budgets 0.3
    python examples/benchmark.py --checkpoints runs/mappo runs/other  # trained policies join
    python examples/benchmark.py --resume                             # goes on where it was interrupted
    python examples/benchmark.py --quick

Policies are calibrated on training scenes and compared on scenes that nothing was chosen on: the validation split while
developing, `--split test` for the final numbers. What has to be trained of a method is trained for each budget. Where
methods act is set by `--sites`. Controls stay in every table: the dense model, dropping at random, an actor that never
learned, and trained methods before their training. The output folder holds table.md, results.csv, results.json,
pareto.png (accuracy over GMACs) and one token figure per budget.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tqdm import tqdm

from benchmark_measure import measure
from benchmark_players import DENSE, Contestant, Task, contestants
from benchmark_report import Store, write_report
from common import CommonArgs, batches_of, run
from train_mappo import TEST_SEED, TUNE_SEED
from vitprune_env import load_backbone
from vitprune_env.data import Digits


@dataclass(frozen=True)
class Args(CommonArgs):
    """What to compare, and on what."""

    output: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("runs/benchmark")
    """Folder for results; made if it does not exist."""
    methods: tuple[str, ...] = ()
    """Baselines to compare; none: all. The controls take part in any case. Parameters may follow a name, as in
    dpc:strategy=cluster or evit:fuse=False."""
    budgets: tuple[float, ...] = (0.25, 0.35, 0.5)
    """Mean GMACs per image as shares of the dense model's, policy included."""
    checkpoints: tuple[str, ...] = ()
    """Output folders of train_mappo.py, or policy files; LABEL=PATH names the line (default MAPPO). Those of one label
    share a line: at each budget the ones trained for the nearest budget play, their thresholds calibrated to it."""
    sites: Literal["backbone", "published"] = "backbone"
    """Where methods act: the network's own sites, per-block methods in every block; or where they were published."""
    split: Literal["validation", "val", "test"] = "validation"
    """Which scenes to report on."""
    images: int = 2000
    """Scenes to report on."""
    tune_images: int = 256
    """Training scenes to calibrate on."""
    fit_images: int = 4096
    """Training scenes to fit on."""
    seeds: int = 5
    """Runs of whatever is random (dropping at random, untrained actors)."""
    batch_size: int = 250
    """Scenes per batch."""
    pairs: int = 9
    """Runs of dense and pruned model for the speed, in turn."""
    timed_images: int = 128
    """Scenes that they run on."""

    @property
    def settings(self) -> dict[str, object]:
        """What the numbers depend on beside method and budget."""
        names = ("seed", "device", "quick", "sites", "images", "tune_images", "fit_images", "seeds", "batch_size")
        split = "validation" if self.split == "val" else self.split
        return {**{name: getattr(self, name) for name in names}, "split": split}


def checked(args: Args) -> Args:
    """The flags, made small if that is wanted.

    Raises:
        ValueError: for budgets that are no shares of the dense cost, or numbers of images that are none.
    """
    for share in args.budgets:
        if not 0 < share < 1:
            raise ValueError(f"budgets: expected shares of the dense GMACs between 0 and 1, got {share}")
    for name in ("images", "tune_images", "fit_images", "seeds", "batch_size", "pairs", "timed_images"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name}: expected 1 or more, got {getattr(args, name)}")
    small = {"images": 64, "tune_images": 16, "fit_images": 256, "seeds": 2, "pairs": 2, "timed_images": 16}
    return replace(args, **small) if args.quick else args


def task_of(args: Args) -> Task:
    """Scenes of digits; those of different purpose never coincide."""
    split = str(args.settings["split"])
    return Task(
        backbone=load_backbone("vit_digits").to(args.device),
        training=Digits("train", args.fit_images, seed=args.seed),
        tune=batches_of(Digits("train", args.tune_images, seed=TUNE_SEED), args.batch_size, args.device),
        test=batches_of(Digits(split, args.images, seed=TEST_SEED), args.batch_size, args.device),
        seed=args.seed,
        seeds=args.seeds,
        published_sites=args.sites == "published",
        output=args.output,
        resume=args.resume,
        quick=args.quick,
    )


def jobs(args: Args) -> list[tuple[Contestant, float]]:
    """Who plays at which budget."""
    players = contestants(args.methods, args.checkpoints)
    return [(DENSE, 1.0), *((player, share) for share in args.budgets for player in players)]


def main() -> None:
    """Measure what has not been measured yet, then report."""
    args = checked(tyro.cli(Args, description=__doc__))
    args.prepare()
    todo = jobs(args)
    task = task_of(args)
    store = Store(args.output, args.settings, args.resume)
    with tqdm(todo) as bar:
        for player, share in bar:
            bar.set_description(f"{player.name} at {share:.0%}")
            if store.find(player.name, share, player.origin) is None:
                store.add(measure(player, share, task, args.pairs, args.timed_images))
    title = f"{task.backbone.name}, {args.images} {args.settings['split']} scenes"
    print(f"\n{write_report(store, task, title)}\nresults and figures are in {args.output}/")


if __name__ == "__main__":
    run(main)
