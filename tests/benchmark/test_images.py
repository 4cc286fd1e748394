"""Which images are drawn, and what is written beside them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from vitprune_env import load_backbone
from vitprune_env.baselines import EViT
from vitprune_env.benchmarking.images import LOOK, shown_images, shown_rows
from vitprune_env.benchmarking.measurement import SHOWN, measure
from vitprune_env.benchmarking.trained import figure_of_tokens
from vitprune_env.data import Digits

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
