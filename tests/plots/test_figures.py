"""Figures that compare methods, and the picture of merged tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vitprune_env.plots.figures import fates_figure, save_figure
from vitprune_env.plots.pareto import COLOURS, Point, front_of, pareto_figure
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


def names(figure: Any) -> dict[str, Any]:
    """The names beside the lines, after the figure is laid out."""
    figure.canvas.draw()
    return {text.get_text(): text for text in figure.axes[0].texts}


def test_pareto_figure_holds_all_points_and_intervals() -> None:
    lines = {**LINES, "perfect": [Point(0.5, 1.0, 0.98, 1.0)], "hopeless": [Point(0.2, 0.0, 0.0, 0.02)]}
    figure = pareto_figure(lines, reference=("dense", 0.95), muted={"random"}, title="task")
    assert set(names(figure)) == {"dense 95.0%", *lines}
    (axes,) = figure.axes
    low, high = axes.get_ylim()
    assert low < 0 < 1 < high
    assert axes.get_title() == "task"
    ticks = [axes.transData.transform((0.3, tick))[1] for tick in (0.85, 0.9, 0.95)]
    assert ticks[2] - ticks[1] > 1.5 * (ticks[1] - ticks[0]), "the same step counts more close to the reference"


def test_pareto_figure_names_the_best_and_lists_the_others() -> None:
    """Thirty methods, many of them equally accurate, one of them ours, and three controls."""
    lines = {f"method {index}": [Point(0.35, 0.5 + index // 10 / 100, 0.4, 0.6)] for index in range(30)}
    controls = {f"control {index}": [Point(0.35, 0.3, 0.2, 0.4)] for index in range(3)}
    figure = pareto_figure({**lines, **controls}, muted=controls, ours={"method 0"})
    texts = names(figure)
    expected = {"method 0", *(f"method {index}" for index in range(20, 27)), "control 0", "control 1"}
    assert set(texts) == expected
    assert len({texts[name].get_color() for name in expected if name in lines}) == len(COLOURS) == 8
    assert [name for name, text in texts.items() if text.get_fontweight() == "bold"] == ["method 0"]
    below = figure.texts[0].get_text()
    assert not [name for name in {*lines, *controls} - expected if name not in below.replace("\n", " ")]
    drawn = {str(container.get_label()) for container in figure.axes[0].containers}
    assert drawn == expected, "all that have names have intervals"
    height = figure.axes[0].get_window_extent().height
    places = sorted(height * text.get_position()[1] for text in texts.values())
    letters = 8 * figure.dpi / 72
    assert 0 <= places[0] < places[-1] <= height
    assert all(upper - lower > letters for lower, upper in zip(places, places[1:], strict=False))
    assert all(text.get_position()[0] < 0 and text.get_ha() == "right" for text in texts.values()), "beside the lines"


def test_at_one_budget_costs_do_not_look_far_apart() -> None:
    figure = pareto_figure({"a": [Point(0.699, 0.5, 0.4, 0.6)], "b": [Point(0.7, 0.6, 0.5, 0.7)]}, muted={"a"})
    left, right = figure.axes[0].get_xlim()
    assert right - left == pytest.approx(0.06)
    assert left < 0.699 < 0.7 < right
    assert "front" not in figure.texts[0].get_text(), "a single point has no line"


def test_the_front_has_what_nothing_cheaper_beats() -> None:
    accuracies = {0.25: 0.5, 0.35: 0.8, 0.351: 0.7, 0.4: 0.6, 0.5: 0.9, 0.505: 0.95}
    points = [Point(share, accuracy, 0, 1) for share, accuracy in accuracies.items()]
    assert [point.share for point in front_of(points)] == [0.25, 0.35, 0.505], "0.5 and 0.505 are the same cost"


@pytest.mark.parametrize("lines", [{}, {"none": []}])
def test_pareto_figure_wants_points(lines: dict) -> None:
    with pytest.raises(ValueError, match="lines: expected methods with points"):
        pareto_figure(lines)
    many = {str(index): [Point(0.5, 0.5, 0.4, 0.6)] for index in range(9)}
    with pytest.raises(ValueError, match="shown: expected at most 8 methods, got 9"):
        pareto_figure(many, shown=list(many))


def test_fates_figure_has_a_row_per_method_and_marks_mistakes() -> None:
    sources = {"a": torch.arange(6).expand(3, 6), "b": torch.full((3, 6), -1)}
    figure = fates_figure(torch.randn(3, 3, 8, 12), sources, (2, 3), [4, 5, 6], {"a": [4, 5, 6], "b": [4, 0, 0]})
    figure.canvas.draw()
    table = np.array(figure.axes, dtype=object).reshape(3, 3)
    assert [row[0].get_ylabel() for row in table] == ["image", "a", "b"]
    assert [panel.get_title() for panel in table[0]] == ["class 4", "class 5", "class 6"]
    assert [panel.get_xlabel() for panel in table[2]] == ["", "0", "0"], "only mistakes are written"
    assert [panel.spines["left"].get_visible() for panel in table[2]] == [False, True, True]
    assert [text.get_text() for text in figure.texts] == [
        "White: pruned. A tint: merged into one token. A frame: read as the class below it."
    ]


def test_classes_are_written_by_name() -> None:
    names = ("ant", "crocodile_head", "a_class_of_a_very_long_name")
    figure = fates_figure(torch.randn(2, 3, 8, 12), {"a": torch.arange(6).expand(2, 6)}, (2, 3), [1, 2], {"a": [1, 0]},
                          class_names=names)  # fmt: skip
    image, other, right, wrong = figure.axes
    assert [panel.get_title() for panel in (image, other)] == ["crocodile head", "a class of a\nvery long name"]
    assert [panel.get_xlabel() for panel in (right, wrong)] == ["", "ant"]


def test_figures_fit_a_page_and_are_written_for_screens_and_papers(tmp_path: Path) -> None:
    sources = {str(index): torch.arange(6).expand(8, 6) for index in range(8)}
    figure = fates_figure(torch.randn(8, 3, 16, 24), sources, (2, 3))
    assert (figure.get_size_inches() <= (7.01, 9.0)).all()
    save_figure(figure, tmp_path / "tokens-35")
    assert (tmp_path / "tokens-35.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "tokens-35.pdf").read_bytes().startswith(b"%PDF")
    assert all(path.stat().st_size < 2**20 for path in tmp_path.iterdir())


def test_fates_figure_refuses_what_does_not_fit() -> None:
    images = torch.randn(2, 3, 8, 12)
    with pytest.raises(ValueError, match=r"sources: expected shape \[B, N\] = \(2, 6\) of 'a', got \(2, 5\)"):
        fates_figure(images, {"a": torch.zeros(2, 5, dtype=torch.int64)}, (2, 3))
    with pytest.raises(ValueError, match="sources: expected at least one method"):
        fates_figure(images, {}, (2, 3))
    with pytest.raises(ValueError, match="images: expected 1 to 8 images, got 9"):
        fates_figure(torch.randn(9, 3, 8, 12), {"a": torch.zeros(9, 6)}, (2, 3))
