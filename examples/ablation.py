"""Train variants at several budgets with several seeds, and say with confidence intervals which differ.

    python examples/ablation.py                                     # MAPPO, single-agent PPO, Random: Table II
    python examples/ablation.py --variants mappo finetune_alternate finetune_after     # does fine-tuning gain?
    python examples/ablation.py --variants mappo adaptive           # one policy for all budgets, one for each
    python examples/ablation.py --variants mappo paper attribution log_probability margin      # rewards
    python examples/ablation.py --variants mappo neighbours early early_scalars                # where, what is seen
    python examples/ablation.py --task twins --shares 0.2 --updates 240                 # where agents have to agree
    python examples/ablation.py --variants mappo masks distilled_attention evit         # beside baselines
    python examples/ablation.py --data-dir DIR --weights FILE --shares 0.35 --sites 1 3 5 7    # on photographs

Every run is a row of results.json, so that `--resume` does only what is missing. Reports table.md, results.csv and
accuracy.png. Design on the validation split (the default); the test split is for the last word.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import re
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from vitprune_env import KeepAll, TokenGame
from vitprune_env.agents import (
    SENSES,
    AdaptivePolicy,
    BudgetRange,
    FinetuneConfig,
    LightNetworks,
    MAPPOConfig,
    PPOSingleConfig,
    Preset,
    Share,
    train,
)
from vitprune_env.baselines import available, calibrate, describe, fit
from vitprune_env.benchmarking import Row, difference, interval, measure
from vitprune_env.benchmarking.store import Store
from vitprune_env.benchmarking.tables import comma_separated, markdown
from vitprune_env.cli import explained
from vitprune_env.cli.flags import ImageFlags, ResumableFlags, lowered, read_flags
from vitprune_env.cli.flags.training import TrainingFlags
from vitprune_env.cli.train import Args as TrainArgs
from vitprune_env.cli.train import Task, open_task
from vitprune_env.engine.backbone import Backbone
from vitprune_env.errors import SettingsError
from vitprune_env.files import replace_file
from vitprune_env.game.rewards import (
    START_PRICE,
    Attribution,
    PaperReward,
    SharedOutcome,
    log_probability,
    margin,
    probability,
)
from vitprune_env.policy import Policy

ADAPTIVE = BudgetRange(0.2, 0.6)
EARLY = ("1.attn", "2", "3", "5")  # the first look comes before the MLP of block 1, 6 % of the dense network's MACs


def sensing(*senses: str) -> MAPPOConfig:
    """MAPPO whose actor and critic see more than a token."""
    return MAPPOConfig(networks=LightNetworks(senses=senses))


VARIANTS: dict[str, Preset] = {
    "mappo": Preset(),
    "ppo_single": Preset(learner=PPOSingleConfig()),
    "critic_context": Preset(learner=MAPPOConfig(networks=LightNetworks(critic_context=True))),
    **{sense: Preset(learner=sensing(sense)) for sense in SENSES},
    "early": Preset(sites=EARLY),
    "early_scalars": Preset(learner=sensing("crowd", "class_attention", "alive", "site", "position"), sites=EARLY),
    "paper": Preset(reward=PaperReward(outcome_bonus=1.0)),
    "attribution": Preset(reward=Attribution(START_PRICE)),
    "log_probability": Preset(reward=SharedOutcome(START_PRICE, log_probability)),
    "probability": Preset(reward=SharedOutcome(START_PRICE, probability)),
    "margin": Preset(reward=SharedOutcome(START_PRICE, margin)),
    "adaptive": Preset(budget=ADAPTIVE),  # one policy asked for each of the budgets
    "finetune_alternate": Preset(finetune=FinetuneConfig(when="alternate")),
    "finetune_after": Preset(finetune=FinetuneConfig(when="after")),
}
QUICK = {"updates": 4, "images": 32, "cache_images": 64, "calibration_images": 64}


@dataclass(frozen=True)
class Args(ResumableFlags):
    """What to run."""

    output: Path = Path("runs/ablation")
    """Folder for results; made if it does not exist."""
    variants: tuple[str, ...] = ("mappo", "ppo_single", "random")
    """What to compare, variants of learning or baselines by name; differences are taken to the first."""
    shares: tuple[float, ...] = (0.25, 0.35, 0.45)
    """Budgets, as shares of the dense model's MACs."""
    seeds: int = 5
    """Runs of each, with seeds from --seed on."""
    updates: int | None = None
    """Updates per run; None: the variant's own."""
    sites: tuple[str, ...] = ()
    """Where tokens are pruned; none: the variant's own sites, or the network's."""
    split: Literal["validation", "test"] = "validation"
    """Held-out images to report on."""
    images: int = 2000
    """How many of them."""
    jobs: int = 1
    """Runs at the same time, each on one thread unless --threads says otherwise."""
    source: ImageFlags = field(default_factory=ImageFlags)


@dataclass(frozen=True)
class Job:
    """One training run."""

    variant: str
    share: float
    seed: int
    args: Args

    @property
    def name(self) -> str:
        """Of its row in results.json."""
        return f"{self.variant}, seed {self.seed}"

    @property
    def settings(self) -> Preset | None:
        """The settings of the variant at this budget and seed; None: it is a baseline."""
        variant, quick = VARIANTS.get(self.variant), self.args.quick
        if variant is None:
            return None
        length = {} if self.args.updates is None else {"updates": self.args.updates}
        run = replace(variant.run, seed=self.seed, **{**(QUICK if quick else {}), **length})
        finetune = variant.finetune
        if finetune is not None:
            small = {"every": 2, "steps": 4} if quick else {}
            finetune = replace(finetune, seed=self.seed, cache_images=run.cache_images, **small)
        budget = variant.budget if self.variant == "adaptive" else Share(self.share)
        sites = variant.sites or self.args.sites or None
        return replace(variant, budget=budget, run=run, finetune=finetune, sites=sites)


def check(args: Args) -> Args:
    """The flags, made small if asked for.

    Raises:
        SettingsError: for a variant that does not exist, or a budget that one cannot have.
    """
    for name in args.variants:
        if name not in VARIANTS and name not in available():
            names = f"{', '.join(VARIANTS)}, or a baseline ({', '.join(available())})"
            raise SettingsError(f"variants: expected some of {names}, got {name}")
        low, high = (ADAPTIVE.low, ADAPTIVE.high) if name == "adaptive" else (0.0, 1.0)
        if not all(low <= share <= high for share in args.shares):
            raise SettingsError(f"shares: expected {low:g} to {high:g} with variant {name}, got {args.shares}")
    return replace(lowered(args, seeds=2, images=50), shares=args.shares[:1]) if args.quick else args


def work(job: Job) -> list[Row]:
    """Train, and measure on held-out images: the pruned network, and the same network without pruning."""
    torch.set_num_threads(job.args.threads or 1)
    args, start, settings = job.args, time.perf_counter(), job.settings
    backbone = args.source.network(args.seed, args.device)
    common = ResumableFlags(seed=job.seed, device=args.device, quick=args.quick)
    training = TrainingFlags.of(Preset() if settings is None else settings)
    asked = TrainArgs(split=args.split, test_images=args.images, common=common, training=training, images=args.source)
    task = open_task(asked, backbone)
    if settings is None:
        policy = baseline(job, backbone, task)
    else:
        options: dict[str, Any] = {"calibration": task.calibration, "device": args.device, "progress": False}
        result = train(backbone, task.training, **settings.arguments, **options)
        backbone, policy = result.backbone, result.policy
        if isinstance(policy, AdaptivePolicy):
            policy = policy.at(job.share)
    seconds = time.perf_counter() - start
    sites = policy.default_sites(backbone.depth) or args.sites or backbone.default_sites
    pruned = measure(job.name, backbone, policy, task.test, sites=sites, share=job.share)
    dense = measure(f"{job.name}, dense", backbone, KeepAll(), task.test, share=job.share)
    return [replace(pruned, seconds=seconds), dense]


def baseline(job: Job, backbone: Backbone, task: Task) -> Policy:
    """A baseline at the budget, trained on the images of the seed if it has something to train."""
    target, method = job.share * TokenGame(backbone).cost.dense() / 1e9, describe(job.variant)
    sites = job.args.sites or method.sites(backbone)
    if method.recipe is not None:
        config = method.fit_config().quick() if job.args.quick else None
        options: dict[str, Any] = {"config": config, "sites": sites, "seed": job.seed, "progress": False}
        fitted: Any = fit(method, backbone, task.training, target, **options)
        return calibrate(fitted.at, target, backbone, task.tune, sites=sites, knob=method.fitted_knob)
    seed: dict[str, Any] = {"seed": job.seed} if method.is_random else {}
    return calibrate(method.name, target, backbone, task.tune, sites=sites, **seed)


def run_all(jobs: Sequence[Job], store: Store) -> None:
    """Do what is missing, seed by seed, and store every run when it is done."""
    missing = [job for job in jobs if store.find(job.name, job.share) is None]
    args = jobs[0].args
    with tqdm(total=len(jobs), initial=len(jobs) - len(missing), desc="runs", unit="run") as bar:
        if args.jobs > 1:
            with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
                _collect(pool.imap_unordered(work, missing), store, bar)
        else:
            _collect(map(work, missing), store, bar)


def _collect(found: Iterable[list[Row]], store: Store, bar: tqdm) -> None:
    for pruned, dense in found:
        store.add(dense)
        store.add(pruned)
        bar.set_postfix_str(f"{pruned.name} {pruned.accuracy:.1%}")
        bar.update()


def summarise(jobs: Sequence[Job], store: Store) -> list[dict[str, Any]]:
    """One row per budget and variant: means over the seeds, and differences from the first variant, paired by seed."""
    args, rows = jobs[0].args, []

    def runs(variant: str, share: float, suffix: str = "") -> list[Row]:
        own = [job for job in jobs if (job.variant, job.share) == (variant, share)]
        return [row for job in own if (row := store.find(job.name + suffix, share)) is not None]

    def accuracies(found: Sequence[Row]) -> np.ndarray:
        return np.array([[row.accuracy] for row in found])  # [runs, 1]: the images are the same in all runs

    for share in args.shares:
        first = accuracies(runs(args.variants[0], share))
        for variant in args.variants:
            own, dense = runs(variant, share), runs(variant, share, ", dense")
            accuracy = accuracies(own)
            spent = [row.gmacs / whole.gmacs for row, whole in zip(own, dense, strict=True)]
            low, high = interval(accuracy)
            gap, least, most = difference(accuracy, first)
            rows.append(
                {
                    "budget": share,
                    "variant": variant,
                    "accuracy": float(accuracy.mean()),
                    "accuracy_low": low,
                    "accuracy_high": high,
                    "difference": gap,
                    "difference_low": least,
                    "difference_high": most,
                    "share": mean(spent),
                    "worst_budget_error": max((value / share - 1 for value in spent), key=abs),
                    "dense_accuracy": mean(row.accuracy for row in dense),
                    "seconds": mean(row.seconds for row in own),
                }
            )
    return rows


def cells(row: dict[str, Any], first: str) -> dict[str, str]:
    """A row of the summary as text."""
    percent = {name: f"{100 * value:.2f}" for name, value in row.items() if isinstance(value, float)}
    gap = f"{100 * row['difference']:+.2f} ({100 * row['difference_low']:+.2f} to {100 * row['difference_high']:+.2f})"
    return {
        "budget %": f"{100 * row['budget']:g}",
        "variant": row["variant"],
        "accuracy % (95 %)": f"{percent['accuracy']} ({percent['accuracy_low']} to {percent['accuracy_high']})",
        f"minus {first} (95 %)": "" if row["variant"] == first else gap,
        "of dense %": f"{100 * row['share']:.1f}",
        "worst budget error %": f"{100 * row['worst_budget_error']:+.1f}",
        "accuracy without pruning %": percent["dense_accuracy"],
        "s": f"{row['seconds']:.0f}",
    }


def figure(rows: Sequence[dict[str, Any]], args: Args) -> Figure:
    """Accuracy with confidence intervals: over the budget, one line per variant, or by variant at the only budget."""
    drawn = Figure(figsize=(6.0, 4.0), layout="constrained")
    axes = drawn.subplots()
    single = len(args.shares) == 1
    for variant in args.variants:
        own = [row for row in rows if row["variant"] == variant]
        accuracy, low, high = (
            np.array([100 * row[name] for row in own]) for name in ("accuracy", "accuracy_low", "accuracy_high")
        )
        places = [variant] if single else [100 * row["share"] for row in own]
        error = [accuracy - low, high - accuracy]
        axes.errorbar(places, accuracy, yerr=error, label=variant, marker="o", markersize=4, capsize=3)
    axes.set_ylabel(f"accuracy %, {args.split} split")
    title = f"mean of {args.seeds} seeds, 95 % intervals"
    axes.set_title(f"{title}, {args.shares[0]:.0%} of the dense GMACs" if single else title, fontsize="medium")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    if single:
        axes.tick_params(axis="x", rotation=20)
        for label in axes.get_xticklabels():
            label.set_horizontalalignment("right")  # a centred long name would run into the next one
    else:
        axes.set_xlabel("GMACs, % of dense, policy included")
        axes.legend(frameon=False)
    return drawn


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing, report."""
    args = check(read_flags(Args, argv, __doc__))
    args.prepare(not args.source.reads_files, ("table.md", "results.json"))
    seeds = range(args.seed, args.seed + args.seeds)
    jobs = [Job(variant, share, seed, args) for seed in seeds for share in args.shares for variant in args.variants]
    settings: dict[str, Any] = {name: getattr(args, name) for name in ("updates", "split", "images", "quick", "sites")}
    settings["source"] = str(asdict(args.source))
    # A function is written with its address, which is another one in every process.
    variants = re.sub(" at 0x[0-9a-f]+", "", str(VARIANTS))
    settings["variants"] = hashlib.sha256(variants.encode()).hexdigest()[:12]
    store = Store(args.output, settings, args.resume)
    run_all(jobs, store)
    rows = summarise(jobs, store)
    text = markdown([cells(row, args.variants[0]) for row in rows])
    replace_file(args.output / "table.md", (text + "\n").encode())
    replace_file(args.output / "results.csv", comma_separated(rows).encode())
    figure(rows, args).savefig(args.output / "accuracy.png", dpi=150)
    print(f"\n{text}\n\ntable.md, results.csv and accuracy.png are in {args.output}/")


if __name__ == "__main__":
    with explained(Args):
        main(sys.argv[1:])
