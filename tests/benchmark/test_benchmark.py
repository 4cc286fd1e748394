"""The benchmark: its statistics against known numbers, its results on disk, its tables and figures, and a whole run."""

from __future__ import annotations

import csv
import json
import re
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

import benchmark
import benchmark_measure
import benchmark_players
import benchmark_report
import common
import decision_overhead
from benchmark_measure import Result, difference, interval
from vitprune_env import TokenGame, load_backbone
from vitprune_env.agents import AdaptivePolicy, TokenActor, TokenPolicy, save_policy
from vitprune_env.data import Digits, batches_of
from vitprune_env.errors import CheckpointError, ParameterError, UnknownNameError


def marks(seeds: int, images: int, share: float, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).random((seeds, images)) < share).astype(float)


def test_wilson_interval_by_hand() -> None:
    correct = np.array([[1.0] * 8 + [0.0] * 2])  # 8 of 10: Wilson's interval of the textbooks
    assert interval(correct) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    low, high = interval(np.ones((1, 20)))
    assert (low, high) == pytest.approx((0.8389, 1.0), abs=1e-4)


def test_interval_of_several_seeds_covers_the_spread_of_images_and_of_seeds() -> None:
    same = np.repeat(marks(1, 400, 0.7), 5, axis=0)  # seeds that agree tell nothing new
    low, high = interval(same)
    one = interval(same[:1])
    assert high - low == pytest.approx(one[1] - one[0], rel=0.1)
    apart = np.concatenate([np.ones((2, 400)), np.zeros((2, 400))])  # seeds that disagree altogether
    low, high = interval(apart)
    assert low < 0.1
    assert high > 0.9


def test_differences_are_paired() -> None:
    base = marks(1, 500, 0.6)
    better = base.copy()
    better[0, np.flatnonzero(base[0] == 0)[:25]] = 1
    gain, low, high = difference(better, base)
    assert gain == pytest.approx(0.05)
    assert 0.03 < low < 0.05 < high < 0.075  # unpaired it would reach below 0
    assert difference(base, base) == (0.0, 0.0, 0.0)
    back, below, above = difference(base, better)
    assert (back, below, above) == pytest.approx((-gain, -high, -low))


def result(method: str, share: float, accuracy: float = 0.8, group: str = "baseline", **changes: object) -> Result:
    count = round(20 * accuracy)
    base = Result(
        method, group, share, gmacs=share * 0.03, policy_gmacs=0.0003, correct=("1" * count + "0" * (20 - count),),
        keep_per_site=(0.5, 0.25), sites=("1", "3"), images_per_s=200.0, dense_images_per_s=100.0, speedup=2.0,
    )  # fmt: skip
    return replace(base, **changes)


SETTINGS = {"seed": 0, "images": 20, "sites": "backbone"}


def test_results_are_kept_and_found_again(tmp_path: Path) -> None:
    store = benchmark_report.Store(tmp_path, SETTINGS, resume=False)
    first, second = result("evit", 0.25, source=((0, 0, -1),), predicted=(3,)), result("evit", 0.5)
    store.add(first)
    store.add(second)
    again = benchmark_report.Store(tmp_path, SETTINGS, resume=True)
    assert again.results == [first, second]
    assert again.find("evit", 0.25, "") == first
    assert again.find("evit", 0.35, "") is None
    assert again.find("evit", 0.25, "another checkpoint") is None
    better = replace(first, gmacs=0.1)
    again.add(better)
    assert again.results == [second, better]
    assert benchmark_report.Store(tmp_path, SETTINGS, resume=False).results == []


def test_results_of_other_settings_are_refused(tmp_path: Path) -> None:
    benchmark_report.Store(tmp_path, SETTINGS, resume=False).add(result("evit", 0.25))
    with pytest.raises(CheckpointError, match=r"same settings to resume, got other images 20 \(now 30\)"):
        benchmark_report.Store(tmp_path, SETTINGS | {"images": 30}, resume=True)
    (tmp_path / "results.json").write_text("[]")
    with pytest.raises(CheckpointError, match="expected results of the benchmark"):
        benchmark_report.Store(tmp_path, SETTINGS, resume=True)


def test_table_ranks_by_accuracy_and_names_what_is_out_of_reach() -> None:
    rows = [
        result("dense", 1.0, 0.95, "control", speedup=1.0),
        result("random", 0.25, 0.5, "control"),
        result("poor", 0.25, 0.4),
        result("good", 0.25, 0.9),
        Result("stuck", "baseline", 0.25, out_of_reach="reaches 0.02 to 0.03 GMACs"),
    ]
    text = benchmark_report.tables(rows, 0.03)
    assert "### 25% of the dense GMACs (0.00750)" in text
    names = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("|")][2:]
    assert names == ["*dense*", "good", "*random*", "poor"]
    good = next(line for line in text.splitlines() if line.startswith("| good"))
    low, high = (100 * value for value in interval(rows[3].table))
    assert f"| 90.0 ({low:.1f} to {high:.1f}) | +40.0 (" in good
    assert "| 0.00750 | 25.0 | 1.0 | 50 / 25 | 200 | 2.00x |" in good
    assert "- stuck: reaches 0.02 to 0.03 GMACs" in text
    assert all(line.count("|") == 10 for line in text.splitlines() if line.startswith("|"))


def test_csv_has_a_line_per_method_and_budget(tmp_path: Path) -> None:
    rows = [result("evit", 0.25), Result("stuck", "baseline", 0.25, out_of_reach="why")]
    benchmark_report.write_csv(rows, tmp_path / "results.csv")
    with (tmp_path / "results.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    assert [row["method"] for row in found] == ["evit", "stuck"]
    assert float(found[0]["accuracy"]) == 0.8
    assert float(found[0]["accuracy_low"]) < 0.8 < float(found[0]["accuracy_high"])
    assert (found[1]["accuracy"], found[1]["out_of_reach"]) == ("", "why")


def test_pareto_figure_has_a_line_per_method() -> None:
    rows = [result("dense", 1.0, 0.95, "control"), result("evit", 0.5, 0.9), result("evit", 0.25, 0.7),
            result("random", 0.25, 0.4, "control")]  # fmt: skip
    figure = benchmark_report.pareto(rows, 0.03, "title")
    figure.canvas.draw()
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["dense 95.0%", "evit", "random"]
    drawn = {
        container.get_label(): cast(Any, container).lines[0].get_xydata() for container in figure.axes[0].containers
    }
    assert drawn["evit"] == pytest.approx(np.array([[0.25, 0.7], [0.5, 0.9]]))


def test_budgets_and_counts_are_checked() -> None:
    with pytest.raises(ValueError, match=r"budgets: expected shares .* got 1\.5"):
        benchmark.checked(benchmark.Args(budgets=(0.3, 1.5)))
    with pytest.raises(ValueError, match="images: expected 1 or more, got 0"):
        benchmark.checked(benchmark.Args(images=0))
    assert benchmark.checked(benchmark.Args(split="val")).settings["split"] == "validation"


def test_controls_take_part_whatever_is_asked_for() -> None:
    names = [player.name for player in benchmark_players.contestants(["topk"], [])]
    assert names == ["random", "untrained actor", "topk"]
    with pytest.raises(UnknownNameError, match="did you mean evit"):
        benchmark_players.contestants(["evt"], [])


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[float, Path]:
    backbone, found = load_backbone("vit_digits"), {}
    dense = TokenGame(backbone).cost.dense()
    for share in (0.3, 0.6):
        actor = TokenActor(backbone.embed_dim, generator=torch.Generator().manual_seed(round(10 * share)))
        found[share] = tmp_path_factory.mktemp("policy") / "policy.safetensors"
        save_policy(TokenPolicy(actor, info={"target_macs": share * dense}), found[share])
    return found


def small_task(tmp_path: Path) -> benchmark_players.Task:
    return benchmark_players.Task(
        load_backbone("vit_digits"), Digits("train", 32), batches_of(Digits("train", 16, seed=1), 16),
        batches_of(Digits("validation", 24, seed=2), 16), seed=0, seeds=2, published_sites=False, output=tmp_path,
        resume=False, quick=True,
    )  # fmt: skip


def test_of_several_checkpoints_the_nearest_budgets_play(checkpoints: dict[float, Path], tmp_path: Path) -> None:
    paths = [str(checkpoints[0.6].parent), str(checkpoints[0.3]), f"other={checkpoints[0.3]}"]
    ours, other = benchmark_players.contestants(["evit"], paths)[-2:]
    assert (ours.name, other.name, ours.group) == ("MAPPO", "other", "learned")
    assert ours.origin != other.origin
    task = small_task(tmp_path)
    for share in (0.3, 0.6):
        (policy,) = cast(Any, ours).policies(task, 1.05 * share * task.dense_gmacs)
        assert policy.info["target_macs"] == pytest.approx(share * task.dense_gmacs * 1e9)
        game = TokenGame.for_policy(task.backbone, policy)
        outcome = benchmark_measure.play(game, policy, task.tune[0][0]).outcome
        assert float(outcome.macs.mean()) == pytest.approx(1.05 * share * task.dense_gmacs * 1e9, rel=0.05)


def test_policies_for_a_range_of_budgets_are_told_the_asked_one(tmp_path: Path) -> None:
    task, path = small_task(tmp_path), tmp_path / "policy.safetensors"
    actor = TokenActor(task.backbone.embed_dim + 1, generator=torch.Generator().manual_seed(0))
    save_policy(AdaptivePolicy(actor, (0.3, 0.6), (0.0, 0.0), info={"target_macs": 0.6}), path)
    player = benchmark_players.contestants([], [str(path)])[-1]
    for share, told in ((0.4, 0.4), (0.25, 0.3)):
        (policy,) = cast(Any, player.policies(task, share * task.dense_gmacs))
        assert policy.share == pytest.approx(told)


def test_policies_with_a_network_of_their_own_are_refused(tmp_path: Path) -> None:
    actor = TokenActor(64, generator=torch.Generator().manual_seed(0))
    save_policy(TokenPolicy(actor, info={"finetune": "after"}), tmp_path / "policy.safetensors")
    with pytest.raises(CheckpointError, match="got one with a fine-tuned network of its own"):
        benchmark_players.contestants([], [str(tmp_path)])


def test_measured_is_what_was_played(tmp_path: Path) -> None:
    task = small_task(tmp_path)
    player = next(entry for entry in benchmark_players.contestants([], []) if entry.name == "random")
    found = benchmark_measure.measure(player, 0.4, task, pairs=1, timed=4)
    assert len(found.correct) == 2
    assert {len(row) for row in found.correct} == {24}
    assert found.gmacs == pytest.approx(0.4 * task.dense_gmacs, rel=0.03)
    assert found.keep_per_site[0] > found.keep_per_site[1] > found.keep_per_site[2] > 0
    source = torch.tensor(found.source)
    assert source.shape == (8, task.backbone.num_patches)
    alive = (source == torch.arange(task.backbone.num_patches)).sum(dim=1)
    assert alive.float().mean() / task.backbone.num_patches == pytest.approx(found.keep_per_site[-1])
    assert found.speedup > 0
    assert Result.load(json.loads(json.dumps(asdict(found)))) == found


def test_fitted_methods_are_fitted_for_the_budget_and_brought_to_it(tmp_path: Path) -> None:
    task = small_task(tmp_path)
    fitted, unfitted = benchmark_players.contestants(["life_regression"], [])[-1:1:-1]
    assert (fitted.name, unfitted.name) == ("life_regression", "life_regression (unfitted)")
    (policy,) = fitted.policies(task, 0.4 * task.dense_gmacs)
    assert list((tmp_path / "fits").glob("life_regression-0.4/*.safetensors"))
    found = benchmark_measure.measure(replace(fitted, policies=lambda *_: [policy]), 0.4, task, pairs=1, timed=4)
    assert found.gmacs == pytest.approx(0.4 * task.dense_gmacs, rel=0.03)
    assert len(unfitted.policies(task, 0.4 * task.dense_gmacs)) == task.seeds


def test_overhead_of_every_method_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--quick", "--rounds", "1", "--methods", "evit", "tome", "dpc_mlp", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["decision_overhead.py", *flags])
    common.run(decision_overhead.main)
    rows = {row["method"]: row for row in json.loads((tmp_path / "overhead.json").read_text())["rows"]}
    assert set(rows) == {"evit", "tome", "dpc_mlp"}
    for row in rows.values():
        assert min(row["half_ms"], row["decide_ms"], row["reduce_ms"]) > 0
    assert rows["evit"]["sites"] == ["1", "3", "5"]
    assert (tmp_path / "table.md").read_text() in capsys.readouterr().out


def test_parameters_follow_a_name(tmp_path: Path) -> None:
    player = benchmark_players.contestants(["dpc:strategy=cluster,clusters=2"], [])[-1]
    (policy,) = cast(Any, player.policies(small_task(tmp_path), 0.012))
    assert (player.name, policy.strategy, policy.clusters) == ("dpc:strategy=cluster,clusters=2", "cluster", 2)
    with pytest.raises(ParameterError, match=r"strategi: no parameter of 'dpc', .* did you mean strategy"):
        benchmark_players.contestants(["dpc:strategi=cluster"], [])


def test_out_of_reach_is_a_result(tmp_path: Path) -> None:
    player = next(entry for entry in benchmark_players.contestants([], []) if entry.name == "evit")
    found = benchmark_measure.measure(player, 0.01, small_task(tmp_path), pairs=1, timed=4)
    assert re.search(r"target_gmacs: EViT reaches .* to .* GMACs here", found.out_of_reach)
    assert not found.correct


def test_a_whole_run_is_resumed_and_extended(
    checkpoints: dict[float, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(*flags: object) -> list[dict]:
        line = ["benchmark.py", "--quick", "--methods", "topk", "--output", tmp_path, *flags]
        monkeypatch.setattr(sys, "argv", list(map(str, line)))
        common.run(benchmark.main)
        return json.loads((tmp_path / "results.json").read_text())["results"]

    first = command("--budgets", 0.4)
    assert [row["method"] for row in first] == ["dense", "random", "untrained actor", "topk"]
    assert (tmp_path / "table.md").read_text() in capsys.readouterr().out
    rows = command("--budgets", 0.4, "--checkpoints", checkpoints[0.6], "--resume")
    assert rows[:4] == first  # nothing was measured again
    assert [(row["method"], row["share"]) for row in rows[4:]] == [("MAPPO", 0.4)]
    for name in ("pareto.png", "tokens-40.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit, match=r"error: .* settings to resume, got other seed 0 \(now 1\)"):
        command("--resume", "--seed", 1)
