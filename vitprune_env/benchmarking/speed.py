"""Measured time: a stopwatch, two functions that run in turn, and a policy that keeps counts fixed beforehand."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from vitprune_env.deploy.pruned_vit import PrunedViT
from vitprune_env.engine.backbone import Backbone
from vitprune_env.game.rollout import play
from vitprune_env.game.token_game import TokenGame
from vitprune_env.policy import BasePolicy, Policy
from vitprune_env.types import Decision, Observation

P = ParamSpec("P")
T = TypeVar("T")
WARM_UP = 3  # pairs that do not count
FEWEST_PAIRS = 3


@dataclass(frozen=True)
class PairedTimes:
    """Seconds of two functions that ran in turn, run by run."""

    first: tuple[float, ...]
    second: tuple[float, ...]

    @property
    def ratios(self) -> list[float]:
        """How many times longer the first took, pair by pair."""
        return [first / second for first, second in zip(self.first, self.second, strict=True)]

    @property
    def ratio(self) -> float:
        """The median of the ratios."""
        return statistics.median(self.ratios)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Lower and upper quartile of the ratios."""
        low, _, high = statistics.quantiles(self.ratios, n=4)
        return low, high


@dataclass(frozen=True)
class Stopwatch:
    """Measures calls; on a GPU it waits until the work is done.

    Args:
        device: where the calls compute.
        cpu_time: count the process's CPU time instead of the clock's; on a shared machine, with one thread, the fairer
            measure.
    """

    device: torch.device
    cpu_time: bool = False

    def time(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> tuple[T, float]:
        """The result of a call and its seconds."""
        now = time.process_time if self.cpu_time else time.perf_counter
        self._wait()
        start = now()
        result = call(*args, **kwargs)
        self._wait()
        return result, now() - start

    def race(
        self,
        first: Callable[[], object],
        second: Callable[[], object],
        pairs: int,
        limit: float | None = None,
        warm_up: int = WARM_UP,
    ) -> PairedTimes:
        """Run two functions in turn.

        Args:
            first: one of them.
            second: the other.
            pairs: runs of each that count.
            limit: seconds; fewer pairs, but at least three, where they would take longer. None: no limit.
            warm_up: runs of each that come before and do not count, at least one.
        """

        def pair() -> tuple[float, float]:
            return self.time(first)[1], self.time(second)[1]

        spent = [sum(pair()) for _ in range(warm_up)][-1]
        if limit is not None:
            pairs = max(FEWEST_PAIRS, min(pairs, int(limit / spent)))
        one, other = zip(*(pair() for _ in range(pairs)), strict=True)
        return PairedTimes(one, other)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@dataclass
class ScriptedCounts(BasePolicy):
    """Keeps given shares of the tokens, for timing: how many differs from image to image, which ones does not matter.

    Args:
        keep: share of all tokens kept after each site, on average over the images.
        spread: standard deviation of the counts over the images, relative to their mean.
        seed: of the counts.
    """

    keep: Sequence[float]
    spread: float
    seed: int = 0

    def reset(self, batch_size: int, num_agents: int) -> None:
        """Draw how much each image keeps."""
        noise = torch.randn(batch_size, generator=torch.Generator().manual_seed(self.seed))
        # Centred: a single image keeps exactly the mean.
        self.share = (1 + self.spread * (noise - noise.mean())).clamp(min=0)

    def decide(self, obs: Observation) -> Decision:
        """Keep as many tokens as the script says.

        Raises:
            ValueError: for another number of sites.
        """
        if len(self.keep) != obs.num_steps:
            raise ValueError(f"keep: expected a share for each of {obs.num_steps} sites, got {len(self.keep)} of them")
        count = (self.share * self.keep[obs.step] * obs.num_agents).round().clamp(1, obs.num_agents)
        return Decision(keep=obs.alive & (obs.alive.cumsum(dim=1) <= count.to(obs.alive.device)[:, None]))


@dataclass(frozen=True)
class SpeedCase:
    """Dense and pruned model side by side, on one model, number format and batch size."""

    model: str
    dtype: str
    batch: int
    dense_ms: float  # per batch, median
    pruned_ms: float
    dense_images_per_s: float
    pruned_images_per_s: float
    speedup: float  # median over pairs
    quartiles: tuple[float, float]  # of the speed-up
    ideal: float  # dense MACs over those of the pruned model, policy included
    pairs: int

    @property
    def share(self) -> float:
        """Speed-up reached, as a share of the ideal."""
        return self.speedup / self.ideal

    def cells(self) -> dict[str, str]:
        """The case as a row of a table."""
        low, high = self.quartiles
        return {
            "model": self.model,
            "dtype": self.dtype,
            "batch": str(self.batch),
            "dense ms": f"{self.dense_ms:.1f}",
            "pruned ms": f"{self.pruned_ms:.1f}",
            "dense images/s": f"{self.dense_images_per_s:.1f}",
            "pruned images/s": f"{self.pruned_images_per_s:.1f}",
            "speed-up (quartiles)": f"{self.speedup:.2f} ({low:.2f} to {high:.2f})",
            "ideal": f"{self.ideal:.2f}",
            "share of ideal": f"{self.share:.2f}",
        }


@torch.inference_mode()
def time_case(
    backbone: Backbone,
    policy: Policy,
    images: Tensor,
    dtype: str,
    *,
    execution: str = "auto",
    compiled: bool = False,
    pairs: int = 31,
    limit: float | None = 20.0,
    cpu_time: bool = False,
) -> SpeedCase:
    """Time the dense and the pruned model in turn on the same images.

    Args:
        backbone: the dense model, on the device and in the number format to time.
        policy: what prunes it.
        images: `[B, C, H, W]`.
        dtype: name of the number format, for the row.
        execution: how ragged images attend, see `PrunedViT`.
        compiled: compile the dense model, and the parts of the pruned one around attention.
        pairs: runs of each model.
        limit: seconds after which fewer pairs do; None: no limit.
        cpu_time: count the process's CPU time instead of the clock's.
    """
    model = PrunedViT(backbone, policy, execution=execution).eval()
    game = TokenGame.for_policy(backbone, policy, check=False)
    ideal = game.cost.dense() / float(play(game, policy, images).outcome.macs.mean())
    dense: Callable[[Tensor], Tensor] = backbone
    if compiled:
        dense, model = torch.compile(backbone), model.compile_parts()
    watch = Stopwatch(images.device, cpu_time)
    times = watch.race(lambda: dense(images), lambda: model(images), pairs, limit)
    plain, pruned = statistics.median(times.first), statistics.median(times.second)
    return SpeedCase(
        model=backbone.name,
        dtype=dtype,
        batch=len(images),
        dense_ms=1e3 * plain,
        pruned_ms=1e3 * pruned,
        dense_images_per_s=len(images) / plain,
        pruned_images_per_s=len(images) / pruned,
        speedup=times.ratio,
        quartiles=times.quartiles,
        ideal=ideal,
        pairs=len(times.first),
    )
