"""A policy fresh from training beside what it has to beat, at the GMACs that it uses: table, figures and summary."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor
from tqdm import tqdm

from vitprune_env.agents import AdaptivePolicy, MergePolicy, TokenPolicy, TrainResult, calibrate_threshold
from vitprune_env.baselines import EViT, RandomDrop, ToMe, ToMeShare, calibrate
from vitprune_env.baselines.registry import knob_of
from vitprune_env.baselines.ways_out import Leave
from vitprune_env.benchmarking.contestants import Contestant, Fits, Task, of_method, untrained_policies
from vitprune_env.benchmarking.images import Batches, Images, shown_images
from vitprune_env.benchmarking.measurement import SHOWN, Group, Row, Sites, Timing, game_of, measure
from vitprune_env.benchmarking.prepared import PreparedImages
from vitprune_env.benchmarking.result import accuracy_text
from vitprune_env.benchmarking.store import versions
from vitprune_env.benchmarking.tables import markdown
from vitprune_env.data import data_config
from vitprune_env.engine.backbone import Backbone
from vitprune_env.errors import BudgetError, EvidenceError
from vitprune_env.files import PathLike, replace_file
from vitprune_env.game.rollout import play
from vitprune_env.game.token_game import TokenGame
from vitprune_env.plots.figures import learning_curve_figure, tokens_figure
from vitprune_env.plots.render import class_name, label_text
from vitprune_env.policy import KeepAll, Policy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BEFORE = "before playing"  # the row of what training started from
BRIGHTNESS, ATTENTION, DISTILLED = "brightness", "class attention", "distilled attention"  # rows of rivals
LEAVING: Mapping[Leave, str] = {"drop": "", "merge": ", merging", "fuse": ", fusing"}  # ends of their names
WAY_OUT: Mapping[str, Leave] = {"keep_or_merge": "merge", "drop_merge_keep": "merge", "keep_or_fuse": "fuse"}
"""The way out of baselines beside a policy with these actions; with any others, tokens are dropped."""
Tune = Sequence[tuple[Tensor, Tensor]]
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
        dense = self.rows[0]
        learned = next(row for row in self.rows if row.group == "learned")
        named = {"random_accuracy": "random", "untrained_accuracy": "untrained", "evit_accuracy": "EViT"}
        named |= {"brightness_accuracy": BRIGHTNESS, "distilled_attention_accuracy": DISTILLED}
        named |= {"class_attention_accuracy": ATTENTION}
        named |= {"tome_accuracy": "ToMe", "start_accuracy": BEFORE}
        reached = [row for row in self.rows if not row.out_of_reach]
        found = {key: row.accuracy for key, name in named.items() for row in reached if row.name.startswith(name)}
        return {
            "dense_accuracy": dense.accuracy,
            "accuracy": learned.accuracy,
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
    tune: Tune,
    test: Batches,
    *,
    fit: Images | None = None,
    fits: Fits = Fits(),  # noqa: B008, frozen
    name: str = "MAPPO",
    seed: int = 0,
    untrained_actors: int = 5,
    timing: Timing | None = None,
    start: MergePolicy | None = None,
    progress: bool = False,
) -> TrainingReport:
    """A trained policy beside the dense network, dropping at random, and rivals, at its own GMACs.

    A policy that drops is compared with untrained actors, the brightness of patches, EViT, and scores that are fitted
    to the network's own late attention without labels; one that merges with ToMe and with what it started from. All
    act at the sites of the trained policy; where its tokens merge or are fused, so they are with those that choose
    tokens, and class attention is one more rival. Beside a policy that costs more than the dense network, the others
    have the dense network's GMACs. The table says so of a rival that cannot meet the budget, or needs evidence that the
    network does not have.

    Args:
        result: what `train` returned.
        backbone: the network that was given to it.
        tune: images to calibrate the others on.
        test: images to report on.
        fit: training images, for the scores that are fitted; None: no such row.
        fits: how long they are fitted.
        name: of the trained policy's row.
        seed: of dropping at random, of the untrained actors, and of what is fitted.
        untrained_actors: how many of them to average.
        timing: how speed is measured; None: not at all.
        start: what a merging policy started from; None: no such row.
        progress: whether to show progress bars.
    """
    policy = result.policy
    sites = backbone.default_sites if policy.sites is None else policy.sites
    images = PreparedImages(backbone, test), PreparedImages(backbone, tune)
    task = Task(backbone, *images, fit, sites=sites, seed=seed, seeds=untrained_actors, fits=fits, progress=progress)
    rivals = _merging(task, tune, start) if isinstance(policy, MergePolicy) else _choosing(policy, task, tune)
    with tqdm(total=len(rivals) + 2, desc="compare", unit="row", disable=not progress) as bar:
        bar.set_postfix_str(name)
        learned = measure(name, result.backbone, policy, test, sites=sites, timing=timing, group="learned")
        bar.update()
        dense = measure("dense", backbone, KeepAll(), test, sites=sites, group="control")
        bar.update()
        rows = [dense if timing is None else replace(dense, speedup=1.0)]
        budget = min(learned.gmacs, dense.gmacs)  # keeping nearly all costs more than dense, the policy included
        for rival in rivals:
            bar.set_postfix_str(rival.name)
            rows.append(_row(rival, task, budget, timing))
            bar.update()
    return TrainingReport((*rows, learned, *_further_rows(result, test)), result, test)


def _choosing(policy: TokenPolicy, task: Task, tune: Tune) -> list[Contestant]:
    """The rivals of a policy that chooses tokens; those that it does not keep have the same way out with all of them.

    EViT has its own. Where another one is given, class attention with that stands beside it.
    """
    leave = WAY_OUT.get(policy.actions.name, "drop")

    def untrained(task: Task, budget: float) -> list[Policy]:
        return untrained_policies(task, budget, policy.actions, hidden=policy.actor.hidden)

    def registered(name: str, method: str) -> Contestant:
        return replace(of_method(method, f"{method}:leave={leave}")[0], name=name + LEAVING[leave])

    rivals = [
        _calibrated("random" + LEAVING[leave], lambda rate: RandomDrop(rate, task.seed, leave), tune, "control"),
        Contestant(f"untrained actor (mean of {task.seeds})", "control", untrained, _trained_sites),
        registered(BRIGHTNESS, "brightness"),
        _calibrated("EViT", EViT, tune),
    ]
    if leave != "drop":
        rivals.append(registered(ATTENTION, "tri_level"))
    return rivals if task.fit is None else [*rivals, registered(DISTILLED, "distilled_attention")]


def _merging(task: Task, tune: Tune, start: MergePolicy | None) -> list[Contestant]:
    """The rivals of a policy that merges pairs, and what it started from."""
    rivals = [
        _calibrated("random", lambda rate: RandomDrop(rate, task.seed), tune, "control"),
        _calibrated("ToMe", ToMe, tune),
        _calibrated("ToMe, the same share everywhere", ToMeShare, tune),
    ]
    if start is None:
        return rivals

    def before(task: Task, budget: float) -> list[Policy]:
        game = TokenGame.for_policy(task.backbone, start)
        return [calibrate_threshold(game, start, [images for images, _ in task.tune], 1e9 * budget)]

    return [*rivals, Contestant(BEFORE, "control", before, lambda _: None)]


def _trained_sites(task: Task) -> Sites:
    """Where the trained policy acts."""
    return task.where(task.backbone.default_sites, task.backbone.default_sites)


def _calibrated(name: str, make: Callable[..., Policy], tune: Tune, group: Group = "baseline") -> Contestant:
    """A method that keeps the same number of tokens in every image, so that few images calibrate it."""
    few = [(images[:FEW], labels[:FEW]) for images, labels in tune]

    def at(task: Task, budget: float) -> list[Policy]:
        return [calibrate(make, budget, task.backbone, few, sites=_trained_sites(task), knob=knob_of(make))]

    return Contestant(name, group, at, _trained_sites)


def _row(rival: Contestant, task: Task, budget: float, timing: Timing | None) -> Row:
    """A rival at the budget; the speed of several runs is not measured."""
    task.notes.clear()
    try:
        policies = rival.at(task, budget)
        timing = timing if len(policies) == 1 else None
        facts: dict[str, Any] = {"sites": rival.sites(task), "timing": timing, "group": rival.group}
        return measure(rival.name, task.backbone, policies, task.test, setting=", ".join(task.notes), **facts)
    except (BudgetError, EvidenceError) as error:
        return Row(rival.name, rival.group, out_of_reach=str(error))


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
    """Rows beside the first of them, the dense model, as a markdown table; accuracies with their 95 % intervals."""
    dense = rows[0].gmacs

    def cells(row: Row) -> dict[str, str]:
        return {
            "policy": row.name,
            "accuracy % (95 %)": accuracy_text(row),
            "GMACs": f"{row.gmacs:.5f}",
            "of dense %": f"{100 * row.gmacs / dense:.1f}",
            "without policy %": f"{100 * (row.gmacs - row.policy_gmacs) / dense:.1f}",
            "kept per site %": " / ".join(f"{100 * rate:.0f}" for rate in row.keep_per_site),
            "speed-up": "" if row.speedup is None else f"{row.speedup:.2f}x",
        }

    blank = dict.fromkeys(cells(rows[0]), "")
    return markdown(
        [
            {**blank, "policy": row.name, "accuracy % (95 %)": "out of reach"} if row.out_of_reach else cells(row)
            for row in rows
        ]
    )


def figure_of_tokens(
    backbone: Backbone, policy: Policy, test: Batches, sites: Sites | Literal["published"] | None = None
) -> Figure:
    """Eight images, of different classes where there are as many, and what is left of them after each site.

    Args:
        backbone: the network.
        policy: decides which tokens stay.
        test: labelled images, normalised; true classes are written beside them, and mistakes.
        sites: where it acts, see `Backbone.sites_for`.
    """
    images, labels = shown_images(test, SHOWN)
    game = game_of(backbone, policy, sites)
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
