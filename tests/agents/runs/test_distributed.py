"""Training over several processes equals training in one; exploration noise, which makes it so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer import DATA, run
from torch import Tensor

from games import NAME, OwnLabels
from helpers import toy
from places import EXAMPLES
from places import SUPPORT as HERE
from ranks import EVERYDAY, RUNS
from runs import TINY, but
from vitprune_env.agents import TokenActor
from vitprune_env.agents.learners.exploration import ExploringPolicy
from vitprune_env.agents.shared.noise import exploration_noise, philox
from vitprune_env.agents.shared.processes import Processes, launched
from vitprune_env.files import load_state
from vitprune_env.game.rollout import play
from vitprune_env.game.token_game import TokenGame

EXAMPLE = EXAMPLES / "train_mappo.py"


def environment() -> dict[str, str]:
    paths = os.pathsep.join([str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}


Ranks = tuple[Path, dict[str, Any], str]


def trained(folder: Path, names: tuple[str, ...]) -> Ranks:
    line = [sys.executable, str(HERE / "ranks.py"), str(folder), *names]
    done = subprocess.run(line, capture_output=True, text=True, check=False, env=environment(), timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder, json.loads(done.stdout), done.stderr


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return trained(tmp_path_factory.mktemp("ranks"), EVERYDAY)


@pytest.fixture(scope="module")
def further_ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return trained(tmp_path_factory.mktemp("further"), tuple(set(RUNS) - set(EVERYDAY)))


def ended(folder: Path, name: str, rank: int) -> dict[str, Any]:
    return load_state(folder / f"{name}.rank{rank}.safetensors")


def assert_close(one: dict[str, Any], two: dict[str, Any], atol: float) -> None:
    for network in ("actor", "critic", "backbone"):
        for name, value in one[network].items():
            assert torch.allclose(value, two[network][name], rtol=0, atol=atol), name
    assert one["threshold"] == pytest.approx(two["threshold"], abs=1e3 * atol)
    for here, there in zip(one["history"], two["history"], strict=True):
        for name in set(here) - {"train_time"}:
            assert here[name] == pytest.approx(there[name], rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in EVERYDAY)) for name in RUNS]
)
def test_several_processes_come_to_what_one_comes_to(name: str, request: pytest.FixtureRequest) -> None:
    folder, report, errors = request.getfixturevalue("ranks" if name in EVERYDAY else "further_ranks")
    one = ended(folder, f"{name}1", 0)
    for size in RUNS[name][1]:
        assert report["codes"][f"{name}{size}"] == [0] * size, errors[-2000:]
        for rank in range(size):
            assert_close(one, ended(folder, f"{name}{size}", rank), atol=1e-5)
    least = {
        "uneven": 4,
        "cached": 2,
        "tiny_minibatches": 25,
        "ppo_single": 4,
        "paper": 4,
        "alternate": 2,
        "adaptive": 2,
    }
    assert one["history"][0]["gradient_steps"] >= least[name]


def test_process_0_alone_writes(ranks: Ranks) -> None:
    folder, report, errors = ranks
    for name, codes in report["codes"].items():
        if name not in ("gathering", "failed", "resumed"):
            lines = (folder / name / "history.jsonl").read_text().splitlines()
            assert len(lines) == (2 if name == "stopped" else RUNS[name[:-1]][0].run.updates)
            assert len(list((folder / name / "tensorboard").iterdir())) == 1, (name, codes, errors[-500:])


def test_collectives(ranks: Ranks) -> None:
    _, report, errors = ranks
    assert report["codes"]["gathering"] == [0, 0, 0], errors[-2000:]
    alone = Processes()
    rows = torch.ones(2, 3)
    assert alone.gather(rows) is rows
    assert alone.sum(rows) is rows
    assert (alone.span(5), alone.largest(3), alone.share(4), alone.is_main) == ((0, 5), 3, range(4), True)
    shares = [Processes(rank, 3).share(8) for rank in range(3)]
    assert [row for share in shares for row in share] == list(range(8))
    assert {len(share) for share in shares} == {2, 3}


def test_an_error_in_one_process_ends_all(ranks: Ranks) -> None:
    """And a run of two processes is taken up again by three."""
    folder, report, errors = ranks
    assert report["codes"]["failed"] == [1, 1]
    assert report["seconds"] < 60
    assert "ZeroDivisionError: a fault of one process" in errors
    assert "another one of this run has ended; its own message says why" in errors
    assert report["codes"]["resumed"] == [0, 0, 0]
    for rank in range(3):
        assert_close(ended(folder, "uneven1", 0), ended(folder, "failed", rank), atol=1e-5)


def test_a_signal_to_one_process_stops_all(ranks: Ranks) -> None:
    folder, report, errors = ranks
    assert report["codes"]["stopped"] == [143, 143]
    assert errors.count("stopped after update 2 of 5") == 3  # process 0 says so, and both exceptions carry it
    assert len(load_state(folder / "stopped" / "training.safetensors")["history"]) == 2


@pytest.mark.slow
def test_torchrun_trains_the_example(tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    flags = [str(EXAMPLE), "--quick", "--seed", "3", "--output"]
    for line in ([*launcher, *flags, str(tmp_path / "two")], [sys.executable, *flags, str(tmp_path / "one")]):
        done = subprocess.run(line, capture_output=True, text=True, check=False, env=environment(), timeout=600)
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.count("| MAPPO |") == 1
    one, two = (load_state(tmp_path / name / "training.safetensors")["history"] for name in ("one", "two"))
    assert [row["accuracy"] for row in one] == [row["accuracy"] for row in two]
    assert [row["loss"] for row in one] == pytest.approx([row["loss"] for row in two], rel=1e-4)


def test_more_processes_than_images_are_refused() -> None:
    with pytest.raises(ValueError, match="images: expected at least one for each of 20 processes, got 16"):
        run(TINY, processes=Processes(0, 20))
    with pytest.raises(ValueError, match="cache_images: expected 0 or one image for each of 8 processes, got 3 of 64"):
        run(but(TINY, cache_images=3), processes=Processes(0, 8))


def test_a_gpu_for_every_process(monkeypatch: pytest.MonkeyPatch) -> None:
    with launched("cuda:3") as (processes, device):
        assert (processes.size, device) == (1, "cuda:3")
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="device: expected 'cuda' with several processes"), launched("cuda:0"):
        pass
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="got 1 GPUs and process 1"), launched("cuda"):
        pass


# Noise


def words(*numbers: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    a, b, c, d = (torch.tensor([number]) for number in numbers)
    return a, b, c, d


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # the authors' known answers
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_gives_the_known_answers(counter: tuple[int, ...], key: tuple[int, int], expected: str) -> None:
    assert " ".join(f"{int(word):08x}" for word in philox(words(*counter), key)) == expected


def test_noise_is_uniform_and_depends_on_everything() -> None:
    game, token = torch.arange(400).repeat_interleave(100), torch.arange(100).repeat(400)
    noise = exploration_noise(0, game, 0, token)
    assert 0 <= float(noise.min()) < 1e-3
    assert 0.999 < float(noise.max()) < 1
    counts = torch.histc(noise, 20, 0, 1)
    assert float(((counts - 2000) ** 2 / 2000).sum()) < 44  # chi squared of 19 degrees of freedom, p = 0.001
    others = [
        exploration_noise(1, game, 0, token),
        exploration_noise(0, game + 1, 0, token),
        exploration_noise(0, game + 2**32, 0, token),
        exploration_noise(0, game, 1, token),
        exploration_noise(2**32, game, 0, token),
    ]
    for other in others:
        assert abs(float(torch.corrcoef(torch.stack([noise, other]))[0, 1])) < 0.02
    assert torch.equal(noise[7:90], exploration_noise(0, game[7:90], 0, token[7:90]))


def test_a_game_is_explored_the_same_alone_or_in_a_batch() -> None:
    data, game = OwnLabels(6), TokenGame(toy(NAME), (1, 2, 3))
    policy = ExploringPolicy(TokenActor(48), torch.Generator().manual_seed(3))
    policy.next_game = 10
    together = play(game, policy, data.images).keep
    for number in (4, 0):
        policy.next_game = 10 + number
        assert torch.equal(play(game, policy, data.images[number : number + 1]).keep[:, 0], together[:, number])
    assert policy.next_game == 11
    assert not torch.equal(play(game, policy, data.images).keep, together)


def test_half_precision_play_learns_in_full_precision() -> None:
    config = but(TINY, updates=3, cache_images=0)
    exact, half = run(config, DATA), run(but(config, amp=True), DATA)
    assert 0 < abs(exact.history[0]["loss"] - half.history[0]["loss"]) < 0.05
    assert half.history[0]["approx_kl"] < 0.05  # probabilities of rollout and update are of the same precision
    assert all(value.dtype == torch.float32 for value in half.policy.actor.state_dict().values())
