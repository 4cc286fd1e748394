"""What a comparison does only once: decoding, the blocks before the first site, runs, fits; and policies in files."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from helpers import random_images, toy
from vitprune_env import KeepAll, TokenGame, benchmark, load_backbone, play
from vitprune_env.baselines import EViT, calibrate, describe, make
from vitprune_env.benchmarking import BenchmarkResult, Fits, Timing, comparison, measurement
from vitprune_env.benchmarking.contestants import Task, contestants_of, load_object, methods
from vitprune_env.benchmarking.contestants.policies import of_factory
from vitprune_env.benchmarking.images import read_once
from vitprune_env.benchmarking.prepared import PreparedImages, spread_rows
from vitprune_env.cli import benchmark as command
from vitprune_env.cli import main
from vitprune_env.data import Digits, batches_of, open_images
from vitprune_env.engine.walk import Packed
from vitprune_env.errors import CheckpointError, SettingsError
from vitprune_env.policy import BasePolicy
from vitprune_env.types import Decision, Observation

FEW = batches_of(Digits("validation", 12, seed=5), 5)


@pytest.fixture(scope="module")
def backbone() -> Any:
    return load_backbone("vit_digits")


@pytest.fixture
def task(backbone: Any) -> Task:
    tune = PreparedImages(backbone, batches_of(Digits("train", 16, seed=1), 16))
    return Task(backbone, PreparedImages(backbone, FEW), tune, Digits("train", 64), seeds=2, fits=Fits(quick=True))


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Half-blocks before which the tokens of a batch were prepared, one entry per batch."""
    found: list[int] = []
    whole = Packed.run

    def counted(self: Packed, state: Any, stop: int, *rest: Any) -> Any:
        if state.half == 0:
            found.append(stop)
        return whole(self, state, stop, *rest)

    monkeypatch.setattr(Packed, "run", counted)
    return found


def test_the_blocks_before_the_first_site_run_once(backbone: Any, runs: list[int]) -> None:
    images = PreparedImages(backbone, FEW)
    found = {}
    for policy in (EViT(0.5), EViT(0.7), make("dpc", keep_rate=0.5), KeepAll()):
        game = TokenGame.for_policy(backbone, policy, sites=(3, 5))
        logits = [play(game, policy, inputs).outcome.logits for inputs, _ in images.inputs(game)]
        found[type(policy).__name__, getattr(policy, "keep_rate", 1)] = torch.cat(logits)
    assert runs == [4, 4, 4, 6, 6, 6]  # 3 batches up to block 3, with and without its attention
    policy = EViT(0.7)
    game = TokenGame.for_policy(backbone, policy, sites=(3, 5))
    plain = torch.cat([play(game, policy, batch).outcome.logits for batch, _ in FEW])
    assert torch.equal(found["EViT", 0.7], plain)


def test_tokens_that_do_not_fit_are_computed_again(
    backbone: Any, runs: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    game = TokenGame(backbone, (3, 5))
    size = 12 * (backbone.num_patches + backbone.num_prefix) * backbone.embed_dim * 4
    small = PreparedImages(backbone, FEW, memory=size - 1)
    for _ in range(2):
        assert sum(len(labels) for _, labels in small.inputs(game)) == 12
    assert len(runs) == 6
    assert "do not fit in memory" in caplog.text
    one = PreparedImages(backbone, FEW, memory=size)  # one place at a time: what was asked for last stays
    runs.clear()
    for sites in ((3, 5), (3, 5), (2, 5), (3, 5)):
        list(one.inputs(TokenGame(backbone, sites)))
    assert runs == [6, 6, 6, 4, 4, 4, 6, 6, 6]


def test_few_images_are_evenly_spread(backbone: Any) -> None:
    assert list(spread_rows(12, 4)) == [0, 3, 6, 9]
    assert list(spread_rows(2, 4)) == [0, 1]
    ((images, labels),) = list(PreparedImages(backbone, FEW).spread(4))
    everything = torch.cat([batch for batch, _ in FEW])
    assert torch.equal(images, everything[[0, 3, 6, 9]])
    assert labels.tolist() == torch.cat([targets for _, targets in FEW])[[0, 3, 6, 9]].tolist()


def test_files_are_decoded_once(backbone: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for index in range(10):
        (tmp_path / str(index)).mkdir()
        Image.new("L", (8, 8), 20 * index).save(tmp_path / str(index) / "image.png")
    (tmp_path / "0" / "broken.png").write_bytes(b"nothing")
    files = open_images(backbone, tmp_path, workers=0)
    once = cast(Any, read_once(files))
    assert (len(files), len(once)) == (11, 10)
    assert once.labels.tolist() == list(range(10))
    images, labels = once.batch([3, 5])
    assert torch.equal(images[1], once[5][0])
    assert labels.tolist() == [3, 5]
    monkeypatch.setattr("vitprune_env.benchmarking.images.IN_MEMORY", 100)
    assert read_once(files) is files  # too large: read again and again
    scenes = Digits("train", 3)
    assert read_once(scenes) is scenes


def test_the_search_meets_the_budget_in_few_passes(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    """A method with fixed counts never plays all images; one whose counts depend on the image does so a few times."""
    played: list[int] = []
    search = "vitprune_env.benchmarking.contestants.search.play"

    def counted(game: Any, policy: Any, images: Any) -> Any:
        episode = play(game, policy, images)
        played.append(len(episode.outcome.macs))
        return episode

    monkeypatch.setattr(search, counted)
    budget = 0.5 * task.dense_gmacs
    lines = {line.name: line for line in contestants_of(["evit", "ats"])}
    (policy,) = cast(Any, lines["evit"].at(task, budget))
    assert set(played) == {8}
    assert len(played) < 25
    batches = list(task.tune)
    careful = calibrate(EViT, budget, task.backbone, batches, sites=task.backbone.default_sites)
    assert policy.keep_rate == pytest.approx(careful.keep_rate, abs=0.003)
    played.clear()
    (ats,) = lines["ats"].at(task, budget)
    assert 1 <= played.count(16) <= 5
    game = TokenGame.for_policy(task.backbone, ats, sites=lines["ats"].sites(task))
    assert float(play(game, ats, batches[0][0]).outcome.macs.mean()) == pytest.approx(budget * 1e9, rel=0.01)


def test_fits_for_the_middle_are_turned_to_the_other_budgets(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[float] = []
    whole = methods.fit

    def counted(*args: Any, **options: Any) -> Any:
        trained.append(args[3] / task.dense_gmacs)
        return whole(*args, **options)

    monkeypatch.setattr(methods, "fit", counted)
    line = contestants_of(["life_regression"])[-1]
    once = replace(task, shares=(0.4, 0.6, 0.5), fits=Fits("middle", quick=True))
    policies = [cast(Any, line.at(once, share * task.dense_gmacs)[0]) for share in once.shares]
    assert trained == pytest.approx([0.5])
    assert policies[0].keep_rate < policies[2].keep_rate < policies[1].keep_rate
    trained.clear()
    each = replace(task, shares=(0.4, 0.6), fitted={})
    for share in each.shares:
        line.at(each, share * task.dense_gmacs)
    assert trained == pytest.approx([0.4, 0.6])
    assert methods._config(describe("ltmp"), replace(task, fits=Fits(steps=7))).steps == 7
    assert methods._config(describe("dynamicvit"), replace(task, fits=Fits(steps=7))).fit.steps == 7


def test_published_sites_are_a_second_row_where_they_are_others(task: Task) -> None:
    lines = contestants_of(["evit", "tome", "ats", "dynamicvit", "life_regression"])
    second = {line.name: line.published(task) for line in lines}
    names = {name: None if line is None else line.name for name, line in second.items()}
    assert names["evit"] == "evit (published sites)"
    assert names["life_regression"] == "life_regression (published sites)"
    assert [name for name, line in names.items() if line is not None] == ["evit", "ats", "life_regression"]
    assert second["evit"] is not None
    assert list(map(str, second["evit"].sites(task) or ())) == ["3.attn", "5.attn", "7.attn"]  # 4, 7 and 10 of 12


def compare(backbone: Any, output: Path, **options: Any) -> BenchmarkResult:
    return benchmark(
        ["evit"], backbone, Digits("validation", 20), tune=Digits("train", 8), budgets=(0.9,), sites=(6,), seeds=2,
        output=output, progress=False, **{"timing": None, **options},
    )  # fmt: skip


def test_an_interrupted_row_goes_on_with_its_remaining_seeds(
    backbone: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BenchmarkResult, "save", lambda *_: None)
    whole = compare(backbone, tmp_path / "whole")
    played: list[str] = []

    def stopping(backbone: Any, policy: Any, *rest: Any) -> Any:
        played.append(type(policy).__name__)
        if len(played) == 3:
            raise KeyboardInterrupt
        return measurement.run_of(backbone, policy, *rest)

    monkeypatch.setattr(comparison, "run_of", stopping)
    with pytest.raises(KeyboardInterrupt):
        compare(backbone, tmp_path / "stopped")
    stored = json.loads((tmp_path / "stopped" / "results.json").read_text())
    assert [row["name"] for row in stored["results"]] == ["dense"]
    assert [(row["name"], len(row["runs"])) for row in stored["unfinished"]] == [("random", 1)]
    again = compare(backbone, tmp_path / "stopped", resume=True)
    assert played == ["KeepAll", "RandomDrop", "RandomDrop", "RandomDrop", "TokenPolicy", "TokenPolicy", "EViT"]
    assert again.table() == whole.table()  # and two whole comparisons give the same numbers
    assert [replace(row, seconds=0) for row in again.rows] == [replace(row, seconds=0) for row in whole.rows]


def test_precision_is_noted_and_kept(backbone: Any, tmp_path: Path) -> None:
    half = compare(backbone, tmp_path, amp="bf16", timing=Timing(1, 2, 1), controls=False)
    assert half.settings["precision"] == "bf16"
    assert "threads, bf16" in (tmp_path / "table.md").read_text()
    assert not torch.is_autocast_enabled("cpu")
    with pytest.raises(CheckpointError, match=r"got other precision 'bf16' \(now 'fp32'\)"):
        compare(backbone, tmp_path, resume=True)
    with pytest.raises(ValueError, match="amp: expected one of off"):
        compare(backbone, tmp_path, amp="int8")


OWN = """
from dataclasses import dataclass
from vitprune_env import BasePolicy, Decision
from vitprune_env.policy import keep_top

@dataclass(frozen=True)
class KeepLoud(BasePolicy):
    keep_rate: float

    def decide(self, obs):
        return Decision(keep=keep_top(obs, obs.tokens.norm(dim=1), (obs.num_alive * self.keep_rate).ceil().long()))
"""


def test_policies_of_ones_own_are_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "my_policy.py"
    file.write_text(OWN)
    found = command.entries(
        command.parse(["--methods", "evit", "--policies", f"{file}:KeepLoud", f"two={file}:KeepLoud"])
    )
    assert list(found) == ["evit", "KeepLoud", "two"]
    line = contestants_of(found)[-1]
    file.write_text(OWN + "\n    extra = 1\n")
    changed = contestants_of({"two": load_object(f"{file}:KeepLoud")})[-1]
    assert line.origin != changed.origin  # an edited policy is measured again
    assert load_object("vitprune_env.baselines:EViT") is EViT
    package = tmp_path / "somebodys_package"
    package.mkdir()
    (package / "policies.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])
    (found,) = contestants_of(["somebodys_package.policies:KeepLoud"], controls=False)
    assert (found.name, found.group) == ("KeepLoud", "own"), "from the working folder"
    for text, message in (
        ("my_policy.py", "expected FILE.py:NAME or module:NAME, got 'my_policy.py'"),
        (f"{tmp_path}/none.py:KeepLoud", "no such file"),
        (f"{file}:Loud", "expected a name in .*my_policy.py, got 'Loud'"),
        ("no_such_module:Loud", "No module named"),
    ):
        with pytest.raises(SettingsError, match=message):
            load_object(text)


def test_flags_of_files_and_of_the_built_in_task(tmp_path: Path) -> None:
    digits, files = command.parse([]), command.parse(["--data-dir", str(tmp_path)])
    assert (digits.budgets, digits.amp, digits.fits, digits.seeds) == ((0.25, 0.35, 0.5), "off", "each", 5)
    assert (files.budgets, files.amp, files.fits, files.seeds) == ((0.7, 0.5, 0.35), "auto", "middle", 3)
    assert (digits.fit_steps, files.fit_steps) == (None, 60)
    assert command.parse(["--data-dir", str(tmp_path), "--seeds", "7"]).seeds == 7
    assert command.parse(["--quick", "--images", "10"]).images == 10  # quick never raises what was asked for
    assert command.parse(["--quick"]).images == 64
    assert command.sites_of(command.parse(["--sites", "both"])) == "both"
    assert command.sites_of(command.parse(["--sites", "3", "6"])) == ("3", "6")


def test_the_command_writes_a_page_that_can_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)  # the page is what counts here
    file = tmp_path / "my_policy.py"
    file.write_text(OWN)
    words = ["benchmark", "--quick", "--images", "12", "--seeds", "1", "--methods", "evit", "--policies",
             f"{file}:KeepLoud", "--budgets", "0.5", "--output", str(tmp_path / "out")]  # fmt: skip
    main(words)
    text = (tmp_path / "out" / "table.md").read_text()
    assert "vitprune " + " ".join(words) in text
    assert "| KeepLoud | 1, 3, 5 |" in text
    assert "| evit (published sites) | 3.attn, 5.attn, 7.attn |" in text


@dataclass
class Uneven(BasePolicy):
    """Images with bright pixels keep another share than the others: none below one keep rate, all above another."""

    keep_rate: float
    start: float = 0.6
    needs = frozenset({"brightness"})

    def decide(self, obs: Observation) -> Decision:
        """Keep the first tokens."""
        brightness = obs.scatter(obs.evidence["brightness"]).mean(dim=1)
        odd = 1.0 if self.keep_rate > self.start + 0.2 else max(0.0, (self.keep_rate - self.start) / 0.2)
        share = self.keep_rate + 0.1 * (brightness < -1.5)  # of the darkest image a few more
        share = torch.where(brightness > 0, odd if self.start < 0.8 else float(self.keep_rate > 0.8), share)
        return Decision(keep=obs.alive & (torch.arange(obs.num_agents) < (share * obs.num_agents)[:, None]))


def test_the_search_is_not_misled_by_few_images_that_are_not_like_the_others(caplog: pytest.LogCaptureFixture) -> None:
    """The few, every second image, keep the keep rate; of all others none up to a rate of 0.6, and all from 0.8 on."""
    backbone = toy("deit_tiny_patch16_224")
    images = random_images(backbone, 16)
    images += torch.where(torch.arange(16) % 2 == 0, -1.0, 1.0)[:, None, None, None] - images.mean(
        dim=(1, 2, 3), keepdim=True
    )
    images[0] -= 1
    tune = PreparedImages(backbone, [(images, torch.zeros(16, dtype=torch.int64))])
    task = Task(backbone, tune, tune, sites=(1,))
    budget = 0.7 * task.dense_gmacs
    (policy,) = of_factory("uneven", Uneven).at(task, budget)
    game = TokenGame.for_policy(backbone, policy, sites=(1,))
    assert float(play(game, policy, images).outcome.macs.mean()) / 1e9 == pytest.approx(budget, rel=0.02)
    assert not task.notes
    (policy,) = of_factory("jumps", lambda keep_rate: Uneven(keep_rate, start=0.8)).at(task, budget)
    macs = float(play(game, policy, images).outcome.macs.mean()) / 1e9
    assert abs(macs / budget - 1) > 0.02
    assert task.notes == [f"no setting found nearer to the budget than {100 * macs / task.dense_gmacs:.3g} % of dense"]
    assert "Uneven: no setting found nearer to the budget" in caplog.text
