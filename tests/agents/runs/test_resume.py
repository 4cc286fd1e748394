"""Runs that are killed, stopped, starved of disk space or numerically ruined, and taken up again."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_trainer import DATA, NAME, assert_same, run, whole

from failures import Hostile, fill_the_disk
from games import OwnLabels
from helpers import toy
from places import SUPPORT
from runs import TINY, but
from vitprune_env.agents import MAPPO, train
from vitprune_env.agents.runs.divergence import check_health
from vitprune_env.agents.runs.folder import RunFolder
from vitprune_env.agents.shared.processes import Processes
from vitprune_env.agents.shared.signals import StopSignals, TrainingStopped
from vitprune_env.cli.flags import CommonFlags
from vitprune_env.data import Digits
from vitprune_env.errors import CheckpointError, NumericalError, StorageError
from vitprune_env.files import LOCK, load_state, locked

KILLS = SUPPORT / "kills.py"


def before_update(monkeypatch: pytest.MonkeyPatch, number: int, action: Any) -> None:
    """Do something before the `number`th update (1-based) of the coming run."""
    update, calls = MAPPO.update, []

    def patched(self: MAPPO, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == number:
            action(self)
        return update(self, *args, **kwargs)

    monkeypatch.setattr(MAPPO, "update", patched)


def logged(folder: Path) -> list[float]:
    """The updates in the history file, which TensorBoard shows as well, each once."""
    rows = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [event.value for event in events.Scalars("training/update")] == [row["update"] for row in rows]
    assert [round(event.value, 5) for event in events.Scalars("training/loss")] == [round(r["loss"], 5) for r in rows]
    return [row["update"] for row in rows]


@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_any_moment_a_run_ends_with_the_same_bits(kills: int, tmp_path: Path) -> None:
    paths = os.pathsep.join([str(KILLS.parents[1]), str(KILLS.parent), os.environ.get("PYTHONPATH", "")])
    line = [sys.executable, str(KILLS), str(tmp_path), str(kills), "0"]
    done = subprocess.run(line, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": paths})
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout)
    assert report["kills"] == kills
    assert report["different"] == 0, done.stderr[-2000:]
    for folder in (tmp_path / "whole", tmp_path / f"run{report['runs'] - 1}"):
        assert logged(folder) == list(range(1, 9))
        assert {path.name for path in folder.glob(".*")} <= {LOCK}, "nothing half written is left"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_update_finish_and_saves(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = but(TINY, checkpoint_every=100)
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        before_update(patch, 3, lambda _: signal.raise_signal(number))
        with pytest.raises(TrainingStopped, match=r"stopped after update 3 of 6; the checkpoint of update 3") as stop:
            run(config, output=tmp_path)
    assert stop.value.code == 128 + number
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert f"{number.name}: finishing the update" in caplog.text
    assert "resume (--resume) goes on from it" in caplog.text
    assert logged(tmp_path) == [1, 2, 3]
    assert_same(whole(), run(config, output=tmp_path, resume=True))
    assert logged(tmp_path) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("grace", [0.0, 0.2])
def test_a_second_signal_quits_at_once(grace: float, tmp_path: Path) -> None:
    """But not one that a launcher passes on a moment after the first."""

    def twice() -> None:
        with StopSignals(grace) as signals:
            signal.raise_signal(signal.SIGTERM)
            if grace:
                signal.raise_signal(signal.SIGTERM)
            assert signals.received == signal.SIGTERM
            (tmp_path / "still there").touch()
            time.sleep(1.5 * grace)
            signal.raise_signal(signal.SIGINT)
            (tmp_path / "survived").touch()

    child = os.fork()
    if not child:
        os.close(2)
        twice()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGINT
    assert [path.name for path in tmp_path.iterdir()] == ["still there"]


def test_without_an_output_folder_signals_do_what_they_always_do(monkeypatch: pytest.MonkeyPatch) -> None:
    before_update(monkeypatch, 2, lambda _: signal.raise_signal(signal.SIGINT))
    found = signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background are told to ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            run()
    finally:
        signal.signal(signal.SIGINT, found)


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = but(TINY, checkpoint_every=2)
    with monkeypatch.context() as patch:
        before_update(patch, 4, lambda _: fill_the_disk(patch, tmp_path))
        with pytest.raises(StorageError, match=r"No space left.*free some space: the checkpoint of update 2"):
            run(config, output=tmp_path)
    assert len(load_state(tmp_path / "training.safetensors")["history"]) == 2
    assert_same(whole(), run(config, output=tmp_path, resume=True))
    assert logged(tmp_path) == [1, 2, 3, 4, 5, 6]


def test_an_unwritable_folder_is_noticed_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before_update(monkeypatch, 1, lambda _: pytest.fail("training has begun"))
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="output: expected a folder that can be written"):
        run(output=tmp_path / "file" / "run")
    with pytest.raises(StorageError, match=r"output: expected a folder, got .*Not a directory"):
        CommonFlags(output=tmp_path / "file" / "run").prepare()
    fill_the_disk(monkeypatch, tmp_path)
    with pytest.raises(StorageError, match="No space left"):
        run(output=tmp_path / "new")


def poison(algorithm: MAPPO) -> None:
    """NaN in a parameter."""
    with torch.no_grad():
        next(algorithm.critic.parameters()).fill_(float("nan"))


def explode(algorithm: MAPPO) -> None:
    """Values a thousand times too large."""
    with torch.no_grad():
        list(algorithm.critic.parameters())[-1].fill_(1e3)


def ruin_afterwards(algorithm: MAPPO) -> None:
    """A step that nobody looks at any more leaves NaN behind."""
    step = algorithm.lr_schedulers[0].step

    def last(*args: Any, **options: Any) -> Any:
        poison(algorithm)
        return step(*args, **options)

    algorithm.lr_schedulers[0].step = last


def test_the_one_loss_of_a_learner_of_ones_own_is_watched_too() -> None:
    history = [{"update": float(update), "loss": -0.5} for update in range(1, 7)]
    check_health({"update": 7.0, "loss": -5.0}, history, torch.nn.Linear(2, 2))
    with pytest.raises(NumericalError, match=r"expected about 0\.5 .*, got 900 in update 7"):
        check_health({"update": 7.0, "loss": -900.0}, history, torch.nn.Linear(2, 2))


def test_a_loss_that_was_nearly_nothing_may_grow_to_an_ordinary_one() -> None:
    history = [{"update": float(update), "loss": 1e-7} for update in range(1, 7)]
    check_health({"update": 7.0, "loss": 0.9}, history, torch.nn.Linear(2, 2))  # below 1000 * 0.001
    with pytest.raises(NumericalError, match=r"got 1\.1 in update 7"):
        check_health({"update": 7.0, "loss": 1.1}, history, torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("ruin", "message"),
    [
        (poison, r"loss: expected finite numbers"),
        (ruin_afterwards, r"parameters: expected finite numbers after update 6, .*\bcritic\."),
        (explode, r"loss: expected about 0\.\d+ as in the updates before, got \S+ in update 6: training has exploded"),
    ],
    ids=["nan", "nan_in_last_step", "explosion"],
)
def test_a_ruined_run_stops_and_can_be_mended(
    ruin: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = but(TINY, checkpoint_every=1)
    with monkeypatch.context() as patch:
        before_update(patch, 6, ruin)
        advice = r".*the checkpoint of update 5 .*is kept"
        advice += r".*smaller lr \(now 0\.003\) or max_grad_norm \(now 0\.5\)"
        with pytest.raises(NumericalError, match=message + advice):
            run(config, output=tmp_path)
    mended, same = run(but(config, lr=1e-3), output=tmp_path, resume=True), whole()
    assert logged(tmp_path) == [1, 2, 3, 4, 5, 6]
    assert [row["loss"] for row in mended.history[:5]] == [row["loss"] for row in same.history[:5]]
    assert mended.history[5]["loss"] != same.history[5]["loss"]
    optimizer = load_state(tmp_path / "training.safetensors")["algorithm"]["_optimizers"][0]
    assert optimizer["param_groups"][0]["lr"] == pytest.approx(1e-3 * config.learner.lr_final)


def test_a_hostile_checkpoint_is_not_resumed(tmp_path: Path) -> None:
    torch.save({"history": Hostile(tmp_path / "touched")}, tmp_path / "training.safetensors")
    with pytest.raises(CheckpointError, match="unreadable"):
        run(output=tmp_path, resume=True)
    assert not (tmp_path / "touched").exists()


def test_another_dataset_is_not_resumed(tmp_path: Path) -> None:
    run(but(TINY, updates=1), output=tmp_path)
    with pytest.raises(CheckpointError, match=re.escape(f"other dataset_size ({len(DATA)})")):
        run(but(TINY, updates=1), OwnLabels(50), output=tmp_path, resume=True)


def test_other_images_in_the_same_number_are_not_resumed(tmp_path: Path) -> None:
    run(but(TINY, updates=1), output=tmp_path)
    with pytest.raises(CheckpointError, match="other first_image"):
        run(but(TINY, updates=1), Digits("test", size=len(DATA), seed=99), output=tmp_path, resume=True)


def test_other_weights_of_the_same_name_are_not_resumed(tmp_path: Path) -> None:
    short, network = but(TINY, updates=1).arguments, deepcopy(toy(NAME))
    train(network, DATA, **short, progress=False, output=tmp_path)
    with torch.no_grad():
        next(network.model.blocks.parameters()).view(-1)[0] += 1
    with pytest.raises(CheckpointError, match="other weights"):
        train(network, DATA, **short, progress=False, output=tmp_path, resume=True)


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(StorageError, match="another process"):
        run(but(TINY, updates=1), output=tmp_path)


def test_a_folder_that_vanished_keeps_no_checkpoint(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", Processes())
    folder.save({"history": [{}]})
    assert "update 1" in folder.advice
    shutil.rmtree(tmp_path / "run")
    assert "no checkpoint" in folder.advice


def test_starting_anew_in_a_used_folder_forgets_the_old_run(tmp_path: Path) -> None:
    run(but(TINY, updates=3), output=tmp_path)
    run(but(TINY, updates=2, seed=5), output=tmp_path, overwrite=True)
    assert Counter(logged(tmp_path)) == {1: 1, 2: 1}
