"""What a step costs in TorchRL: the batched environment beside TorchRL's own wrapper of the PettingZoo environment.

    python tests/benchmarks/torchrl_env.py               # needs vitprune_env[torchrl]
    python tests/benchmarks/torchrl_env.py --images 1    # as many images as the wrapper plays

Both play rollouts with random actions of `rand_action` on the built-in task, in turn in one process. The time of a
rollout is divided by its image-steps (images times sites); all images have equally many agents, so that the ratio is
also that of agent-steps. Medians over the pairs; the ratio is the median of the ratios of the pairs.

Not a test: nothing is asserted.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch
import tyro
from torchrl.envs import EnvBase, PettingZooWrapper  # pyright: ignore[reportMissingImports], it is optional

from vitprune_env import TokenGame, TokenVectorEnv, load_backbone, parallel_env
from vitprune_env.benchmarking.speed import Stopwatch
from vitprune_env.data import Digits
from vitprune_env.integrations.torchrl import TokenEnv


@dataclass(frozen=True)
class Args:
    """What to time."""

    images: int = 64
    """Images that the batched environment plays at once; the wrapper plays one."""
    pairs: int = 31
    """Pairs of rollouts."""
    warm_up: int = 2
    """Pairs that do not count."""
    seed: int = 0
    """Of the images and the actions."""
    cpu_time: bool = False
    """Count the process's CPU time instead of the clock's; on a shared machine the fairer measure."""


def seconds(env: EnvBase, steps: int, stopwatch: Stopwatch) -> float:
    """Seconds per image-step of one rollout."""
    _, spent = stopwatch.time(env.rollout, steps)
    return spent / (steps * max(1, env.batch_size.numel()))


def main() -> None:
    """Time in turn, print."""
    args = tyro.cli(Args, description=__doc__)
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    stopwatch = Stopwatch(torch.device("cpu"), args.cpu_time)
    backbone = load_backbone()
    game = TokenGame(backbone)
    batched = TokenEnv(TokenVectorEnv(game, Digits("train", 4096), args.images))
    wrapped = PettingZooWrapper(parallel_env(backbone), categorical_actions=True)
    for env in (batched, wrapped):
        env.set_seed(args.seed)
    found = [
        (seconds(wrapped, game.num_steps, stopwatch), seconds(batched, game.num_steps, stopwatch))
        for _ in range(args.warm_up + args.pairs)
    ][args.warm_up :]
    ratios = [slow / fast for slow, fast in found]
    low, middle, high = statistics.quantiles(ratios, n=4)
    for name, times in zip(
        ("PettingZooWrapper, 1 image", f"TokenEnv, {args.images} images"), zip(*found, strict=True), strict=True
    ):
        print(f"{name:28} {1e3 * statistics.median(times):8.3f} ms per image-step")
    print(f"ratio {middle:.1f} (quartiles {low:.1f} to {high:.1f}), {args.pairs} pairs, {game.num_agents} agents")


if __name__ == "__main__":
    main()
