"""The numbers that four papers print in their tables, each with its paper and table; the data are in a CSV file."""

from __future__ import annotations

import csv
import difflib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from importlib.resources import files
from typing import Any

from vitprune_env.benchmarking.tables import markdown
from vitprune_env.errors import SettingsError

DATA = "published_results.csv"
DENSE = "none"  # what stands for the network that is not pruned in the column of methods
NETWORKS = {  # timm's names without the tag of the weights, and what the papers write
    "deit_tiny_patch16_224": "DeiT-T",
    "deit_small_patch16_224": "DeiT-S",
    "deit_base_patch16_224": "DeiT-B",
    "vit_tiny_patch16_224": "ViT-T",
    "vit_small_patch16_224": "ViT-S",
    "vit_base_patch16_224": "ViT-B",
    "lv_vit_s": "LV-ViT-S",
}
METHODS = {  # names of baselines here, and what the papers write
    "ats": ("ATS",),
    "dpc": ("DPC decouple+merge", "DPC", "+ attentive token matching"),
    "dpc_convolution": ("convolution",),
    "dpc_kmeans": ("k-means 1 iteration",),
    "dpc_mlp": ("MLP",),
    "dpc_pool": ("average pooling",),
    "dynamicvit": ("DynamicViT",),
    "evit": ("EViT",),
    "evo_vit": ("Evo-ViT",),
    "life_regression": ("Life regression",),
    "ltmp": ("LTMP",),
    "random": ("Random",),
    "tome": ("ToMe",),
    "tri_level": ("Tri-Level",),
}
LEARNED = ("RL4EViT", "MAPPO", "PPO (single agent)")  # policies of RL4EViT, which are trained here, not named


@dataclass(frozen=True)
class PublishedRow:
    """A line of a table in a paper. All were measured on ImageNet, by others, on machines of theirs."""

    paper: str  # where it is printed
    table: str
    network: str  # as papers call it
    method: str  # as papers call it; "none": not pruned
    gmacs: float  # per image, as printed; the papers write FLOPs
    top1: float  # per cent
    top5: float | None = None  # per cent; None here and below: not printed
    images_per_s: float | None = None
    speedup: float | None = None  # over the dense network
    epochs: int | None = None  # of fine-tuning
    note: str = ""

    @property
    def source(self) -> str:
        """Paper and table."""
        return f"{self.paper}, {self.table}"

    @property
    def label(self) -> str:
        """What is written beside the number wherever it stands near numbers of ours."""
        return f"published ({self.source}), other images"


@cache
def _all_rows() -> tuple[PublishedRow, ...]:
    """Every row of the file, in its order."""
    kinds: dict[str, Any] = {"gmacs": float, "top1": float, "top5": float, "images_per_s": float, "speedup": float,
                             "epochs": int}  # fmt: skip
    blank: dict[str, Any] = {field.name: field.default for field in fields(PublishedRow)}
    text = (files("vitprune_env.benchmarking.published") / DATA).read_text("utf-8")
    return tuple(
        PublishedRow(**{name: kinds.get(name, str)(cell) if cell else blank[name] for name, cell in line.items()})
        for line in csv.DictReader(text.splitlines())
    )


def network_of(model: str) -> str | None:
    """What the papers call a network, from timm's name or theirs; None: no paper reports it."""
    architecture = model.partition(".")[0]  # what follows names the weights
    known = {name.lower(): name for name in NETWORKS.values()} | NETWORKS
    return known.get(architecture) or known.get(architecture.lower())


def published_rows(model: str | None = None, method: str | None = None) -> tuple[PublishedRow, ...]:
    """What the papers print.

    Args:
        model: only rows of this network, by timm's name or as papers call it (DeiT-S); None: of all.
        method: only rows of this method, by the name of the baseline here or as papers call it; None: of all, the
            networks that are not pruned included.

    Raises:
        SettingsError: for a network or a method that no paper reports.
    """
    rows = _all_rows()
    if model is not None:
        network = network_of(model)
        if network is None:
            raise SettingsError(f"published: expected a network that papers report ({_names(NETWORKS)}), got {model!r}")
        rows = tuple(row for row in rows if row.network == network)
    if method is None:
        return rows
    written = METHODS.get(method, (method,))
    printed = {row.method.lower() for row in _all_rows()}
    if not printed & {name.lower() for name in written}:
        near = difflib.get_close_matches(method, METHODS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise SettingsError(f"method: expected one that papers report ({', '.join(METHODS)}), got {method!r}{hint}")
    return tuple(row for row in rows if row.method.lower() in {name.lower() for name in written})


def published_table(rows: Sequence[PublishedRow]) -> str:
    """Rows as a markdown table; every line names its source."""
    return markdown([_cells(row) for row in rows])


def _cells(row: PublishedRow) -> dict[str, str]:
    def number(value: float | None) -> str:
        return "" if value is None else f"{value:g}"

    return {
        "network": row.network,
        "method": "not pruned" if row.method == DENSE else row.method,
        "GMACs": f"{row.gmacs:.1f}",
        "top-1 %": f"{row.top1:.1f}",
        "top-5 %": "" if row.top5 is None else f"{row.top5:.1f}",
        "images/s": number(row.images_per_s),
        "speed-up": "" if row.speedup is None else f"{row.speedup:.2f}x",
        "epochs": number(row.epochs),
        "note": row.note,
        "published in": row.source,
    }


def _names(networks: dict[str, str]) -> str:
    return ", ".join(f"{name} or {written}" for name, written in networks.items())
