"""What is watched: progress bar, history file, TensorBoard, Weights & Biases, pictures of pruned tokens."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer
from test_trainer import run

from failures import fill_the_disk
from games import NAME
from helpers import random_images, toy
from runs import TINY, but
from vitprune_env.agents.runs.log import RunLog, postfix
from vitprune_env.agents.runs.pictures import tokens_picture
from vitprune_env.agents.shared import writers
from vitprune_env.agents.shared.writers import HistoryFile, TensorBoard, WeightsAndBiases
from vitprune_env.baselines import RandomDrop
from vitprune_env.errors import MissingPackageError, StorageError
from vitprune_env.game.token_game import TokenGame

SHORT = but(TINY, updates=4, checkpoint_every=2, cache_images=16, calibration_images=8)
WATCHED = ("accuracy", "gmacs", "keep/1", "keep/3", "loss", "ent_loss", "approx_kl", "clip_frac", "explained_variance")


class FakeWandb(ModuleType):
    """Keeps what it is given; like wandb itself, it takes no second row for a step that is past."""

    Image = staticmethod(np.asarray)

    def __init__(self) -> None:
        super().__init__("wandb")
        self.inits: list[dict[str, Any]] = []
        self.rows: dict[int, dict[str, Any]] = {}
        self.finished = 0
        self.id = "abc"

    def init(self, **options: Any) -> FakeWandb:
        self.inits.append(options)
        return self

    def log(self, row: dict[str, Any], step: int) -> None:
        if not self.rows or step >= max(self.rows):
            self.rows.setdefault(step, {}).update(row)

    def finish(self) -> None:
        self.finished += 1


class Clock:
    """Time that passes only while somebody sleeps."""

    now = 1_700_000_000.0

    def time(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_a_run_taken_up_in_the_same_second_voids_what_it_does_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though TensorBoard would read the tenth file of a process before the ninth."""
    clock = Clock()
    monkeypatch.setattr(event_file_writer, "time", clock)
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(9))
    monkeypatch.setattr(writers, "time", clock)
    for done, updates in ((0, (1, 2, 3)), (2, (3, 4))):
        board = TensorBoard(tmp_path, done)
        for update in updates:
            board.write({"update": float(update), "run": float(done)}, update)
        board.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.value for event in events.Scalars("training/update")] == [1, 2, 3, 4]
    assert [event.value for event in events.Scalars("training/run")] == [0, 0, 2, 2]


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_tensorboard_shows_all_that_is_worth_watching(tmp_path: Path) -> None:
    result = run(but(SHORT, log_images_every=2), output=tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0}).Reload()
    steps = [16 * 3 * update for update in (1, 2, 3, 4)]
    for name in WATCHED:
        found = events.Scalars(f"training/{name}")
        assert [event.step for event in found] == steps
        assert [event.value for event in found] == pytest.approx([row[name] for row in result.history], rel=1e-6)
    pictures = events.Images("tokens")
    assert [picture.step for picture in pictures] == steps[1::2]
    assert pictures[0].width > pictures[0].height / 4 * 3  # four rows of an image and three sites


def test_the_progress_bar_shows_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    from test_trainer import DATA

    from vitprune_env.agents import train

    history = train(toy(NAME), DATA, **but(SHORT, updates=2).arguments, progress=True).history
    shown = capsys.readouterr().err
    assert postfix(history[-1]) in shown.replace("\n", "")
    row = dict.fromkeys((*WATCHED, "share", "target_share", "price"), 0.25)
    assert postfix(row) == (
        "accuracy 0.250, GMACs 0.2500 (25% of dense, target 25%), keep 0.25 0.25, price 0.25, "
        "loss 0.25, entropy 0.25, kl 0.25, clip 0.25, ev 0.25"
    )


def test_pictures_show_what_each_site_prunes() -> None:
    backbone = toy(NAME)
    game = TokenGame(backbone, (1, 2, 3))
    images = random_images(backbone, 2)
    picture = tokens_picture(game, RandomDrop(0.5), images)
    assert picture.dtype == np.uint8
    height, width = picture.shape[0] // 2, picture.shape[1]
    assert width > 3.5 * height
    everything = tokens_picture(game, RandomDrop(1.0), images)
    panel = (width - 3 * 10) // 4 + 10
    assert np.array_equal(picture[:, : panel - 10], everything[:, : panel - 10])  # the image itself
    fresh = everything[:, : panel - 10]
    changed = [(picture[:, at * panel :][:, : panel - 10] != fresh).any(2).mean() for at in (1, 2, 3)]
    assert changed == sorted(changed)
    assert changed[0] == pytest.approx(0.5, abs=0.05)
    assert changed[2] == pytest.approx(0.875, abs=0.05)
    assert Image.fromarray(picture).size == (width, 2 * height)


def test_pictures_change_nothing_that_is_learnt() -> None:
    plain = run(SHORT)
    assert [row["loss"] for row in plain.history] == [
        row["loss"] for row in run(but(SHORT, log_images_every=1)).history
    ]


def test_wandb_gets_every_row_once(wandb: FakeWandb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from test_resume import before_update

    config = but(SHORT, wandb="pruning", log_images_every=2)
    with monkeypatch.context() as patch:
        before_update(patch, 4, lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(config, output=tmp_path)
    assert len(wandb.rows) == 3
    history = run(config, output=tmp_path, resume=True).history
    assert [options["id"] for options in wandb.inits] == [None, "abc"]
    assert wandb.inits[0]["project"] == "pruning"
    assert wandb.inits[0]["config"]["run"]["images"] == 16
    assert list(wandb.rows) == [48, 96, 144, 192]
    assert [row["loss"] for row in wandb.rows.values()] == [row["loss"] for row in history]
    assert ["tokens" in row for row in wandb.rows.values()] == [False, True, False, True]
    assert wandb.rows[96]["tokens"].ndim == 3
    assert wandb.finished == 2


def test_wandb_must_be_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingPackageError, match="expected the package wandb to log to project 'p', found none; pip"):
        WeightsAndBiases("p", tmp_path, {})
    assert not list(tmp_path.iterdir())


def test_a_history_forgets_what_the_checkpoint_has_not_seen(tmp_path: Path) -> None:
    rows = [{"update": float(update), "loss": 0.1 * update} for update in range(1, 5)]
    history = HistoryFile(tmp_path, [])
    for row in rows:
        history.write(row, 0)
    again = HistoryFile(tmp_path, rows[:2])
    again.write(rows[2], 0)
    again.show(np.zeros((2, 2, 3), np.uint8), 0)
    again.close()
    assert [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()] == rows[:3]


def test_events_forget_it_too(tmp_path: Path) -> None:
    for done, values in ((0, (1.0, 2.0, 3.0)), (2, (4.0,))):
        board = TensorBoard(tmp_path, 10 * done)
        for number, value in enumerate(values, start=done + 1):
            board.write({"loss": value}, 10 * number)
        board.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("training/loss")
    assert [(event.step, event.value) for event in events] == [(10, 1.0), (20, 2.0), (30, 4.0)]


def test_a_log_that_cannot_be_written_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = RunLog(lambda played, learnt: {**played, **learnt}, 1, 0, 3, [HistoryFile(tmp_path, [])])
    fill_the_disk(monkeypatch, tmp_path)
    row = dict.fromkeys((*WATCHED, "share", "target_share", "price", "update"), 0.5)
    with pytest.raises(StorageError, match=r"HistoryFile: could not be written .*No space left"):
        log.log_training_data(row, 3)


def test_what_tianshou_hands_over_arrives_in_the_row() -> None:
    rows: list[dict[str, float]] = []
    log = RunLog(lambda played, learnt: rows.append({**played, **learnt}) or rows[-1], 2, 1, 3)
    assert log.restore_data() == (1, 3, 1)
    log.log_update_data({"loss": {"mean": 2.0, "std": 1.0}, "approx_kl": 0.5, "other": 7}, 2)
    played = dict.fromkeys(("accuracy", "gmacs", "share", "target_share", "price"), 0.5)
    log.log_training_data(played, 6)
    assert rows == [{**played, "loss": 2.0, "approx_kl": 0.5}]
    saved: list[tuple[int, ...]] = []
    log.save_data(2, 6, 2, lambda *where: saved.append(where) or "")
    log.save_data(3, 9, 3)
    assert saved == [(2, 6, 2)]
    log.finalize()
