"""The benchmark: its statistics against known numbers, its results on disk, its tables and figures, and a whole run."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import decision_overhead
import numpy as np
import pytest
import torch

from vitprune_env import BasePolicy, Decision, KeepAll, Observation, TokenGame, benchmark, load_backbone, play
from vitprune_env.agents import AdaptivePolicy, TokenActor, TokenPolicy, save_policy
from vitprune_env.baselines import EViT, RandomDrop, ToMe
from vitprune_env.benchmarking import BenchmarkResult, Fits, Row, Timing, interval, measure
from vitprune_env.benchmarking.contestants import Contestant, Task, contestants_of
from vitprune_env.benchmarking.images import set_aside
from vitprune_env.benchmarking.prepared import PreparedImages
from vitprune_env.benchmarking.store import Store, write_json
from vitprune_env.cli import main
from vitprune_env.data import Digits, batches_of
from vitprune_env.errors import CheckpointError, ParameterError, SettingsError, UnknownNameError


def row(name: str, share: float | None, accuracy: float = 0.8, group: str = "baseline", **changes: Any) -> Row:
    count = round(20 * accuracy)
    base = Row(
        name, cast(Any, group), share, gmacs=(share or 1) * 0.03, policy_gmacs=0.0003,
        correct=("1" * count + "0" * (20 - count),), keep_per_site=(0.5, 0.25), sites=("1", "3"), images_per_s=200.0,
        dense_images_per_s=100.0, speedup=2.0,
    )  # fmt: skip
    return replace(base, **changes)


DENSE = row("dense", None, 0.95, "control", speedup=1.0)
SETTINGS = {"seed": 0, "images": 20, "sites": "backbone"}


def test_results_are_kept_and_found_again(tmp_path: Path) -> None:
    store = Store(tmp_path, SETTINGS)
    first, second = row("evit", 0.25, source=((0, 0, -1),), predicted=(3,)), row("evit", 0.5)
    store.add(first)
    store.add(second)
    again = Store(tmp_path, SETTINGS, resume=True)
    assert again.rows == [first, second]
    assert again.find("evit", 0.25) == first
    assert again.find("evit", 0.35) is None
    assert again.find("evit", 0.25, "another checkpoint") is None
    better = replace(first, gmacs=0.1)
    again.add(better)
    assert again.rows == [second, better]
    assert Store(tmp_path, SETTINGS).rows == []
    assert BenchmarkResult.load(tmp_path / "results.json").rows == (second, better)


def test_results_of_other_settings_are_refused(tmp_path: Path) -> None:
    Store(tmp_path, SETTINGS).add(row("evit", 0.25))
    with pytest.raises(CheckpointError, match=r"same settings to resume, got other images 20 \(now 30\)"):
        Store(tmp_path, SETTINGS | {"images": 30}, resume=True)
    (tmp_path / "results.json").write_text("[]")
    with pytest.raises(CheckpointError, match="expected results of the benchmark"):
        Store(tmp_path, SETTINGS, resume=True)


def test_table_ranks_by_accuracy_says_where_and_names_what_is_out_of_reach() -> None:
    rows = (
        DENSE,
        row("random", 0.25, 0.5, "control"),
        row("poor", 0.25, 0.4, sites=tuple(f"{block}.attn" for block in range(1, 9))),
        row("good", 0.25, 0.9),
        Row("stuck", "baseline", 0.25, out_of_reach="reaches 0.02 to 0.03 GMACs"),
        row("own", None, 0.7),
    )
    text = BenchmarkResult(rows).table()
    assert "### 25% of the dense GMACs (0.00750)" in text
    asked, own = text.split("### At a cost of their own")
    names = [line.split("|")[1].strip() for line in asked.splitlines() if line.startswith("|")][2:]
    assert names == ["*dense*", "good", "*random*", "poor"]
    assert "| own |" in own
    good = next(line for line in text.splitlines() if line.startswith("| good"))
    low, high = (100 * value for value in interval(rows[3].marks))
    assert good.startswith("| good | 1, 3 |")
    assert "| poor | 1.attn to 8.attn |" in text
    assert f"| 90.0 ({low:.1f} to {high:.1f}) | +40.0 (" in good
    assert "| 0.00750 | 25.0 | 1.0 | 50 / 25 | 200 / 100 | 2.00x |" in good
    assert "- stuck: reaches 0.02 to 0.03 GMACs" in text
    assert repr(BenchmarkResult(rows)) == text, "a notebook shows tables, not tensors"
    assert "speed-up" not in BenchmarkResult(tuple(replace(each, speedup=None) for each in rows)).table()
    for table, columns in ((asked, 11), (own, 9)):  # one method alone has no rival
        assert all(line.count("|") == columns + 1 for line in table.splitlines() if line.startswith("|"))


def test_table_compares_with_random_and_with_the_best_rival() -> None:
    rows = (
        DENSE,
        row("random", 0.5, 0.5, "control"),
        row("good", 0.5, 0.9),
        row("poor", 0.5, 0.4, sites=tuple(f"{block}.attn" for block in range(1, 9))),
    )
    text = BenchmarkResult(rows, {"depth": 8}).table()
    heading, _, _, good, random, poor = (line.split(" | ") for line in text.splitlines() if line.startswith("|"))
    assert heading[3:5] == ["over random (95 %)", "over good (95 %)"]
    assert good[3].startswith("+40.0 (+")
    assert good[4].strip() == random[3].strip() == ""
    assert poor[1] == "in every block"
    assert poor[3].startswith("-10.0 (")
    assert poor[4].startswith("-50.0 (")


def test_report_begins_with_the_command_and_all_that_the_numbers_depend_on() -> None:
    settings = {"backbone": "net", "weights": "abc", "split": "validation", "images": "def", "tune_images": 9,
                "sites": "both", "seed": 0, "seeds": 3, "fits": {"budgets": "middle", "steps": 60},
                "precision": "bf16"}  # fmt: skip
    about = {"command": "vitprune benchmark --model net", "processor": "P", "threads": 2, "versions": {"torch": "1"}}
    text = BenchmarkResult((DENSE, row("evit", 0.3), row("evit", 0.6)), settings, about=about).report()
    assert text.startswith("# net, 20 validation images\n\n```bash\nvitprune benchmark --model net\n```\n")
    for part in ("weights abc", "calibrated on 9 training images", "trained once, for 60%", "60 steps", "3 seeds",
                 "P, 2 threads, bf16", "torch 1", "a second row at the published sites"):  # fmt: skip
        assert part in text
    assert text.endswith(BenchmarkResult((DENSE, row("evit", 0.3), row("evit", 0.6)), settings).table())


def test_csv_has_a_line_per_method_and_budget(tmp_path: Path) -> None:
    rows = (row("evit", 0.25), Row("stuck", "baseline", 0.25, out_of_reach="why"))
    text = BenchmarkResult(rows).csv(tmp_path / "results.csv")
    assert (tmp_path / "results.csv").read_bytes().decode() == text
    found = list(csv.DictReader(io.StringIO(text, newline="")))
    assert [line["name"] for line in found] == ["evit", "stuck"]
    assert float(found[0]["accuracy"]) == 0.8
    assert float(found[0]["accuracy_low"]) < 0.8 < float(found[0]["accuracy_high"])
    assert (found[1]["accuracy"], found[1]["out_of_reach"]) == ("", "why")


def test_latex_is_a_booktabs_table_with_the_best_in_bold() -> None:
    rows = (
        DENSE,
        row("random", 0.25, 1.0, "control"),
        row("a_b", 0.25, 0.9),
        row("other", 0.25, 0.5, sites=("1", "3", "5", "7")),
        row("other", 0.5, 0.95),
    )
    text = BenchmarkResult(rows).latex()
    lines = text.splitlines()
    assert lines[:3] == [r"% needs \usepackage{booktabs}", r"\begin{tabular}{lccc}", r"\toprule"]
    assert lines[-3] == r"\bottomrule"
    note = lines.pop(-2)
    assert note.startswith(r"\multicolumn{4}{l}{\footnotesize Accuracy in per cent with its 95\,\% interval")
    assert r"25\,\% (0.0075 GMACs)" in text
    assert r"a\_b & 1, 3 & \textbf{90.0} {\scriptsize (" in text
    assert r"\emph{random} & 1, 3 & 100.0 " in text  # a control is never the best
    assert r"other & 1, 3, 5, 7 (25 \%); 1, 3 (50 \%) & 50.0 " in text
    assert r"\textbf{95.0}" in text
    assert text.count(r"\midrule") == 3
    body = [line for line in lines if line.endswith(r"\\")]
    assert {line.count("&") for line in body} == {3}


def test_figures_show_ours_and_the_best_at_equal_sites() -> None:
    rows = [row(f"method {index}", 0.5, 0.5 + index / 20) for index in range(9)]
    rows += [row("evit (published sites)", 0.5, 0.9), row("random", 0.5, 1.0, "control")]
    rows += [row("mine", 0.5, 0.1, "own"), row("MAPPO", 0.5, 0.2, "learned")]
    shown = BenchmarkResult((DENSE, *rows)).shown()
    assert shown == ["MAPPO", "mine", *(f"method {index}" for index in range(8, 2, -1))]


def test_pareto_figure_has_a_line_per_method() -> None:
    rows = (DENSE, row("evit", 0.5, 0.9), row("evit", 0.25, 0.7), row("random", 0.25, 0.4, "control"))
    figure = BenchmarkResult(rows).plot()
    figure.canvas.draw()
    assert {text.get_text() for text in figure.axes[0].texts} == {"dense 95.0%", "evit", "random"}
    drawn = {
        container.get_label(): cast(Any, container).lines[0].get_xydata() for container in figure.axes[0].containers
    }
    assert drawn["evit"] == pytest.approx(np.array([[0.25, 0.7], [0.5, 0.9]]))


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    content: dict[str, Any] = {"good": 1}
    write_json(tmp_path / "a.json", content)
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"bad": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == content
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_arguments_are_checked_before_time_is_spent(backbone: Any, tmp_path: Path) -> None:
    def compare(policies: Any = ("topk",), **options: Any) -> BenchmarkResult:
        return benchmark(policies, backbone, Digits("validation", 8), **options)

    with pytest.raises(ValueError, match=r"budgets: expected shares .* got 1\.5"):
        compare(budgets=(0.3, 1.5))
    with pytest.raises(ValueError, match="budgets: expected at least one"):
        compare(budgets=())
    with pytest.raises(ValueError, match="seeds: expected 1 or more, got 0"):
        compare(seeds=0)
    with pytest.raises(ValueError, match="sites: expected 'backbone', 'published', 'both' or sites, got 'publishd'"):
        compare(sites="publishd")
    with pytest.raises(ValueError, match="fit: expected training images, which dynamicvit need, got None"):
        compare(["dynamicvit"])
    with pytest.raises(ValueError, match="policies: expected different labels, got 'EViT' twice"):
        compare([EViT(0.5), EViT(0.7)])
    with pytest.raises(TypeError, match=r"policies: expected names of baselines, .* got 3 as 'int'"):
        compare([3])
    with pytest.raises(TypeError, match=r"got the module Linear as 'Linear'; .*ModulePolicy"):
        compare([torch.nn.Linear(48, 1)])
    with pytest.raises(ValueError, match=r"budgets: expected shares .* got 50"):
        compare(budgets=50)
    with pytest.raises(CheckpointError, match=r"nowhere\.safetensors"):
        compare([tmp_path / "nowhere.safetensors"])
    with pytest.raises(ValueError, match="resume: expected an output folder"):
        compare(resume=True)


def test_controls_take_part_whatever_is_asked_for() -> None:
    names = [contestant.name for contestant in contestants_of(["topk"])]
    assert names == ["random", "untrained actor", "topk"]
    assert [contestant.name for contestant in contestants_of("topk", controls=False)] == ["topk"]
    with pytest.raises(UnknownNameError, match="did you mean evit"):
        contestants_of(["evt"])


@pytest.fixture(scope="module")
def backbone() -> Any:
    return load_backbone("vit_digits")


@pytest.fixture(scope="module")
def checkpoints(backbone: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[float, Path]:
    found = {}
    dense = TokenGame(backbone).cost.dense()
    for share in (0.3, 0.6):
        actor = TokenActor(backbone.embed_dim, generator=torch.Generator().manual_seed(round(10 * share)))
        found[share] = tmp_path_factory.mktemp("policy") / "policy.safetensors"
        save_policy(TokenPolicy(actor, info={"target_macs": share * dense}), found[share])
    return found


@pytest.fixture
def task(backbone: Any, tmp_path: Path) -> Task:
    return Task(
        backbone, PreparedImages(backbone, batches_of(Digits("validation", 24, seed=2), 16)),
        PreparedImages(backbone, batches_of(Digits("train", 16, seed=1), 16)), Digits("train", 32), seeds=2,
        fits=Fits(quick=True), output=tmp_path,
    )  # fmt: skip


def played(line: Contestant, task: Task, share: float) -> Row:
    policies = line.at(task, share * task.dense_gmacs)
    return measure(line.name, task.backbone, policies, task.test, sites=line.sites(task))


def test_of_several_checkpoints_the_nearest_budgets_play(checkpoints: dict[float, Path], task: Task) -> None:
    paths: dict[str, Any] = {"MAPPO": [checkpoints[0.6].parent, str(checkpoints[0.3])], "other": checkpoints[0.3]}
    ours, other = contestants_of({"evit": "evit", **paths})[-2:]
    assert (ours.name, other.name, ours.group) == ("MAPPO", "other", "learned")
    assert ours.origin != other.origin
    for share in (0.3, 0.6):
        (policy,) = cast(Any, ours).at(task, 1.05 * share * task.dense_gmacs)
        assert policy.info["target_macs"] == pytest.approx(share * task.dense_gmacs * 1e9)
        game = TokenGame.for_policy(task.backbone, policy)
        outcome = play(game, policy, next(iter(task.tune))[0]).outcome
        assert float(outcome.macs.mean()) == pytest.approx(1.05 * share * task.dense_gmacs * 1e9, rel=0.05)


def test_policies_for_a_range_of_budgets_are_told_the_asked_one(task: Task, tmp_path: Path) -> None:
    path = tmp_path / "policy.safetensors"
    actor = TokenActor(task.backbone.embed_dim + 1, generator=torch.Generator().manual_seed(0))
    save_policy(AdaptivePolicy(actor, (0.3, 0.6), (0.0, 0.0), info={"target_macs": 0.6}), path)
    line = contestants_of([path])[-1]
    for share, told in ((0.4, 0.4), (0.25, 0.3)):
        (policy,) = cast(Any, line.at(task, share * task.dense_gmacs))
        assert policy.share == pytest.approx(told)


def test_policies_with_a_network_of_their_own_are_refused(tmp_path: Path) -> None:
    actor = TokenActor(64, generator=torch.Generator().manual_seed(0))
    save_policy(TokenPolicy(actor, info={"finetune": "after"}), tmp_path / "policy.safetensors")
    with pytest.raises(CheckpointError, match="got one with a fine-tuned network of its own"):
        contestants_of([tmp_path])


def test_measured_is_what_was_played(task: Task) -> None:
    found = played(contestants_of([])[0], task, 0.4)
    assert found.name == "random"
    assert len(found.correct) == 2
    assert {len(run) for run in found.correct} == {24}
    assert found.gmacs == pytest.approx(0.4 * task.dense_gmacs, rel=0.03)
    assert found.keep_per_site[0] > found.keep_per_site[1] > found.keep_per_site[2] > 0
    source = torch.tensor(found.source)
    assert source.shape == (8, task.backbone.num_patches)
    alive = (source == torch.arange(task.backbone.num_patches)).sum(dim=1)
    assert alive.float().mean() / task.backbone.num_patches == pytest.approx(found.keep_per_site[-1])
    assert Row.load(json.loads(json.dumps(asdict(found)))) == found


def test_rows_of_several_runs_are_averaged_with_the_spread_as_error() -> None:
    found = row("a", 0.5, correct=("1" * 5 + "0" * 5, "1" * 7 + "0" * 3))
    assert found.accuracy == pytest.approx(0.6)
    assert found.stderr == pytest.approx(0.1)
    single = row("a", 0.5, correct=("1" * 5 + "0" * 5,))
    assert single.stderr == pytest.approx((0.25 / 10) ** 0.5)


def test_fitted_methods_are_fitted_for_the_budget_and_brought_to_it(task: Task, tmp_path: Path) -> None:
    fitted, unfitted = contestants_of(["life_regression"])[-1:1:-1]
    assert (fitted.name, unfitted.name) == ("life_regression", "life_regression (unfitted)")
    found = played(fitted, task, 0.4)
    assert list((tmp_path / "fits").glob("life_regression-0.4/*.safetensors"))
    assert found.gmacs == pytest.approx(0.4 * task.dense_gmacs, rel=0.03)
    assert len(unfitted.at(task, 0.4 * task.dense_gmacs)) == task.seeds


class KeepLoud(BasePolicy):
    """Has nothing to turn."""

    def decide(self, obs: Observation) -> Decision:
        norms = obs.scatter(obs.tokens.norm(dim=1))
        return Decision(keep=obs.alive & (norms >= (norms.sum(1) / obs.num_alive.clamp(min=1))[:, None]))


class Half(RandomDrop):
    """A class of the caller's own, made from a keep rate, with a seed."""


def test_every_kind_of_policy_is_brought_to_the_budget(task: Task) -> None:
    entries: dict[str, Any] = {
        "object": EViT(0.9, fuse=False),
        "schedule": ToMe(8),
        "class": EViT,
        "own class": Half,
        "function": lambda rate: EViT(rate),
        "as it is": KeepLoud,
        "the same": KeepLoud(),
    }
    lines = {line.name: line for line in contestants_of(entries, controls=False)}
    for name in ("object", "schedule", "class", "own class", "function"):
        found = played(lines[name], task, 0.5)
        assert found.gmacs == pytest.approx(0.5 * task.dense_gmacs, rel=0.04), name
        wanted = tuple(f"{block}.attn" for block in range(1, 9)) if name == "schedule" else ("1", "3", "5")
        assert found.sites == wanted
        assert len(found.correct) == (2 if name == "own class" else 1)
    (policy,) = cast(Any, lines["object"].at(task, 0.5 * task.dense_gmacs))
    assert policy.fuse is False
    assert lines["object"].setting(policy).startswith("keep_rate=0.6")
    assert lines["as it is"].fixed
    assert lines["the same"].fixed


def test_sites_are_equal_published_or_given(task: Task) -> None:
    task = replace(task, seeds=1)
    lines = contestants_of({"evit": "evit", "tome": "tome", "class": EViT, "object": EViT(0.5)})
    random, untrained, evit, tome, made, given = lines

    def sites(line: Contestant, task: Task) -> tuple[str, ...]:
        return played(line, task, 0.9).sites

    published = replace(task, sites="published")
    assert sites(evit, published) == sites(made, published) == sites(given, published) != sites(evit, task)
    fixed = replace(task, sites=(5, 7))
    for line in (random, untrained, evit, tome, made, given):
        assert sites(line, fixed) == ("5", "7"), line.name


def test_parameters_follow_a_name(task: Task) -> None:
    line = contestants_of(["dpc:strategy=cluster,clusters=2"])[-1]
    (policy,) = cast(Any, line.at(task, 0.012))
    assert (line.name, policy.strategy, policy.clusters) == ("dpc:strategy=cluster,clusters=2", "cluster", 2)
    with pytest.raises(ParameterError, match=r"strategi: no parameter of 'dpc', .* did you mean strategy"):
        contestants_of(["dpc:strategi=cluster"])


def test_images_to_calibrate_on_are_set_aside() -> None:
    test, tune = cast(Any, set_aside(Digits("validation", 40)))
    assert (len(test), len(tune)) == (30, 10)
    together = sorted([*test.rows, *tune.rows])
    assert together == list(range(40))
    images, labels = Digits("validation", 40).batch(range(40))
    test, tune = cast(Any, set_aside([(images[:25], labels[:25]), (images[25:], labels[25:])]))
    assert (len(test), len(tune)) == (30, 10)
    found, classes = tune.batch([0, 9])
    assert torch.equal(found, images[[tune.rows[0], tune.rows[9]]])
    assert torch.equal(classes, labels[[tune.rows[0], tune.rows[9]]])
    with pytest.raises(ValueError, match="data: expected at least two images"):
        set_aside(Digits("validation", 1))


def test_a_whole_comparison_is_written_resumed_and_extended(
    backbone: Any, checkpoints: dict[float, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compare(policies: dict[str, Any], **options: Any) -> BenchmarkResult:
        return benchmark(
            policies, backbone, Digits("validation", 20), budgets=(0.8,), sites=(5,), seeds=1, timing=Timing(1, 4, 1),
            output=tmp_path, progress=False, **options,
        )  # fmt: skip

    with monkeypatch.context() as patch:
        patch.setattr(BenchmarkResult, "save", lambda *_: None)  # the second time will do
        first = compare({"topk": "topk", "dense again": KeepAll()})
    assert [(found.name, found.share) for found in first.rows] == [
        ("dense", None), ("random", 0.8), ("untrained actor", 0.8), ("topk", 0.8), ("dense again", None),
    ]  # fmt: skip
    assert (first.row("topk").speedup or 0) > 0
    with pytest.raises(SettingsError, match=r"output: expected a folder without a run, .* holds results.json"):
        compare({"topk": "topk"})
    again = compare({"topk": "topk", "dense again": KeepAll(), "MAPPO": checkpoints[0.6]}, resume=True)
    assert again.rows[:5] == first.rows  # nothing was measured again
    assert [(found.name, found.share) for found in again.rows[5:]] == [("MAPPO", 0.8)]
    assert (tmp_path / "table.md").read_text() == again.report()
    assert (tmp_path / "table.tex").read_text() == again.latex()
    for name in ("pareto", "tokens-80"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    figure = tmp_path / "tokens-80.png"
    before = figure.read_bytes()
    figure.unlink()
    main(["benchmark", "--redraw", "--output", str(tmp_path)])
    assert figure.read_bytes() == before, "images and rows came back from the folder"
    assert (tmp_path / "table.md").read_text() == again.report()
    loaded = BenchmarkResult.load(tmp_path / "results.json")
    assert (loaded.rows, loaded.table()) == (again.rows, again.table())
    with pytest.raises(ValueError, match="scenes: expected a result with images"):
        loaded.plot_tokens(0.8)
    with pytest.raises(CheckpointError, match=r"settings to resume, got other seed 0 \(now 1\)"):
        compare({"topk": "topk"}, seed=1, resume=True)


def test_out_of_reach_is_a_result(backbone: Any) -> None:
    found = benchmark(
        ["evit"], backbone, Digits("validation", 8), tune=Digits("train", 8), budgets=(0.01,), timing=None,
        controls=False, progress=False,
    ).row("evit")  # fmt: skip
    assert re.search(r"target_gmacs: EViT reaches .* to .* GMACs here", found.out_of_reach)
    assert not found.correct


def test_overhead_of_every_method_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    methods = ["evit", "tome", "dpc_mlp"]
    decision_overhead.main(["--quick", "--rounds", "1", "--methods", *methods, "--output", str(tmp_path)])
    rows = {found["method"]: found for found in json.loads((tmp_path / "overhead.json").read_text())["rows"]}
    assert set(rows) == {"evit", "tome", "dpc_mlp"}
    for found in rows.values():
        assert min(found["half_ms"], found["decide_ms"], found["reduce_ms"]) > 0
    assert rows["evit"]["sites"] == ["1", "3", "5"]
    assert (tmp_path / "table.md").read_text() in capsys.readouterr().out
