"""Numbers of papers: each has its source, agrees with the presets, and never looks like one of ours."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vitprune_env.baselines import available
from vitprune_env.benchmarking import BenchmarkResult, Row
from vitprune_env.benchmarking.presets import PUBLISHED
from vitprune_env.benchmarking.published import (
    check_published,
    network_of,
    published_rows,
    published_table,
    save_beside,
)
from vitprune_env.benchmarking.published.beside import beside_figure, rows_beside
from vitprune_env.benchmarking.published.rows import LEARNED, METHODS
from vitprune_env.cli import main
from vitprune_env.errors import SettingsError

PAPERS = {"RL4EViT", "Long et al., 2023", "Bonnaerens & Dambre, 2023", "Chen et al."}
DENSE = Row("dense", "control", gmacs=4.6, correct=("1" * 19 + "0",), sites=("3",))
OURS = replace(DENSE, name="evit", group="baseline", share=0.65, gmacs=3.0, correct=("1" * 16 + "0" * 4,))
RESULT = BenchmarkResult((DENSE, OURS), {"backbone": "deit_small_patch16_224.fb_in1k", "split": "validation"})


def test_every_row_has_a_source() -> None:
    rows = published_rows()
    assert len(rows) == 134
    assert {row.paper for row in rows} == PAPERS
    for row in rows:
        assert "table" in row.table.lower(), row
        assert 30 < row.top1 < 90, row
        assert 0.5 < row.gmacs < 20, row
    assert {row.network for row in rows} == {network_of(row.network) for row in rows}


def test_rows_are_found_by_our_names_and_by_theirs() -> None:
    by_ours = published_rows("deit_small_patch16_224.fb_in1k", "evit")
    assert by_ours == published_rows("deit-s", "EViT")
    assert [(row.top1, row.source) for row in by_ours if row.paper == "RL4EViT"] == [
        (79.2, "RL4EViT, Table I"), (78.5, "RL4EViT, Table I"), (76.8, "RL4EViT, Table I")]  # fmt: skip
    assert by_ours[0].label == "published (RL4EViT, Table I), other images"
    assert "RL4EViT, Table I |" in published_table(by_ours)
    assert set(METHODS) <= set(available())
    printed = {row.method for row in published_rows()}
    assert {name for names in METHODS.values() for name in names} | set(LEARNED) <= printed
    with pytest.raises(SettingsError, match=r"method: expected one .* did you mean evit\?"):
        published_rows(None, "evt")
    with pytest.raises(SettingsError, match="published: expected a network"):
        published_rows("vit_digits")


@pytest.mark.parametrize("name", [name for name, preset in PUBLISHED.items() if preset.source])
def test_presets_print_the_same_numbers(name: str) -> None:
    preset = PUBLISHED[name]
    rows = published_rows(preset.model, preset.policy)
    assert (preset.gmacs, preset.top1) in [(row.gmacs, row.top1) for row in rows]


def test_numbers_of_papers_are_labelled_wherever_they_stand(tmp_path: Path) -> None:
    table = save_beside(RESULT, tmp_path)
    assert (tmp_path / "published.md").read_text() == table
    assert {path.name for path in tmp_path.iterdir()} == {"published.md", "published.png", "published.pdf"}
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    ours, theirs = rows[:2], rows[2:]
    assert all("here, " in line for line in ours)
    assert all("| published (" in line and "other images" in line for line in theirs)
    assert {row.method for row in rows_beside(RESULT)} == {"none", "EViT"}, "methods that were not compared stay out"
    learned = replace(OURS, name="MAPPO", group="learned")
    assert set(LEARNED) < {row.method for row in rows_beside(replace(RESULT, rows=(*RESULT.rows, learned)))}
    figure = beside_figure(RESULT)
    here, there = figure.legends
    assert (here.get_title().get_text(), [text.get_text() for text in here.get_texts()]) == ("measured here", ["evit"])
    assert "other images" in there.get_title().get_text()
    assert {text.get_text() for text in there.get_texts()} == {row.source for row in published_rows("DeiT-S", "evit")}
    marks = figure.axes[0].collections
    assert len(marks) == len(published_rows("DeiT-S", "evit"))
    assert all(len(mark.get_facecolor()) == 0 for mark in marks), "hollow"
    share, change = np.asarray(marks[0].get_offsets())[0]  # 79.2 at 3.5 GMACs, of 79.9 at 4.6
    assert (share, change) == pytest.approx((3.5 / 4.6, -0.7))
    assert figure.axes[0].lines[0].get_ydata() == pytest.approx([-15.0]), "80 of 95 %"


def test_without_a_method_of_a_paper_there_is_no_legend_for_papers() -> None:
    better = replace(OURS, name="mine", correct=(DENSE.correct[0].replace("0", "1"),))
    figure = beside_figure(replace(RESULT, rows=(DENSE, better)))
    assert [legend.get_title().get_text() for legend in figure.legends] == ["measured here"]
    ticks = {text.get_text() for text in figure.axes[0].get_yticklabels()}
    assert {"-1", "0", "+1", "+5"} <= ticks


def test_networks_that_no_paper_has_are_refused() -> None:
    check_published("deit_small_patch16_224", 4.599)
    with pytest.raises(SettingsError, match=r"of 4.6 GMACs \(RL4EViT, Table I\), got 2.1 GMACs"):
        check_published("deit_small_patch16_224", 2.1)


def test_redrawing_shows_them_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: None)
    RESULT.json(tmp_path / "results.json")
    main(["benchmark", "--redraw", "--published", "--output", str(tmp_path)])
    assert "not pruned" in (tmp_path / "published.md").read_text()
