"""A policy fresh from training beside what it has to beat, at the GMACs that it uses: table, figures and summary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from vitprune_env.agents import AdaptivePolicy, MergePolicy, TrainResult, calibrate_threshold
from vitprune_env.baselines import EViT, RandomDrop, ToMe, ToMeShare, calibrate
from vitprune_env.baselines.registry import knob_of
from vitprune_env.benchmarking.contestants import Task, untrained_policies
from vitprune_env.benchmarking.images import Batches, shown_images
from vitprune_env.benchmarking.measurement import SHOWN, Row, Timing, game_of, measure
from vitprune_env.benchmarking.prepared import PreparedImages
from vitprune_env.benchmarking.store import versions
from vitprune_env.benchmarking.tables import markdown
from vitprune_env.data import data_config
from vitprune_env.engine.backbone import Backbone
from vitprune_env.files import PathLike, replace_file
from vitprune_env.game.rollout import play
from vitprune_env.game.token_game import TokenGame
from vitprune_env.plots.figures import learning_curve_figure, tokens_figure
from vitprune_env.plots.render import class_name, label_text
from vitprune_env.policy import KeepAll, Policy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BEFORE = "before playing"  # the row of what training started from
SIDE_BY_SIDE = 4  # panels of more sites than this leave room for one image per row
FEW = 32  # images of a batch that suffice to calibrate methods which keep the same number of tokens in every image


@dataclass(frozen=True)
class TrainingReport:
    """Rows of a comparison: dense, random, the rivals, the trained policy, then further ones."""

    rows: tuple[Row, ...]
    result: TrainResult
    test: Batches

    def table(self) -> str:
        """The comparison as markdown."""
        return comparison_table(self.rows)

    def summary(self) -> dict[str, Any]:
        """What other programs read."""
        dense, random = self.rows[:2]
        learned = next(row for row in self.rows if row.group == "learned")
        named = {"untrained_accuracy": "untrained", "evit_accuracy": "EViT"}
        named |= {"tome_accuracy": "ToMe", "start_accuracy": BEFORE}
        found = {key: row.accuracy for key, name in named.items() for row in self.rows if row.name.startswith(name)}
        return {
            "dense_accuracy": dense.accuracy,
            "accuracy": learned.accuracy,
            "random_accuracy": random.accuracy,
            **found,
            "dense_gmacs": dense.gmacs,
            "gmacs": learned.gmacs,
            "policy_gmacs": learned.policy_gmacs,
            "target_gmacs": self.result.target_macs / 1e9,
            "mac_ratio": learned.gmacs / dense.gmacs,
            "keep_per_site": learned.keep_per_site,
            "speedup": learned.speedup,
            "versions": versions(),
            "rows": [row.numbers() for row in self.rows],
        }

    def learning_curve(self) -> Figure:
        """How accuracy and cost went: of exploring play, and of held-out play as deployed where the run validated."""
        dense, history = self.rows[0], self.result.history
        columns = ([row[name] for row in history] for name in ("update", "accuracy", "share"))
        names = ("update", "validation_accuracy", "validation_share")
        held_out = [(row[names[0]], row[names[1]], row[names[2]]) for row in history if names[1] in row]
        return learning_curve_figure(
            *columns,
            references={"dense": dense.accuracy},
            label="exploring, training images",
            target=[row["target_share"] for row in history],
            held_out=held_out,
        )

    def save(self, folder: PathLike) -> None:
        """Write table.md, tokens.png and learning_curve.png.

        Raises:
            StorageError: if the folder cannot be written.
        """
        folder = Path(folder)
        replace_file(folder / "table.md", (self.table() + "\n").encode())
        figure = figure_of_tokens(self.result.backbone, self.result.policy, self.test)
        figure.savefig(folder / "tokens.png", dpi=150)
        self.learning_curve().savefig(folder / "learning_curve.png", dpi=150)


def compare_trained(
    result: TrainResult,
    backbone: Backbone,
    tune: Sequence[tuple[Tensor, Tensor]],
    test: Batches,
    *,
    name: str = "MAPPO",
    seed: int = 0,
    untrained_actors: int = 5,
    timing: Timing | None = None,
    start: MergePolicy | None = None,
) -> TrainingReport:
    """A trained policy beside the dense network, dropping at random, and rivals, at its own GMACs.

    A policy that drops is compared with untrained actors and EViT, one that merges with ToMe and with what it started
    from. All act at the sites of the trained policy. Beside a policy that costs more than the dense network, the others
    have the dense network's GMACs.

    Args:
        result: what `train` returned.
        backbone: the network that was given to it.
        tune: images to calibrate the others on.
        test: images to report on.
        name: of the trained policy's row.
        seed: of dropping at random and of the untrained actors.
        untrained_actors: how many of them to average.
        timing: how speed is measured; None: not at all.
        start: what a merging policy started from; None: no such row.
    """
    policy = result.policy
    sites = backbone.default_sites if policy.sites is None else policy.sites
    learned = measure(name, result.backbone, policy, test, sites=sites, timing=timing, group="learned")
    few = [(images[:FEW], labels[:FEW]) for images, labels in tune]
    images = PreparedImages(backbone, test), PreparedImages(backbone, tune)
    task = Task(backbone, *images, sites=sites, seed=seed, seeds=untrained_actors)
    dense = measure("dense", backbone, KeepAll(), test, sites=sites, group="control")
    budget = min(learned.gmacs, dense.gmacs)  # a policy that keeps nearly all costs more than dense, its own included
    random = calibrate(lambda rate: RandomDrop(rate, seed), budget, backbone, few, sites=sites)
    rows = [
        dense if timing is None else replace(dense, speedup=1.0),
        measure("random", backbone, random, test, sites=sites, timing=timing, group="control"),
    ]
    if isinstance(policy, MergePolicy):
        tome = calibrate(ToMe, budget, backbone, few, sites=sites, knob=knob_of(ToMe))
        share = calibrate(ToMeShare, budget, backbone, few, sites=sites)
        rows.append(measure("ToMe", backbone, tome, test, sites=sites, timing=timing))
        rows.append(measure("ToMe, the same share everywhere", backbone, share, test, sites=sites))
        if start is not None:
            rows.append(_before(start, task, budget, test, timing))
    else:
        controls = untrained_policies(task, budget, hidden=policy.actor.hidden)
        evit = calibrate(EViT, budget, backbone, few, sites=sites)
        untrained = f"untrained actor (mean of {untrained_actors})"
        rows.append(measure(untrained, backbone, controls, test, group="control"))
        rows.append(measure("EViT", backbone, evit, test, sites=sites, timing=timing))
    rows.append(learned)
    return TrainingReport((*rows, *_further_rows(result, test)), result, test)


def _before(start: MergePolicy, task: Task, budget: float, test: Batches, timing: Timing | None) -> Row:
    """What a merging policy started from, at the same budget."""
    game = TokenGame.for_policy(task.backbone, start)
    policy = calibrate_threshold(game, start, [images for images, _ in task.tune], 1e9 * budget)
    return measure(BEFORE, task.backbone, policy, test, timing=timing, group="control")


def _further_rows(result: TrainResult, test: Batches) -> list[Row]:
    """The fine-tuned network without pruning, and a policy for many budgets at other ones."""
    policy, backbone, rows = result.policy, result.backbone, []
    if policy.info.get("finetune", "off") != "off":
        rows.append(measure("fine-tuned, not pruned", backbone, KeepAll(), test))
    if isinstance(policy, AdaptivePolicy):
        others = [policy.at(share) for share in policy.shares]
        rows += [measure(f"the same at {100 * other.share:.0f} %", backbone, other, test) for other in others]
    return rows


def comparison_table(rows: Sequence[Row]) -> str:
    """Rows beside the first of them, the dense model, as a markdown table."""
    dense = rows[0].gmacs

    def cells(row: Row) -> dict[str, str]:
        return {
            "policy": row.name,
            "accuracy %": f"{100 * row.accuracy:.1f} ± {100 * row.stderr:.1f}",
            "GMACs": f"{row.gmacs:.5f}",
            "of dense %": f"{100 * row.gmacs / dense:.1f}",
            "without policy %": f"{100 * (row.gmacs - row.policy_gmacs) / dense:.1f}",
            "kept per site %": " / ".join(f"{100 * rate:.0f}" for rate in row.keep_per_site),
            "speed-up": "" if row.speedup is None else f"{row.speedup:.2f}x",
        }

    return markdown([cells(row) for row in rows])


def figure_of_tokens(backbone: Backbone, policy: Policy, test: Batches) -> Figure:
    """Eight images, of different classes where there are as many, and what is left of them after each site.

    Args:
        backbone: the network.
        policy: decides which tokens stay.
        test: labelled images, normalised; true classes are written beside them, and mistakes.
    """
    images, labels = shown_images(test, SHOWN)
    game = game_of(backbone, policy)
    episode = play(game, policy, images, labels)
    predicted = episode.outcome.logits.argmax(dim=1)
    names = backbone.class_names or getattr(test, "class_names", None)
    captions = [
        label_text(label, names) + ("" if guess == label else f"\nread as {class_name(guess, names)}")
        for label, guess in zip(labels.tolist(), predicted.tolist(), strict=True)
    ]
    sites = [site.label for site in game.sites]
    config = data_config(backbone)
    look = {"mean": config["mean"], "std": config["std"]}
    columns = 2 if len(sites) <= SIDE_BY_SIDE else 1
    return tokens_figure(images, episode.keep, backbone.grid_size, sites, titles=captions, columns=columns, **look)
