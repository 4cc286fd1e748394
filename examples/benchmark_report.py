"""Results of the benchmark on disk, and as tables and figures."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from benchmark_measure import SHOWN, Result, difference, flat, interval
from benchmark_players import Task
from common import versions, write_json
from vitprune_env.data import data_config
from vitprune_env.errors import CheckpointError
from vitprune_env.plots.figures import Point, fates_figure, pareto_figure

RESULTS = "results.json"


class Store:
    """Results of one set of settings, written after each, so that an interrupted run goes on where it stopped.

    Args:
        output: folder.
        settings: what the numbers depend on; results of other settings are not mixed with these.
        resume: whether to keep what is there.

    Raises:
        CheckpointError: if what is there cannot be read or was made with other settings.
    """

    def __init__(self, output: Path, settings: dict[str, Any], resume: bool) -> None:
        self.path, self.settings = output / RESULTS, json.loads(json.dumps(settings))
        self.results: list[Result] = []
        if not resume or not self.path.is_file():
            return
        try:
            found = json.loads(self.path.read_text())
            other = [name for name, value in self.settings.items() if found["settings"].get(name) != value]
            self.results = [Result.load(row) for row in found["results"]]
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{self.path}: expected results of the benchmark, got something else") from error
        if other:
            was = ", ".join(f"{name} {found['settings'].get(name)!r} (now {settings[name]!r})" for name in other)
            raise CheckpointError(f"{self.path}: expected results of the same settings to resume, got other {was}")

    def find(self, method: str, share: float, origin: str) -> Result | None:
        """A result that is there already."""
        key = (method, share, origin)
        return next((row for row in self.results if (row.method, row.share, row.origin) == key), None)

    def add(self, result: Result) -> None:
        """Keep a result; it replaces one of the same method and budget."""
        key = (result.method, result.share)
        self.results = [row for row in self.results if (row.method, row.share) != key] + [result]
        rows = [asdict(row) for row in self.results]
        write_json(self.path, {"settings": self.settings, "versions": versions(), "results": rows})


def tables(results: Sequence[Result], dense_gmacs: float) -> str:
    """One markdown table per budget, the most accurate first; controls in italics."""
    dense = [row for row in results if row.method == "dense"]
    parts = []
    for share in sorted({row.share for row in results if row.method != "dense"}):
        rows = sorted((row for row in results if row.share == share and row.correct), key=lambda row: -row.accuracy)
        random = next((row for row in rows if row.method == "random"), None)
        parts += [
            f"### {share:.0%} of the dense GMACs ({share * dense_gmacs:.5f})\n",
            "| method | accuracy % (95 %) | over random (95 %) | GMACs | of dense % | decision % "
            "| kept per site % | images/s | speed-up |",
            "|---|---|---|---|---|---|---|---|---|",
            *(_line(row, random, dense_gmacs) for row in (*dense, *rows)),
            "",
            *(f"- {row.method}: {row.out_of_reach}" for row in results if row.share == share and row.out_of_reach),
            "",
        ]
    return "\n".join(parts).replace("\n\n\n", "\n\n").strip() + "\n"


def _line(row: Result, random: Result | None, dense_gmacs: float) -> str:
    low, high = interval(row.table)
    name = f"*{row.method}*" if row.group == "control" else row.method
    gain = ""
    if random is not None and row.method not in ("dense", "random"):
        points, least, most = (100 * value for value in difference(row.table, random.table))
        gain = f"{points:+.1f} ({least:+.1f} to {most:+.1f})"
    kept = " / ".join(f"{100 * rate:.0f}" for rate in row.keep_per_site)
    return (
        f"| {name} | {100 * row.accuracy:.1f} ({100 * low:.1f} to {100 * high:.1f}) | {gain} | {row.gmacs:.5f} "
        f"| {100 * row.gmacs / dense_gmacs:.1f} | {100 * row.policy_gmacs / dense_gmacs:.1f} | {kept} "
        f"| {row.images_per_s:.0f} | {row.speedup:.2f}x |"
    )


def write_csv(results: Sequence[Result], path: Path) -> None:
    """One line per method and budget."""
    rows = [flat(row) for row in results]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def pareto(results: Sequence[Result], dense_gmacs: float, title: str) -> Figure:
    """Accuracy over GMACs of all methods."""
    lines: dict[str, list[Point]] = {}
    controls = {row.method for row in results if row.group == "control"}
    for row in results:
        if row.correct and row.method != "dense":
            lines.setdefault(row.method, []).append(Point(row.gmacs / dense_gmacs, row.accuracy, *interval(row.table)))
    dense = next(row for row in results if row.method == "dense")
    return pareto_figure(lines, reference=("dense", dense.accuracy), muted=controls, title=title)


def tokens(results: Sequence[Result], share: float, task: Task) -> Figure:
    """What every method leaves of the same images at one budget."""
    images, labels = (part[:SHOWN].cpu() for part in task.test[0])
    shown = [row for row in results if row.share == share and row.source]
    shown.sort(key=lambda row: -row.accuracy)
    config = data_config(task.backbone)
    return fates_figure(
        images,
        {row.method: torch.tensor(row.source) for row in shown},
        task.backbone.grid_size,
        labels=labels.tolist(),
        predicted={row.method: row.predicted for row in shown},
        mean=config["mean"],
        std=config["std"],
    )


def write_report(store: Store, task: Task, title: str) -> str:
    """Everything that is made of the results; the tables."""
    text = tables(store.results, task.dense_gmacs)
    (task.output / "table.md").write_text(text)
    write_csv(store.results, task.output / "results.csv")
    pareto(store.results, task.dense_gmacs, title).savefig(task.output / "pareto.png", dpi=150)
    for share in sorted({row.share for row in store.results if row.source and row.method != "dense"}):
        tokens(store.results, share, task).savefig(task.output / f"tokens-{100 * share:g}.png", dpi=150)
    return text
