"""Which images are drawn, and what is written beside them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from vitprune_env import load_backbone
from vitprune_env.baselines import EViT
from vitprune_env.benchmarking import BenchmarkResult, difference, interval, standard_error
from vitprune_env.benchmarking.images import LOOK, as_batches, set_aside, shown_images, shown_rows
from vitprune_env.benchmarking.measurement import SHOWN, Row, measure
from vitprune_env.benchmarking.prepared import PreparedImages
from vitprune_env.benchmarking.result import gain_text
from vitprune_env.benchmarking.trained import figure_of_tokens
from vitprune_env.data import Digits
from vitprune_env.policy import KeepAll

LABELS = torch.tensor([4, 4, 4, 2, 2, 4, 0, 0, 1])  # as in a folder that is sorted by class


def test_images_of_different_classes_are_drawn() -> None:
    assert shown_rows(LABELS, 3) == [0, 3, 6]
    assert shown_rows(LABELS, 6) == [0, 3, 6, 8, 1, 2]  # four classes, then the first others
    assert shown_rows(LABELS, 20) == [0, 3, 6, 8, 1, 2, 4, 5, 7]
    assert shown_rows(torch.cat([torch.zeros(LOOK, dtype=torch.int64), torch.tensor([1])]), 2) == [0, 1]


@pytest.mark.parametrize("size", [1, 2, 4, 9])
def test_they_are_found_in_batches_of_any_size(size: int) -> None:
    images = torch.arange(9.0)[:, None, None, None]
    batches = list(zip(images.split(size), LABELS.split(size), strict=True))
    for count in (3, 6):
        found, labels = shown_images(batches, count)
        assert found.flatten().int().tolist() == shown_rows(LABELS, count)
        assert torch.equal(labels, LABELS[shown_rows(LABELS, count)])


def test_no_more_is_read_than_needed() -> None:
    read: list[int] = []

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, 9, 3):
            read.append(start)
            yield torch.zeros(3, 1, 1, 1), LABELS[start : start + 3]

    assert shown_images(batches(), 2)[1].tolist() == [4, 2]
    assert read == [0, 3]
    with pytest.raises(ValueError, match="expected at least one batch"):
        shown_images([], 2)


def test_a_row_and_a_figure_have_the_same_images() -> None:
    backbone = load_backbone("vit_digits", class_names=[f"digit_{number}" for number in range(10)])
    images, labels = Digits("test", size=40).batch(range(40))
    order = labels.argsort(stable=True)
    batches = list(zip(images[order].split(7), labels[order].split(7), strict=True))
    shown, classes = shown_images(batches, SHOWN)
    assert classes.tolist() == list(range(8))
    row = measure("EViT", backbone, EViT(0.7), batches)
    alone = measure("EViT", backbone, EViT(0.7), [(shown, classes)])
    assert (row.predicted, row.source) == (alone.predicted, alone.source)
    figure = figure_of_tokens(backbone, EViT(0.5), batches)
    captions = [axes.get_ylabel() for axes in figure.axes if axes.get_ylabel()]
    guesses = measure("EViT", backbone, EViT(0.5), [(shown, classes)]).predicted
    assert captions == [
        f"digit {label}" + ("" if guess == label else f"\nread as digit {guess}") for label, guess in enumerate(guesses)
    ]


def test_groups_go_with_the_images_from_the_data_set_to_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    data, backbone = Digits("test", size=24), load_backbone("vit_digits")
    device = torch.device("cpu")
    data._scenes.digit[12:] = data._scenes.digit[:12]  # two scenes of each digit
    ids = data.source_ids(range(24))
    batches = as_batches(data, 10, device)
    for same in (batches, as_batches(cast(Any, batches), 10, device), PreparedImages(backbone, batches)):
        assert torch.equal(cast(Any, same).groups, ids)
    row = measure("dense", backbone, KeepAll(), PreparedImages(backbone, batches))
    assert row.groups is not None
    assert row.groups.tolist() == ids.tolist()
    assert row.numbers()["image_groups"] == 12
    assert row.stderr == standard_error(row.marks, ids.numpy())
    assert row.interval == interval(row.marks, ids.numpy())
    assert Row.load(json.loads(json.dumps(asdict(row)))) == row
    rest, aside = set_aside(data)
    assert torch.equal(cast(Any, aside).groups([0, 1]), ids[[0, 4]])
    assert torch.equal(cast(Any, as_batches(rest, 10, device)).groups, ids[[row for row in range(24) if row % 4]])
    assert torch.equal(cast(Any, set_aside(batches)[1]).groups([0, 1]), ids[[0, 4]])
    monkeypatch.setattr("vitprune_env.benchmarking.images.IN_MEMORY", 0)
    assert torch.equal(cast(Any, as_batches(data, 10, device)).groups, ids)


def test_images_without_groups_are_their_own() -> None:
    images, labels = Digits("test", size=4).batch(range(4))
    for data in (TensorDataset(images, labels), [(images, labels)]):
        batches = as_batches(cast(Any, data), 2, torch.device("cpu"))
        assert cast(Any, batches).groups is None
        row = measure("dense", load_backbone("vit_digits"), KeepAll(), batches)
        assert (row.image_groups, row.groups, row.numbers()["image_groups"]) == ("", None, None)


def test_tables_and_reports_know_the_groups() -> None:
    marks, groups = "1" * 6 + "0" * 6, " ".join(["1", "2", "3"] * 4)
    rows = [Row("dense", gmacs=1.0, correct=(marks,)), Row("a", gmacs=1.0, correct=("1" * 12,))]
    rows = [replace(row, image_groups=groups) for row in rows]
    points = [100 * value for value in difference(rows[1].marks, rows[0].marks, groups=rows[0].groups)]
    assert gain_text(rows[1], replace(rows[0], name="b")) == f"{points[0]:+.1f} ({points[1]:+.1f} to {points[2]:+.1f})"
    assert points[1] == points[2] == 50  # every group is right in half of its images: which are drawn does not matter
    assert "over the 3 groups of images with the same original and seeds" in BenchmarkResult(tuple(rows)).report()
    alone = tuple(replace(row, image_groups="") for row in rows)
    assert "bootstrap over images and seeds" in BenchmarkResult(alone).report()
