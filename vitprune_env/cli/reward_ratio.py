"""Train with RL4EViT's reward at several ratios of its weights, and draw how much is kept (RL4EViT, Fig. 3).

    vitprune reward-ratio                                              # the ratios that the paper prints
    vitprune reward-ratio --ratios 0.3 0.6 --forms kept printed        # beside Eq. 1 and 2 as printed
    vitprune reward-ratio --preset rl4evit-printed --forms printed     # to the letter
    vitprune reward-ratio --data-dir DIR --model NAME --weights FILE   # photographs, and a network of your own
    vitprune reward-ratio --resume                                     # only what is missing

There is no budget: the ratio alone decides. Every other flag is one of `vitprune train`. The output folder holds
table.md, results.csv, reward_ratio.png, and a folder per run.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any, ClassVar, Literal

import numpy as np
import tyro
from matplotlib.figure import Figure
from tqdm import tqdm

from vitprune_env.agents import Budget, Equilibrium, Preset, TrainResult
from vitprune_env.agents import train as train_policy
from vitprune_env.benchmarking.measurement import Row, measure
from vitprune_env.benchmarking.store import Store
from vitprune_env.benchmarking.tables import comma_separated, markdown
from vitprune_env.cli import train
from vitprune_env.cli.flags import ResumableFlags
from vitprune_env.cli.flags.training import OUTCOMES, values_of
from vitprune_env.engine.backbone import Backbone
from vitprune_env.errors import SettingsError
from vitprune_env.files import replace_file
from vitprune_env.game.rewards import OutcomeFn, PaperReward
from vitprune_env.policy import KeepAll

FIGURE_3 = (0.56, 0.64, 0.72, 0.8, 0.88)
LABELS = {"kept": "paid to kept tokens, times N", "printed": "as printed"}

Form = Literal["kept", "printed"]


@dataclass(frozen=True)
class Args(train.Args):
    """Train at several ratios of the two weights of RL4EViT's reward."""

    ratios: tuple[float, ...] = FIGURE_3
    """Ratios: outcome bonus over cost of keeping for `kept`, alpha / beta for `printed`."""
    forms: tuple[Form, ...] = ("kept",)
    """Eq. 2 times N, paid to kept tokens; or as printed: gamma / n, paid to every agent."""
    common: ResumableFlags = field(default_factory=lambda: ResumableFlags(output=Path("runs/reward_ratio")))
    untrained_actors: tyro.conf.Suppress[int] = 0
    results: ClassVar[tuple[str, ...]] = ("table.md", "results.json")
    validate_scenes_every: ClassVar[int] = 0

    @property
    def run_name(self) -> str:
        """The command's own."""
        return "reward_ratio"

    def run(self, form: Form, ratio: float) -> Preset:
        """The settings of one run."""
        outcome = OUTCOMES[self.training.reward.outcome]
        budget = Equilibrium(**values_of(self.training.budget, Budget))
        return replace(self.settings, budget=budget, reward=reward_of(form, ratio, outcome))


def reward_of(form: Form, ratio: float, outcome: OutcomeFn) -> PaperReward:
    """The reward with these weights."""
    if form == "kept":
        return PaperReward(keep_cost=1 / ratio, outcome_bonus=1.0, outcome=outcome)
    return PaperReward(keep_cost=ratio, outcome_bonus=1.0, outcome=outcome, scaled=False, pay="all")


def check(args: Args) -> Args:
    """The flags, made small if asked for.

    Raises:
        SettingsError: for ratios that are not above 0, or a budget beside them.
    """
    if not args.ratios or not all(ratio > 0 for ratio in args.ratios):
        raise SettingsError(f"ratios: expected numbers above 0, got {args.ratios}")
    if args.training.budget.is_given:
        raise SettingsError("ratios: expected no budget beside them, because the ratio decides how much is kept")
    args = replace(args, ratios=args.ratios[:2]) if args.common.quick else args
    for form in args.forms:
        settings = args.run(form, args.ratios[0])
        assert settings.budget is not None
        assert settings.reward is not None
        settings.learner.check_reward(settings.reward)
        settings.budget.check_fit(settings.reward)
    return args


def name_of(form: Form, ratio: float, play: Literal["exploring", "deployed"]) -> str:
    """Of a row in results.json."""
    return f"{form} {ratio:g}, {play}"


def run(args: Args, form: Form, ratio: float, backbone: Backbone, task: train.Task) -> list[Row]:
    """Train at one ratio, then measure exploring and deployed play on held-out images; an error becomes the rows."""
    start = time.perf_counter()
    names = name_of(form, ratio, "exploring"), name_of(form, ratio, "deployed")
    try:
        result: TrainResult = train_policy(
            backbone,
            task.training,
            calibration=task.calibration,
            validation=task.validation,
            **args.run(form, ratio).arguments,
            output=args.common.output / f"{form}_{ratio:g}",
            device=args.common.device,
            resume=args.common.resume,
            overwrite=not args.common.resume,  # a folder that may not be replaced was refused at the start
        )
        policies = result.policy.sampling(args.common.seed), result.policy
        rows = [measure(name, result.backbone, each, task.test) for name, each in zip(names, policies, strict=True)]
    except ValueError as error:  # the other ratios are still worth their table
        rows = [Row(name, out_of_reach=str(error)) for name in names]
    return [replace(row, seconds=time.perf_counter() - start) for row in rows]


def summarise(args: Args, store: Store, backbone: Backbone) -> list[dict[str, Any]]:
    """One line per form and ratio, fractions of 1; None where a run failed."""
    lines = []
    dense = store.find("dense", None)
    assert dense is not None
    for form in args.forms:
        for ratio in args.ratios:
            exploring = store.find(name_of(form, ratio, "exploring"), None)
            deployed = store.find(name_of(form, ratio, "deployed"), None)
            assert exploring is not None
            assert deployed is not None
            line: dict[str, Any] = {"form": form, "ratio": ratio, "error": deployed.out_of_reach}
            numbers = ("predicted", "kept_exploring", "kept_deployed", "share_exploring", "share_deployed",
                       "accuracy_exploring", "accuracy_deployed")  # fmt: skip
            line |= dict.fromkeys(numbers)
            if not deployed.out_of_reach:
                reward = reward_of(form, ratio, OUTCOMES[args.training.reward.outcome])
                line["predicted"] = reward.equilibrium(exploring.accuracy, backbone.num_patches)
                for play, row in (("exploring", exploring), ("deployed", deployed)):
                    line[f"kept_{play}"] = mean(row.keep_per_site)
                    line[f"share_{play}"] = row.gmacs / dense.gmacs
                    line[f"accuracy_{play}"] = row.accuracy
            lines.append({**line, "dense_accuracy": dense.accuracy, "seconds": deployed.seconds})
    return lines


def table(lines: Sequence[dict[str, Any]]) -> str:
    """The lines as markdown."""

    def percent(*values: float | None) -> str:
        return " / ".join("" if value is None else f"{100 * value:.1f}" for value in values)

    def cells(line: dict[str, Any]) -> dict[str, str]:
        return {
            "reward": LABELS[line["form"]],
            "ratio": f"{line['ratio']:g}",
            "predicted kept %": percent(line["predicted"]),
            **{
                f"{what} %, exploring / deployed": percent(line[f"{key}_exploring"], line[f"{key}_deployed"])
                for what, key in (("kept", "kept"), ("of dense", "share"), ("accuracy", "accuracy"))
            },
            "s": f"{line['seconds']:.0f}",
            "": line["error"].replace("|", "/"),
        }

    return markdown([cells(line) for line in lines])


def figure(lines: Sequence[dict[str, Any]]) -> Figure:
    """How much is kept, what it costs and what it classifies correctly, over the ratio."""
    drawn = Figure(figsize=(11.0, 3.8), layout="constrained")
    panels = drawn.subplots(1, 3)
    keys = {"kept": "tokens kept %, mean over the sites", "share": "GMACs, % of dense", "accuracy": "accuracy %"}
    for axes, (key, label) in zip(panels, keys.items(), strict=True):
        for number, form in enumerate(dict.fromkeys(line["form"] for line in lines)):
            own = [line for line in lines if line["form"] == form]
            curves = {f"{key}_deployed": "o-", f"{key}_exploring": "x"}
            if key == "kept":
                curves["predicted"] = "--"
            for name, style in curves.items():
                values = [np.nan if line[name] is None else 100 * line[name] for line in own]
                what = name.removeprefix(f"{key}_")
                axes.plot([line["ratio"] for line in own], values, style, color=f"C{number}",
                          label=f"{LABELS[form]}: {what}", markersize=7 if style == "x" else 5)  # fmt: skip
        if key == "accuracy":
            axes.axhline(100 * lines[0]["dense_accuracy"], color="grey", linestyle=":", label="dense")
        axes.set_xlabel("ratio of the weights")
        axes.set_ylabel(label)
        axes.set_ylim(-2, max(102, axes.get_ylim()[1]))  # a large policy may cost more than dense
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
    handles, names = panels[0].get_legend_handles_labels()
    more, others = panels[2].get_legend_handles_labels()
    drawn.legend(handles + more[-1:], names + others[-1:], loc="outside lower center", ncols=3, frameon=False)
    return drawn


def main(argv: Sequence[str] | None = None) -> None:
    """Train what is missing, report."""
    args = check(train.parse(argv, "vitprune reward-ratio", __doc__, Args()))
    args = args.on(args.common.device, is_main=True)
    output = args.common.output
    backbone = args.images.network(args.common.seed, args.common.device)
    task = train.open_task(args, backbone)
    settings = {name: str(value) for name, value in {**vars(args.settings), **vars(args.images)}.items()}
    settings |= {"budget": str(args.training.budget), "split": args.split, "test_images": args.test_images}
    store = Store(output, settings, args.common.resume)
    if store.find("dense", None) is None:
        store.add(measure("dense", backbone, KeepAll(), task.test))
    jobs: list[tuple[Form, float]] = [(form, ratio) for form in args.forms for ratio in args.ratios]
    with tqdm(jobs, unit="run") as bar:
        for form, ratio in bar:
            bar.set_description(f"{form} {ratio:g}")
            done = store.find(name_of(form, ratio, "deployed"), None)
            if done is None or done.out_of_reach:
                for row in run(args, form, ratio, backbone, task):
                    store.add(row)
    lines = summarise(args, store, backbone)
    text = table(lines)
    replace_file(output / "table.md", (text + "\n").encode())
    replace_file(output / "results.csv", comma_separated(lines).encode())
    figure(lines).savefig(output / "reward_ratio.png", dpi=150)
    print(f"\n{text}\n\ntable.md, results.csv and reward_ratio.png are in {output}/")
