"""`vitprune analyse` and the published numbers of `vitprune info`: files, numbers, mistakes."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from vitprune_env.cli import main

FIGURES = ("difficulty", "diversity", "layers", "lives")


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are made, and their files are there; drawing takes seconds."""
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)


@pytest.mark.usefixtures("undrawn")
def test_every_view_is_a_figure_with_its_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--policy", "evit:fuse=False", "--keep-rate", "0.7", "--images", "12", "--quick"]
    more = ["--budgets", "0.6", "--beside", "random", "--output", str(tmp_path)]
    main(["analyse", *flags, *more])
    assert {path.name for path in tmp_path.iterdir() if path.suffix != ".csv"} == {
        f"{name}.{kind}" for name in FIGURES for kind in ("png", "pdf")
    }
    images = read(tmp_path / "images.csv")
    assert len(images) == 12
    kept = [[int(cell) for name, cell in row.items() if name.startswith("kept at")] for row in images]
    layers = read(tmp_path / "layers.csv")
    assert [float(row["kept"]) for row in layers] == [sum(site) / 12 for site in zip(*kept, strict=True)]
    assert [row["site"] for row in read(tmp_path / "difficulty.csv")] == [
        "mean over blocks", *(row["site"] for row in layers)
    ]  # fmt: skip
    assert sum(int(row["patches"]) for row in read(tmp_path / "lives.csv")) == 12 * 100
    assert len(read(tmp_path / "life_map.csv")) == 100
    assert [row["policy"] for row in read(tmp_path / "diversity.csv")] == ["evit:fuse=False", "random"]
    assert "undefined: one of the two is the same for all images" in capsys.readouterr().out


@pytest.mark.usefixtures("undrawn")
def test_a_policy_is_shown_at_the_sites_that_are_asked_for(tmp_path: Path) -> None:
    main(["analyse", "--quick", "--policy", "topk", "--images", "6", "--views", "layers", "diversity", "--sites", "2",
          "4", "--budgets", "0.7", "--output", str(tmp_path)])  # fmt: skip
    assert [row["site"] for row in read(tmp_path / "layers.csv")] == ["2", "4"]
    assert [row["sites"] for row in read(tmp_path / "diversity.csv")] == ["2 4"]


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--beside", "evit"], "error: --beside: expected budgets to compare policies at"),
        (["--budgets", "1.5"], "error: --budgets: expected shares of the dense GMACs between 0 and 1, got 1.5"),
    ],
)
def test_mistakes_are_one_line(flags: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["analyse", *flags])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith(line)


def test_info_lists_what_papers_print(capsys: pytest.CaptureFixture[str]) -> None:
    main(["info", "--published", "deit_small_patch16_224", "--method", "life_regression"])
    rows = capsys.readouterr().out.splitlines()[2:]
    assert len(rows) == 5
    assert all(row.endswith(("Chen et al., Table I |", "Chen et al., Table III |")) for row in rows)
