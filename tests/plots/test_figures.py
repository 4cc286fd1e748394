"""Figures that compare methods, and the picture of merged tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vitprune_env.plots.figures import Point, fates_figure, pareto_figure
from vitprune_env.plots.render import COVER, TINT, tint

LINES = {"good": [Point(0.5, 0.9, 0.88, 0.92), Point(0.25, 0.8, 0.77, 0.83)], "random": [Point(0.25, 0.3, 0.25, 0.35)]}


def test_tint_covers_the_pruned_and_colours_the_merged() -> None:
    image = np.full((4, 6, 3), 0.5)
    shown = tint(image, np.array([0, 0, -1, 3, 4, 3]), (2, 3))
    tokens = shown.reshape(2, 2, 3, 2, 3).swapaxes(1, 2)[:, :, 0, 0].reshape(6, 3)
    assert tokens[2] == pytest.approx((1 - COVER) * 0.5 + COVER)  # pruned: white
    assert tokens[4] == pytest.approx(np.full(3, 0.5))  # alone: as it was
    assert tokens[0] == pytest.approx(tokens[1])
    assert tokens[3] == pytest.approx(tokens[5])
    assert np.abs(tokens[0] - tokens[3]).max() > 0.2  # other groups, other tints
    assert tokens[0] == pytest.approx((1 - TINT) * 0.5 + TINT * np.array([0.9, 0.36, 0.36]))
    assert (image == 0.5).all()


def test_pareto_figure_enlarges_what_is_near_the_reference() -> None:
    figure = pareto_figure(LINES, reference=("dense", 0.95), muted={"random"}, title="task")
    figure.canvas.draw()
    whole, near = figure.axes
    assert whole.get_ylim()[0] < 0.3
    assert near.get_ylim() == pytest.approx((0.85, 0.97))
    assert (whole.get_title(), near.get_title()) == ("task", "near dense")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["dense 95.0%", "good", "random"]
    assert len(pareto_figure(LINES, reference=("dense", 0.999), muted={"random"}).axes) == 2
    assert len(pareto_figure({"random": LINES["random"]}, reference=("dense", 0.95)).axes) == 1
    assert len(pareto_figure(LINES).axes) == 1


@pytest.mark.parametrize("lines", [{}, {"none": []}])
def test_pareto_figure_wants_points(lines: dict) -> None:
    with pytest.raises(ValueError, match="lines: expected methods with points"):
        pareto_figure(lines)


def test_fates_figure_has_a_row_per_method_and_marks_mistakes() -> None:
    sources = {"a": torch.arange(6).expand(3, 6), "b": torch.full((3, 6), -1)}
    figure = fates_figure(torch.randn(3, 3, 8, 12), sources, (2, 3), [4, 5, 6], {"a": [4, 5, 6], "b": [4, 0, 0]})
    figure.canvas.draw()
    table = np.array(figure.axes, dtype=object).reshape(3, 3)
    assert [row[0].get_ylabel() for row in table] == ["image", "a", "b"]
    assert [panel.get_title() for panel in table[0]] == ["class 4", "class 5", "class 6"]
    assert [panel.get_xlabel() for panel in table[2]] == ["4", "0", "0"]
    colours = [panel.xaxis.label.get_color() for panel in table[2]]
    assert colours == ["black", "tab:red", "tab:red"]


def test_classes_are_written_by_name() -> None:
    names = ("ant", "crocodile_head", "a_class_of_a_very_long_name")
    figure = fates_figure(torch.randn(2, 3, 8, 12), {"a": torch.arange(6).expand(2, 6)}, (2, 3), [1, 2], {"a": [1, 0]},
                          class_names=names)  # fmt: skip
    image, other, right, wrong = figure.axes
    assert [panel.get_title() for panel in (image, other)] == ["crocodile head", "a class of a very\nlong name"]
    assert [panel.get_xlabel() for panel in (right, wrong)] == ["crocodile head", "ant"]
    assert wrong.xaxis.label.get_color() == "tab:red"
    width, height = figure.get_size_inches()
    assert width / 2 > 1.5
    assert height / 2 > 1.5


def test_fates_figure_refuses_what_does_not_fit() -> None:
    images = torch.randn(2, 3, 8, 12)
    with pytest.raises(ValueError, match=r"sources: expected shape \[B, N\] = \(2, 6\) of 'a', got \(2, 5\)"):
        fates_figure(images, {"a": torch.zeros(2, 5, dtype=torch.int64)}, (2, 3))
    with pytest.raises(ValueError, match="sources: expected at least one method"):
        fates_figure(images, {}, (2, 3))
    with pytest.raises(ValueError, match="images: expected 1 to 8 images, got 9"):
        fates_figure(torch.randn(9, 3, 8, 12), {"a": torch.zeros(9, 6)}, (2, 3))
