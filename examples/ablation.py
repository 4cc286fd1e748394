"""Train variants at several budgets with several seeds, and say with confidence intervals which differ.

    python examples/ablation.py                                     # MAPPO, single-agent PPO, Random: Table II
    python examples/ablation.py --variants mappo finetune_alternate finetune_after     # does fine-tuning gain?
    python examples/ablation.py --variants mappo adaptive           # one policy for all budgets, one for each
    python examples/ablation.py --variants mappo paper attribution log_probability margin      # rewards

Every run is a file in the output folder, so that `--resume` does only what is missing. Reports table.md, results.csv
and accuracy.png. Design on the validation split (the default); the test split is for the last word.
"""

from __future__ import annotations

import csv
import json
import multiprocessing
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any, Literal

import torch
import tyro
from matplotlib.figure import Figure
from scipy.stats import t as student
from tqdm import tqdm

from common import CommonArgs, run, write_json
from train_mappo import TEST_SEED, TUNE_SEED
from training_flags import TrainingFlags
from vitprune_env import Backbone, KeepAll, TokenGame, evaluate, load_backbone
from vitprune_env.agents import AdaptivePolicy, train
from vitprune_env.baselines import RandomDrop, calibrate
from vitprune_env.data import Digits, batches_of

CONFIDENCE = 0.95
QUICK: dict[str, Any] = {"images": 32, "cache_images": 128, "calibration_images": 128, "finetune_every": 2,
                         "finetune_steps": 4}  # fmt: skip
VARIANTS: dict[str, TrainingFlags | None] = {
    "mappo": TrainingFlags(),
    "ppo_single": TrainingFlags(algorithm="ppo_single"),
    "random": None,  # not trained: RandomDrop at the same budget
    "paper": TrainingFlags(reward="paper"),
    "attribution": TrainingFlags(reward="attribution"),
    "log_probability": TrainingFlags(outcome="log_probability"),
    "probability": TrainingFlags(outcome="probability"),
    "margin": TrainingFlags(outcome="margin"),
    "adaptive": TrainingFlags(adaptive=(0.2, 0.6)),  # one policy asked for each of the budgets
    "finetune_alternate": TrainingFlags(finetune="alternate"),
    "finetune_after": TrainingFlags(finetune="after"),
}


@dataclass(frozen=True)
class Args(CommonArgs):
    """What to run."""

    output: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("runs/ablation")
    """Folder for results; made if it does not exist."""
    variants: tuple[str, ...] = ("mappo", "ppo_single", "random")
    """What to compare; differences are taken to the first."""
    shares: tuple[float, ...] = (0.25, 0.35, 0.45)
    """Budgets, as shares of the dense model's MACs."""
    seeds: int = 5
    """Runs of each, with seeds from --seed on."""
    updates: int | None = None
    """Updates per run; None: the variant's own."""
    split: Literal["validation", "test"] = "validation"
    """Held-out images to report on."""
    images: int = 2000
    """How many of them."""
    jobs: int = 1
    """Runs at the same time, each on one thread."""


@dataclass(frozen=True)
class Job:
    """One training run and where its result goes."""

    variant: str
    share: float
    seed: int
    config: TrainingFlags | None
    split: str
    images: int
    device: str
    path: Path

    @property
    def settings(self) -> dict[str, Any]:
        """What a result depends on; a stored one of other settings is not taken for this one's."""
        config = None if self.config is None else vars(self.config)
        return {"variant": self.variant, "share": self.share, "seed": self.seed, "config": config, "split": self.split,
                "images": self.images}  # fmt: skip


def parse() -> Args:
    """Read the command line."""
    args = tyro.cli(Args, description=__doc__)
    unknown = [name for name in args.variants if name not in VARIANTS]
    if unknown:
        raise SystemExit(f"error: --variants: expected some of {', '.join(VARIANTS)}, got {', '.join(unknown)}")
    for name in args.variants:
        variant = VARIANTS[name]
        low, high = variant.adaptive if variant is not None and variant.adaptive else (0.0, 1.0)
        if not all(low <= share <= high for share in args.shares):
            raise SystemExit(f"error: --shares: expected {low:g} to {high:g} with variant {name}, got {args.shares}")
    return replace(args, seeds=2, updates=4, images=200, shares=args.shares[:1]) if args.quick else args


def jobs_of(args: Args) -> list[Job]:
    """All runs, seed by seed, so that an early look sees every variant."""
    made = []
    for seed in range(args.seed, args.seed + args.seeds):
        for share in args.shares:
            for variant in args.variants:
                config = VARIANTS[variant]
                if config is not None:
                    small = QUICK if args.quick else {}
                    length = {} if args.updates is None else {"updates": args.updates}
                    budget = {} if config.adaptive else {"target_share": share}
                    config = replace(config, seed=seed, **budget, **small, **length)
                path = args.output / f"{variant}-{100 * share:g}-{seed}.json"
                made.append(Job(variant, share, seed, config, args.split, args.images, args.device, path))
    return made


def work(job: Job) -> dict[str, Any]:
    """Train, evaluate on held-out images, write the result."""
    torch.set_num_threads(1)
    backbone = load_backbone("vit_digits")
    held_out = batches_of(Digits(job.split, size=job.images, seed=TEST_SEED), 250, job.device)
    start = time.perf_counter()
    if job.config is None:
        backbone = backbone.to(job.device)
        tune = batches_of(Digits("train", size=32, seed=TUNE_SEED), 32, job.device)
        target = job.share * TokenGame(backbone).cost.dense() / 1e9
        sites = backbone.default_sites
        policy = calibrate(lambda rate: RandomDrop(rate, job.seed), target, backbone, tune, sites=sites)
    else:
        images = max(job.config.cache_images, job.config.calibration_images)
        data = Digits("train", size=images, seed=job.seed)
        result = train(backbone, data, **job.config.config.arguments, device=job.device, progress=False)
        backbone, policy = result.backbone, result.policy
        if isinstance(policy, AdaptivePolicy):
            policy = policy.at(job.share)
    seconds = time.perf_counter() - start
    found = {"settings": job.settings, "seconds": seconds, **measure(backbone, policy, held_out)}
    write_json(job.path, found)
    return found


def measure(backbone: Backbone, policy: Any, held_out: list[Any]) -> dict[str, float]:
    """Accuracy and cost of the pruned network, and of the same network without pruning."""
    pruned = evaluate(TokenGame.for_policy(backbone, policy, sites=backbone.default_sites), policy, held_out)
    dense = evaluate(TokenGame(backbone), KeepAll(), held_out)
    return {"accuracy": pruned.accuracy, "gmacs": pruned.gmacs, "share": pruned.macs / dense.macs,
            "dense_accuracy": dense.accuracy}  # fmt: skip


def stored(job: Job) -> dict[str, Any] | None:
    """The result of an earlier run with the same settings."""
    if not job.path.exists():
        return None
    found = json.loads(job.path.read_text())
    return found if found["settings"] == json.loads(json.dumps(job.settings)) else None


def run_all(jobs: Sequence[Job], args: Args) -> list[dict[str, Any]]:
    """Results of all jobs, those that lie there included if asked to resume."""
    results = [stored(job) if args.resume else None for job in jobs]
    missing = [job for job, result in zip(jobs, results, strict=True) if result is None]
    bar = tqdm(total=len(jobs), initial=len(jobs) - len(missing), desc="runs", unit="run")

    def collect(found: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        done = []
        for result in found:
            bar.set_postfix_str(f"{result['settings']['variant']} {result['accuracy']:.1%}")
            bar.update()
            done.append(result)
        return done

    with bar:
        if args.jobs > 1:
            with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
                fresh = collect(pool.imap_unordered(work, missing))
        else:
            fresh = collect(map(work, missing))
    return [result for result in results if result is not None] + fresh


def interval(values: Sequence[float]) -> float:
    """Half the width of Student's confidence interval of the mean."""
    if len(values) < 2:
        return float("nan")
    return float(student.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * stdev(values) / len(values) ** 0.5


def summarise(results: Sequence[dict[str, Any]], args: Args) -> list[dict[str, Any]]:
    """One row per budget and variant: means over the seeds, and paired differences from the first variant."""
    by = {(r["settings"]["variant"], r["settings"]["share"], r["settings"]["seed"]): r for r in results}
    seeds = range(args.seed, args.seed + args.seeds)
    rows = []
    for share in args.shares:
        for variant in args.variants:
            own = [by[variant, share, seed] for seed in seeds]
            first = [by[args.variants[0], share, seed]["accuracy"] for seed in seeds]
            accuracy = [r["accuracy"] for r in own]
            difference = [mine - other for mine, other in zip(accuracy, first, strict=True)]
            rows.append(
                {
                    "budget": share,
                    "variant": variant,
                    "accuracy": mean(accuracy),
                    "accuracy_ci": interval(accuracy),
                    "difference": mean(difference),
                    "difference_ci": interval(difference),
                    "share": mean(r["share"] for r in own),
                    "worst_budget_error": max((r["share"] / share - 1 for r in own), key=abs),
                    "dense_accuracy": mean(r["dense_accuracy"] for r in own),
                    "seconds": mean(r["seconds"] for r in own),
                }
            )
    return rows


def table(rows: Sequence[dict[str, Any]], args: Args) -> str:
    """The summary as markdown."""
    lines = [
        f"| budget % | variant | accuracy % | minus {args.variants[0]} | of dense % | worst budget error % "
        "| accuracy without pruning % | s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        same = row["variant"] == args.variants[0]
        gap = "" if same else f"{100 * row['difference']:+.2f} ± {100 * row['difference_ci']:.2f}"
        accuracy = f"{100 * row['accuracy']:.2f} ± {100 * row['accuracy_ci']:.2f}"
        lines.append(
            f"| {100 * row['budget']:g} | {row['variant']} | {accuracy} | {gap} | {100 * row['share']:.1f} "
            f"| {100 * row['worst_budget_error']:+.1f} | {100 * row['dense_accuracy']:.2f} | {row['seconds']:.0f} |"
        )
    return "\n".join(lines)


def figure(rows: Sequence[dict[str, Any]], args: Args) -> Figure:
    """Accuracy with confidence intervals: over the budget, one line per variant, or by variant at the only budget."""
    drawn = Figure(figsize=(6.0, 4.0), layout="constrained")
    axes = drawn.subplots()
    single = len(args.shares) == 1
    for variant in args.variants:
        own = [row for row in rows if row["variant"] == variant]
        axes.errorbar(
            [variant] if single else [100 * row["share"] for row in own],
            [100 * row["accuracy"] for row in own],
            yerr=[100 * row["accuracy_ci"] for row in own],
            label=variant,
            marker="o",
            markersize=4,
            capsize=3,
        )
    axes.set_ylabel(f"accuracy %, {args.split} split")
    title = f"mean of {args.seeds} seeds, {CONFIDENCE:.0%} intervals"
    axes.set_title(f"{title}, {args.shares[0]:.0%} of the dense GMACs" if single else title, fontsize="medium")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    if single:
        axes.tick_params(axis="x", rotation=20)
    else:
        axes.set_xlabel("GMACs, % of dense, policy included")
        axes.legend(frameon=False)
    return drawn


def main() -> None:
    """Run what is missing, report."""
    args = parse()
    args.prepare()
    rows = summarise(run_all(jobs_of(args), args), args)
    with (args.output / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    text = table(rows, args)
    (args.output / "table.md").write_text(text + "\n")
    figure(rows, args).savefig(args.output / "accuracy.png", dpi=150)
    print(f"\n{text}\n\ntable.md, results.csv and accuracy.png are in {args.output}/")


if __name__ == "__main__":
    run(main)
