"""Numbers of papers beside a comparison of ours: same architecture and method, other images, other training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vitprune_env.benchmarking.measurement import Row
from vitprune_env.benchmarking.published.rows import DENSE, LEARNED, METHODS, PublishedRow, published_rows
from vitprune_env.benchmarking.result import BenchmarkResult, accuracy_text
from vitprune_env.benchmarking.tables import markdown
from vitprune_env.errors import SettingsError
from vitprune_env.files import PathLike, replace_file
from vitprune_env.plots.figures import save_figure
from vitprune_env.plots.published import PublishedMark, published_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SAME = 0.05  # by how much of it GMACs of the dense network may differ from those that papers print, which are rounded
WARNING = (
    "Rows with a source are printed in papers. They were measured on ImageNet, on networks trained or fine-tuned as "
    "the papers say, not on the images above: compare their losses against their own network that is not pruned, "
    "never their accuracies with those measured here."
)


def check_published(model: str, dense_gmacs: float) -> None:
    """Refuse a network that no paper reports, and one whose images have another size.

    Raises:
        SettingsError: for either.
    """
    printed = next(row for row in published_rows(model) if row.method == DENSE)
    if abs(dense_gmacs / printed.gmacs - 1) > SAME:
        raise SettingsError(
            f"published: expected {model} as papers have it, of {printed.gmacs:g} GMACs ({printed.source}), got "
            f"{dense_gmacs:.3g} GMACs; images of another size make other numbers"
        )


def rows_beside(result: BenchmarkResult) -> list[PublishedRow]:
    """What papers print of the network and the methods of a comparison.

    The network that is not pruned is among them, and RL4EViT's own policies where a trained policy was compared.

    Raises:
        SettingsError: see `check_published`.
    """
    check_published(str(result.settings["backbone"]), result.dense.gmacs)
    names = {row.name.partition(" ")[0].partition(":")[0] for row in result.rows}
    written = {DENSE, *(each for name in names for each in METHODS.get(name, ()))}
    if any(row.group == "learned" for row in result.rows):
        written |= set(LEARNED)
    return [row for row in published_rows(str(result.settings["backbone"])) if row.method in written]


def beside_table(result: BenchmarkResult) -> str:
    """A markdown table: first what was measured here, then what papers print, each row with where it comes from."""
    here = f"here, {result.title}"
    reached = [row for row in result.rows if row.correct]
    ours = [_ours(row, here) for row in reached]
    return f"{markdown([*ours, *map(_theirs, rows_beside(result))])}\n\n{WARNING}\n"


def _ours(row: Row, where: str) -> dict[str, str]:
    accuracy = accuracy_text(row)
    return {"method": row.name, "GMACs": f"{row.gmacs:.2f}", "top-1 % (95 %)": accuracy, "from": where, "note": ""}


def _theirs(row: PublishedRow) -> dict[str, str]:
    epochs = "" if row.epochs is None else "1 epoch" if row.epochs == 1 else f"{row.epochs} epochs"
    note = row.note if row.epochs == 0 and row.note else ", ".join(filter(None, [epochs, row.note]))
    name = "not pruned" if row.method == DENSE else row.method
    return {
        "method": f"*{name}*", "GMACs": f"{row.gmacs:.1f}", "top-1 % (95 %)": f"*{row.top1:.1f}*", "from": row.label,
        "note": note,
    }  # fmt: skip


def beside_figure(result: BenchmarkResult) -> Figure:
    """What pruning changes, here and in papers: each against its own dense network, since their images differ."""
    reached = [row for row in result.rows if row.correct and row.name != "dense"]
    ours: dict[str, list[tuple[float, float]]] = {}
    for row in reached:
        change = 100 * (row.accuracy - result.dense.accuracy)
        ours.setdefault(row.name, []).append((row.gmacs / result.dense.gmacs, change))
    rows = rows_beside(result)
    unpruned = {row.paper: row for row in reversed(rows) if row.method == DENSE}  # the first of each paper
    learned = next((row.name for row in reached if row.group == "learned"), "")
    names = {written: name for name, each in METHODS.items() for written in each} | dict.fromkeys(LEARNED, learned)
    theirs = []
    for row in rows:
        if row.method != DENSE:
            dense = unpruned[row.paper]
            change = row.top1 - dense.top1
            theirs.append(PublishedMark(names[row.method], row.source, row.gmacs / dense.gmacs, change))
    return published_figure(ours, theirs)


def save_beside(result: BenchmarkResult, folder: PathLike) -> str:
    """Write published.md, published.png and published.pdf.

    Returns:
        The table.

    Raises:
        SettingsError: see `check_published`.
        StorageError: if the folder cannot be written.
    """
    table = beside_table(result)
    replace_file(Path(folder) / "published.md", table.encode())
    save_figure(beside_figure(result), Path(folder) / "published")
    return table
