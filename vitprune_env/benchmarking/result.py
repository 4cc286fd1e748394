"""What a benchmark found: tables, figures and files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median_high
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vitprune_env.benchmarking.contestants.task import PUBLISHED
from vitprune_env.benchmarking.intervals import difference
from vitprune_env.benchmarking.measurement import Row
from vitprune_env.benchmarking.store import RESULTS, json_text, read_results, results_content, sealed
from vitprune_env.benchmarking.tables import booktabs, comma_separated, escape, markdown
from vitprune_env.files import PathLike, read_file, replace_file, write_file
from vitprune_env.plots.figures import fates_figure, save_figure
from vitprune_env.plots.pareto import Point, best_of, pareto_figure
from vitprune_env.types import Site, every_block

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCENES = "scenes.safetensors"
MAX_NAMED_SITES = 3
MAX_METHODS = 8  # in a figure of tokens
SPEED = ("images/s, dense's", "speed-up")  # columns that are left out where nothing was timed
SITES_TEXT = {
    "backbone": "the network's own; inside every block for methods that act there",
    "published": "those of each paper, at the same share of the depth",
    "both": "the network's own, or inside every block for methods that act there; a second row at the published sites",
}


@dataclass(frozen=True)
class Scenes:
    """The images whose tokens are drawn: `[B, C, H, W]`, labels `[B]`, how they were normalised, names of classes."""

    images: Tensor
    labels: Tensor
    grid_size: tuple[int, int]
    mean: Sequence[float]
    std: Sequence[float]
    class_names: Sequence[str] | None = None

    def write(self, path: Path) -> None:
        """Write them to a file for `read`.

        Raises:
            StorageError: if it cannot be written.
        """
        look = {name: getattr(self, name) for name in ("grid_size", "mean", "std", "class_names")}
        header = {name: value if value is None else list(value) for name, value in look.items()}
        tensors = {"images": self.images.contiguous(), "labels": self.labels}
        write_file(path, tensors, {"format": 1, "kind": "scenes", **header})

    @classmethod
    def read(cls, path: Path) -> Scenes:
        """What `write` wrote.

        Raises:
            CheckpointError: if the file is damaged or something else.
        """
        tensors, header = read_file(path, "scenes", {1: ("scenes",)})
        rows, columns = header["grid_size"]
        return cls(
            **tensors, grid_size=(rows, columns), **{name: header[name] for name in ("mean", "std", "class_names")}
        )


@dataclass(frozen=True)
class BenchmarkResult:
    """Policies at the same mean GMACs, and the dense model.

    Attributes:
        rows: one per policy and budget; the first is the dense model.
        settings: what the numbers depend on.
        scenes: a few of the images, for `plot_tokens`; None for results read from a results.json alone.
        about: what else is known of the run: command, processor, threads, versions.
    """

    rows: tuple[Row, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    scenes: Scenes | None = None
    about: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        """What `print` and notebooks show: the tables, not every token of every image."""
        return self.table()

    @classmethod
    def load(cls, path: PathLike) -> BenchmarkResult:
        """Read what `save`, `json` or a run with `output` wrote; nothing is measured.

        Args:
            path: the folder, with the images of the token figures if there are any, or the results.json alone.

        Raises:
            CheckpointError: if a file cannot be read.
        """
        path = Path(path)
        scenes = path / SCENES if path.is_dir() else None
        settings, about, rows = read_results(path / RESULTS if path.is_dir() else path)
        read = Scenes.read(scenes) if scenes is not None and scenes.is_file() else None
        return cls(tuple(rows), settings, read, about)

    @property
    def dense(self) -> Row:
        """The unpruned network."""
        return next(row for row in self.rows if row.name == "dense")

    @property
    def shares(self) -> list[float]:
        """Budgets, as shares of the dense GMACs."""
        return sorted({row.share for row in self.rows if row.share is not None})

    @property
    def title(self) -> str:
        """What was compared on what."""
        split = self.settings.get("split", "")
        return f"{self.settings.get('backbone', '')}, {self._count()} {split} images".replace("  ", " ").strip(", ")

    def row(self, name: str, share: float | None = None) -> Row:
        """The row of a policy at a budget (None: the only one that it has).

        Raises:
            KeyError: for a row that is not there.
        """
        found = [row for row in self.rows if row.name == name and (share is None or row.share == share)]
        if len(found) != 1:
            raise KeyError(
                f"name: expected one of {[(row.name, row.share) for row in self.rows]}, got {name!r}, {share}"
            )
        return found[0]

    def at(self, share: float | None) -> list[Row]:
        """The rows of a budget that have numbers, the most accurate first."""
        rows = [row for row in self.rows if row.share == share and row.correct and row.name != "dense"]
        return sorted(rows, key=lambda row: -row.accuracy)

    def table(self) -> str:
        """One markdown table per budget, the most accurate first; controls in italics."""
        parts = []
        for share in self.shares:
            parts.append(f"### {share:.0%} of the dense GMACs ({share * self.dense.gmacs:.5f})\n")
            parts += self._table(share)
        if self.at(None):
            parts += ["### At a cost of their own\n", *self._table(None)]
        return "\n".join(parts).replace("\n\n\n", "\n\n").strip() + "\n"

    def report(self) -> str:
        """What was run, on what and how, and the tables: a page for `docs/results`."""
        head = [f"# {self.title}", ""]
        if self.about.get("command"):
            head += ["```bash", str(self.about["command"]), "```", ""]
        head += [*(f"- {name}: {value}" for name, value in self._facts().items()), ""]
        return "\n".join(head) + "\n" + self.table()

    def _facts(self) -> dict[str, str]:
        """What the numbers depend on, in words."""
        found = {**self.settings, **self.about}
        words = {
            "network": f"{found.get('backbone')}, weights {found.get('weights')}, dense {self.dense.gmacs:.5g} GMACs",
            "images": f"{self._count()} {found.get('split', '')} images ({found.get('images')}), calibrated on "
            f"{found.get('tune_images')} training images",
            "sites": SITES_TEXT.get(str(found.get("sites")), f"{found.get('sites')}"),
            "trained methods": self._fits_text(),
            "random methods": f"{found.get('seeds')} seeds from {found.get('seed')} on",
            "intervals": "95 %; of an accuracy Wilson's, of a difference a paired bootstrap over "
            f"{self._drawn()} and seeds",
            "machine": f"{found.get('processor')}, {found.get('threads')} threads, {found.get('precision')}",
            "versions": ", ".join(f"{name} {version}" for name, version in found.get("versions", {}).items()),
        }
        return {name: " ".join(text.split()) for name, text in words.items()}

    def _fits_text(self) -> str:
        fits = self.settings.get("fits") or {}
        steps = f"{fits['steps']} steps" if fits.get("steps") else "each method's own number of steps"
        if fits.get("budgets") != "middle":
            return f"trained for each budget, {steps}"
        return f"trained once, for {median_high(self.shares):.0%}, and turned to the other budgets; {steps}"

    def _count(self) -> int:
        return len(self.dense.correct[0]) if self.dense.correct else 0

    def _drawn(self) -> str:
        """What varies independently, in words."""
        groups = self.dense.groups if self.dense.correct else None
        return (
            "images" if groups is None else f"the {len(set(groups.tolist()))} groups of images with the same original"
        )

    def _table(self, share: float | None) -> list[str]:
        rows = self.at(share)
        rivals = [next((row for row in rows if row.name == "random"), None)]
        methods = [row for row in rows if row.group != "control"]
        rivals += methods[:1] if len(methods) > 1 else []  # the best one, where there is another to compare
        missing = [row for row in self.rows if row.share == share and row.out_of_reach]
        cells = [self._cells(row, rivals) for row in (self.dense, *rows)]
        if not any(row.speedup for row in rows):  # nothing was timed
            cells = [{name: text for name, text in line.items() if name not in SPEED} for line in cells]
        lines = [markdown(cells), ""]
        return [*lines, *(f"- {row.name}: {row.out_of_reach}" for row in missing), ""]

    def _cells(self, row: Row, rivals: Sequence[Row | None]) -> dict[str, str]:
        over = {f"over {rival.name} (95 %)": gain_text(row, rival) for rival in rivals if rival is not None}
        speed = "" if row.images_per_s is None else f"{row.images_per_s:.0f} / {row.dense_images_per_s:.0f}"
        return {
            "method": f"*{row.name}*" if row.group == "control" else row.name,
            "sites": "" if row.name == "dense" else sites_text(row.sites, self.settings.get("depth")),
            "accuracy % (95 %)": accuracy_text(row),
            **over,
            "GMACs": f"{row.gmacs:.5f}",
            "of dense %": f"{100 * row.gmacs / self.dense.gmacs:.1f}",
            "decision %": f"{100 * row.policy_gmacs / self.dense.gmacs:.1f}",
            "kept per site %": " / ".join(f"{100 * rate:.0f}" for rate in row.keep_per_site),
            SPEED[0]: speed,
            SPEED[1]: "" if row.speedup is None else f"{row.speedup:.2f}x",
        }

    def csv(self, path: PathLike | None = None) -> str:
        """All numbers as CSV, one line per policy and budget; written to a file if a path is given."""
        rows = [
            {
                **row.numbers(),
                "keep_per_site": " ".join(f"{rate:.4f}" for rate in row.keep_per_site),
                "sites": " ".join(row.sites),
            }
            for row in self.rows
        ]
        return _written(comma_separated(rows), path)

    def json(self, path: PathLike | None = None) -> str:
        """Everything as JSON, for `load`; written to a file if a path is given."""
        return _written(json_text(sealed(results_content(self.settings, list(self.rows), self.about))), path)

    def latex(self, path: PathLike | None = None) -> str:
        """A booktabs table: a line per policy, a column per budget with accuracy and interval in per cent.

        The most accurate policy of each budget is bold, controls are italic. The last line says what the numbers are.
        Written to a file if a path is given.
        """
        best = {share: max((row.accuracy for row in self.at(share) if row.group != "control"), default=2.0)
                for share in self.shares}  # fmt: skip

        def cell(name: str, share: float) -> str:
            row = next((row for row in self.at(share) if row.name == name), None)
            if row is None:
                return "--"
            low, high = (f"{100 * end:.1f}" for end in row.interval)
            accuracy = f"{100 * row.accuracy:.1f}"
            if row.group != "control" and row.accuracy == best[share]:
                accuracy = rf"\textbf{{{accuracy}}}"
            return rf"{accuracy} {{\scriptsize ({low}--{high})}}"

        def line(row: Row) -> list[str]:
            name = escape(row.name)
            name = rf"\emph{{{name}}}" if row.group == "control" else name
            return [
                name,
                escape(self._places(row.name)),
                *(cell(row.name, share) for share in self.shares),
            ]

        first = {row.name: row for row in self.rows if row.name != "dense" and row.share is not None}
        low, high = (f"{100 * end:.1f}" for end in self.dense.interval)
        dense = rf"{100 * self.dense.accuracy:.1f} {{\scriptsize ({low}--{high})}}"
        groups = [
            [[r"\emph{dense}", "", *[dense] * len(self.shares)]],
            [line(row) for row in first.values() if row.group == "control"],
            [line(row) for row in first.values() if row.group != "control"],
        ]
        columns = [rf"{100 * share:g}\,\% ({share * self.dense.gmacs:.3g} GMACs)" for share in self.shares]
        note = (
            r"Accuracy in per cent with its 95\,\% interval, at mean costs per image as shares of the dense network's."
        )
        return _written(booktabs(groups, ["policy", "sites", *columns], note), path)

    def _places(self, name: str) -> str:
        """Where a policy acts, with the budgets where that depends on them."""
        depth = self.settings.get("depth")
        rows = [row for share in self.shares for row in self.at(share) if row.name == name]
        places: dict[str, list[str]] = {}
        for row in rows:
            places.setdefault(sites_text(row.sites, depth), []).append(f"{100 * (row.share or 0):g}")
        alone = len(places) == 1
        return "; ".join(where if alone else f"{where} ({', '.join(at)} %)" for where, at in places.items())

    def plot(self) -> Figure:
        """Accuracy over GMACs of all policies, at most eight of them in colour, and the front."""
        controls = {row.name for row in self.rows if row.group == "control"}
        return pareto_figure(
            self._lines(),
            ("dense", self.dense.accuracy),
            controls,
            self.title,
            ours=self._ours(),
            shown=self.shown(),
        )

    def shown(self) -> list[str]:
        """The policies that figures show: trained ones and the user's own, then the most accurate on average.

        Eight at most; neither controls nor second rows at published sites.
        """
        second = {row.name for row in self.rows if row.group == "control" or row.name.endswith(PUBLISHED)}
        return best_of({name: line for name, line in self._lines().items() if name not in second}, self._ours())

    def _ours(self) -> set[str]:
        return {row.name for row in self.rows if row.group in ("learned", "own")}

    def _lines(self) -> dict[str, list[Point]]:
        lines: dict[str, list[Point]] = {}
        for row in self.rows:
            if row.correct and row.name != "dense":
                point = Point(row.gmacs / self.dense.gmacs, row.accuracy, *row.interval)
                lines.setdefault(row.name, []).append(point)
        return lines

    def plot_tokens(self, share: float) -> Figure:
        """What dropping at random and the first policies of `shown`, eight in all, leave of images at one budget.

        Raises:
            ValueError: for results that were read from a results.json alone, which has no images.
        """
        if self.scenes is None:
            raise ValueError("scenes: expected a result with images, got one that was read from a file")
        names = ["random", *self.shown()][:MAX_METHODS]
        shown = [row for row in self.at(share) if row.source and row.name in names]
        return fates_figure(
            self.scenes.images,
            {row.name: torch.tensor(row.source) for row in shown},
            self.scenes.grid_size,
            labels=self.scenes.labels.tolist(),
            predicted={row.name: row.predicted for row in shown},
            mean=self.scenes.mean,
            std=self.scenes.std,
            class_names=self.scenes.class_names,
        )

    def save(self, folder: PathLike) -> None:
        """Write table.md, table.tex, results.csv, results.json, and as PNG and PDF pareto and tokens for each budget.

        The images of the token figures are written to scenes.safetensors, so that `load` can draw them again.

        Raises:
            StorageError: if the folder cannot be written.
        """
        folder = Path(folder)
        _written(self.report(), folder / "table.md")
        self.latex(folder / "table.tex")
        self.csv(folder / "results.csv")
        self.json(folder / RESULTS)
        if self.scenes is not None:
            self.scenes.write(folder / SCENES)
        if any(row.correct for row in self.rows if row.name != "dense"):
            save_figure(self.plot(), folder / "pareto")
        for share in self.shares:
            if self.scenes is not None and self.at(share):
                save_figure(self.plot_tokens(share), folder / f"tokens-{100 * share:g}")


def accuracy_text(row: Row) -> str:
    """The accuracy of a row in per cent, with its 95 % interval where there is one."""
    low, high = row.interval
    interval = "" if math.isnan(low) else f" ({100 * low:.1f} to {100 * high:.1f})"
    return f"{100 * row.accuracy:.1f}{interval}"


def gain_text(row: Row, rival: Row) -> str:
    """By how many points a row is more accurate than another, with the 95 % interval."""
    if row.name in ("dense", rival.name) or row.name == "random":
        return ""
    points, low, high = (100 * value for value in difference(row.marks, rival.marks, groups=row.groups))
    return f"{points:+.1f} ({low:+.1f} to {high:+.1f})"


def sites_text(sites: Sequence[str], depth: int | None = None) -> str:
    """Where a policy acts, in few words."""
    if depth is not None and tuple(sites) == tuple(every_block(depth)):
        return "in every block"
    halves = [Site.parse(site).half for site in sites]
    is_run = all(later - earlier == 2 for earlier, later in pairwise(halves))
    return f"{sites[0]} to {sites[-1]}" if is_run and len(sites) > MAX_NAMED_SITES else ", ".join(sites)


def _written(text: str, path: PathLike | None) -> str:
    if path is not None:
        replace_file(Path(path), text.encode())
    return text
