"""A framework on the real environment: its own checks, then its example, and whether the return rises.

    python tests/interop/check.py sb3              # mode noop
    python tests/interop/check.py sb3 terminate

Prints one line for the table of docs/frameworks.md. `tests/interop/run.sh` calls it in an environment of its own.

The return is that of the game: the rewards of all steps, as a mean over agents and held-out images, with actions drawn
as in training. It is compared with that of uniform actions on the same images, which is about what a fresh network
plays; it has risen if the mean difference is above MARGIN and above three standard errors.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from inspect import signature
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Tensor, nn

from vitprune_env import TokenGame, load_backbone, parallel_env, play
from vitprune_env.agents import ModulePolicy
from vitprune_env.data import Digits
from vitprune_env.envs.parallel import env as turn_by_turn

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "frameworks"
IMAGES, MARGIN = 512, 0.05


@dataclass(frozen=True)
class Framework:
    """What is run of a framework.

    Attributes:
        packages: whose versions are reported, the framework's own first.
        example: name of its file.
        iterations: of training; enough to see the return rise.
        conforms: the framework's own checks of an environment in a mode; None: it has none.
    """

    packages: tuple[str, ...]
    example: str
    iterations: int
    conforms: Callable[[str], object] | None = None


def sb3_conforms(_: str) -> None:
    """The check of single-agent environments, the only ones that Stable-Baselines3 knows."""
    from stable_baselines3.common.env_checker import check_env

    check_env(gymnasium.make("vitprune/TokenPruning-v0").unwrapped, warn=False)


def tianshou_conforms(on_prune: str) -> None:
    """An episode in tianshou's own wrapper, one agent's turn after the other, ends when the last agent is done."""
    from tianshou.env import PettingZooEnv

    rng, turns, over = np.random.default_rng(0), 0, False
    env = PettingZooEnv(turn_by_turn(on_prune=on_prune))
    env.reset(seed=0)
    while not over:
        _, _, over, _, _ = env.step(int(rng.integers(2)))
        turns += 1
    playing = sum(not done for done in env.env.terminations.values())
    if playing:
        raise RuntimeError(f"PettingZooEnv: over after {turns} turns, while {playing} agents are in the game")


def torchrl_conforms(on_prune: str) -> None:
    """The specs of PettingZoo's environment in TorchRL's wrapper; with masks where agents leave."""
    from torchrl.envs import PettingZooWrapper, check_env_specs

    leaves = on_prune == "terminate"
    check_env_specs(PettingZooWrapper(parallel_env(on_prune=on_prune), use_mask=leaves, done_on_any=not leaves))


FRAMEWORKS = {
    "sb3": Framework(("stable-baselines3", "supersuit", "gymnasium"), "sb3_ppo", 8, sb3_conforms),
    "rllib": Framework(("ray", "gymnasium"), "rllib_ppo", 12),
    "tianshou": Framework(("tianshou", "gymnasium"), "tianshou_ppo", 8, tianshou_conforms),
    "agilerl": Framework(("agilerl", "gymnasium"), "agilerl_ippo", 16),
    "torchrl": Framework(("torchrl", "tensordict", "gymnasium"), "torchrl_mappo", 20, torchrl_conforms),
    "benchmarl": Framework(("benchmarl", "torchrl", "gymnasium"), "benchmarl_mappo", 20),
}


def example(name: str) -> Any:
    """The module of an example, from its file."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def returns(network: nn.Module) -> Tensor:
    """Mean return of an image's agents, for each held-out image, `[IMAGES]`."""
    backbone = load_backbone()
    game, policy = TokenGame(backbone), ModulePolicy(network, backbone.embed_dim).sampling(seed=0)
    with torch.no_grad():
        return play(game, policy, *Digits("test", IMAGES).batch(range(IMAGES))).reward.sum(dim=0).mean(dim=1)


def uniform(width: int) -> nn.Module:
    """A network that gives all actions the same probability."""
    network = nn.Linear(width, 2)
    for weight in network.parameters():
        nn.init.zeros_(weight)
    return network


def outcome(framework: Framework, on_prune: str) -> tuple[bool, str]:
    """Whether it works, and what happened."""
    try:
        if framework.conforms is not None:
            framework.conforms(on_prune)
        train = example(framework.example).train
        modes = {"on_prune": on_prune} if "on_prune" in signature(train).parameters else {}
        if on_prune != "noop" and not modes:  # an example of the batched environment, which has one mode
            return True, "conforms"
        network = train(iterations=framework.iterations, **modes)
    except Exception as error:  # whatever a framework raises is the result
        lines = str(error).strip().splitlines() or [""]
        return False, f"{type(error).__name__}: {lines[0][:160]}"
    before, after = returns(uniform(load_backbone().embed_dim)), returns(network)
    gain, noise = (after - before).mean().item(), (after - before).std().item() / IMAGES**0.5
    verdict = "rises" if gain > max(MARGIN, 3 * noise) else "DOES NOT RISE"
    text = f"return {verdict} in {framework.iterations} iterations: {before.mean():.3f} -> {after.mean():.3f}"
    return verdict == "rises", f"{text} (+{gain:.3f} +/- {noise:.3f})"


def main() -> None:
    """Check one framework in one mode."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=FRAMEWORKS)
    parser.add_argument("on_prune", nargs="?", default="noop", choices=("noop", "terminate"))
    args = parser.parse_args()
    framework = FRAMEWORKS[args.name]
    began = time.perf_counter()
    works, text = outcome(framework, args.on_prune)
    versions = ", ".join(f"{package} {version(package)}" for package in framework.packages)
    seconds = time.perf_counter() - began
    print(f"| {versions} | {args.on_prune} | {text} | {seconds:.0f} s |")
    sys.exit(0 if works else 1)


if __name__ == "__main__":
    main()
