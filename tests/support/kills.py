"""Kill training runs at random points and see where they end.

Run as a script: torch is then loaded once, and every run is a fork of this process, ready in no time.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from games import NAME, OwnLabels
from helpers import toy
from runs import TINY, but
from vitprune_env.agents import train
from vitprune_env.files import load_state

CONFIG = but(
    TINY,
    updates=8,
    images=7,  # so that a part of the 16 cached ones is always left over
    critic_hidden=(8,),
    actor_hidden=(4,),
    cache_images=16,
    calibration_images=8,
    value_norm=True,
    checkpoint_every=1,
)
TIMES = {"train_time"}  # what no two runs have in common


def forked(work: Callable[[], object]) -> int:
    """Start some work in a process of its own."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def training(folder: Path, data: OwnLabels) -> int:
    """Start, or take up again, the run of a folder; its process."""
    return forked(lambda: train(toy(NAME), data, **CONFIG.arguments, output=folder, progress=False, resume=True))


def outcome(folder: Path) -> dict[str, object]:
    """All that two runs of the same settings must have in common."""
    state = load_state(folder / "training.safetensors")
    rows = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    history = [[{k: v for k, v in row.items() if k not in TIMES} for row in r] for r in (state["history"], rows)]
    values = json.dumps({**state, "history": history}, default=lambda tensor: tensor.tolist())
    return {"policy": (folder / "policy.safetensors").read_bytes().hex(), "state": values}


def killed_after(child: int, seconds: float) -> bool:
    """Whether a process had to be killed; it may have ended before, well or it is an error."""
    time.sleep(seconds)
    if os.waitpid(child, os.WNOHANG) == (0, 0):
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            return True
    return False


def main() -> None:
    """Make so many kills; report how many, over how many runs, and how many of these ended differently."""
    root, wanted, chance = Path(sys.argv[1]), int(sys.argv[2]), random.Random(int(sys.argv[3]))
    data = OwnLabels(24)
    start = time.perf_counter()
    _, status = os.waitpid(training(root / "whole", data), 0)
    whole = time.perf_counter() - start
    assert status == 0
    expected = outcome(root / "whole")
    kills = runs = different = 0
    while kills < wanted:
        folder = root / f"run{runs}"
        while kills < wanted and not (folder / "policy.safetensors").exists():
            kills += killed_after(training(folder, data), chance.uniform(0, whole))
        _, status = os.waitpid(training(folder, data), 0)
        runs += 1
        different += status != 0 or outcome(folder) != expected
        if different:
            break
        if kills < wanted:
            shutil.rmtree(folder)
    sys.stdout.write(json.dumps({"kills": kills, "runs": runs, "different": different, "seconds": whole}))


if __name__ == "__main__":
    main()
