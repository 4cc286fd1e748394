"""What is measured of a policy in the benchmark, and how sure that is."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmark_players import Contestant, Task
from common import race
from vitprune_env import Policy, PrunedViT, TokenGame, play
from vitprune_env.errors import BudgetError

Z95 = 1.959964  # half-width of the central 95 % of a normal distribution, in standard deviations
RESAMPLES = 2000
SHOWN = 8  # images whose tokens are kept for the figure


@dataclass(frozen=True)
class Result:
    """One method at one budget; everything else is computed from this."""

    method: str
    group: str
    share: float  # of the dense GMACs, as asked for
    gmacs: float = 0.0  # mean per image, policy included
    policy_gmacs: float = 0.0  # the policy's and its evidence's part
    correct: tuple[str, ...] = ()  # per seed: a character per image, 1 where it is classified correctly
    keep_per_site: tuple[float, ...] = ()  # mean fraction of the tokens left after each site
    sites: tuple[str, ...] = ()
    setting: str = ""  # of the knob
    images_per_s: float = 0.0
    dense_images_per_s: float = 0.0  # measured in turn with it
    speedup: float = 0.0  # median over pairs
    source: tuple[tuple[int, ...], ...] = ()  # of the first images, where every patch ended up (see `Outcome`)
    predicted: tuple[int, ...] = ()  # of the first images
    out_of_reach: str = ""  # why there are no numbers
    origin: str = ""
    seconds: float = 0.0  # spent on fitting, calibrating and measuring

    @classmethod
    def load(cls, row: dict[str, Any]) -> Result:
        """What `asdict` and JSON made of it."""
        return cls(**{name: _as_tuple(value) for name, value in row.items()})

    @property
    def table(self) -> np.ndarray:
        """`[seeds, images]` float, 1 where correct."""
        return np.array([[float(mark) for mark in seed] for seed in self.correct])

    @property
    def accuracy(self) -> float:
        """Mean over seeds and images, 0 to 1."""
        return float(self.table.mean())


def _as_tuple(value: Any) -> Any:
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value


def measure(contestant: Contestant, share: float, task: Task, pairs: int, timed: int) -> Result:
    """Bring a contestant to a budget and let it play.

    Args:
        contestant: who.
        share: of the dense GMACs.
        task: on what.
        pairs: runs of dense and pruned model for the speed, in turn.
        timed: images that they run on.
    """
    start = time.perf_counter()
    blank: dict[str, Any] = {name: getattr(contestant, name) for name in ("group", "origin")}
    blank |= {"method": contestant.name, "share": share}
    try:
        policies = contestant.policies(task, share * task.dense_gmacs)
    except BudgetError as error:
        return Result(**blank, out_of_reach=str(error), seconds=time.perf_counter() - start)
    sites = contestant.sites(task, policies[0])
    runs = [_play_all(task, policy, sites) for policy in policies]
    means: dict[str, Any] = {name: statistics.mean(run[name] for run in runs) for name in ("gmacs", "policy_gmacs")}
    keep = zip(*(run["keep_per_site"] for run in runs), strict=True)
    return Result(
        **blank,
        **means,
        correct=tuple(run["correct"] for run in runs),
        keep_per_site=tuple(statistics.mean(site) for site in keep),
        sites=tuple(sites),
        setting=", ".join(_setting(contestant, policy) for policy in policies),
        **_speed(task, policies[0], sites, pairs, timed),
        source=runs[0]["source"],
        predicted=runs[0]["predicted"],
        seconds=time.perf_counter() - start,
    )


@torch.inference_mode()
def _play_all(task: Task, policy: Policy, sites: Sequence[str]) -> dict[str, Any]:
    """All images to report on."""
    game = TokenGame.for_policy(task.backbone, policy, sites=sites)
    outcomes = [play(game, policy, images, labels).outcome for images, labels in task.test]
    marks = torch.cat([_given(outcome.correct) for outcome in outcomes]).tolist()
    kept = torch.cat([outcome.n_kept for outcome in outcomes]).double().mean(dim=0) / game.num_agents
    return {
        "correct": "".join("1" if mark else "0" for mark in marks),
        "gmacs": float(torch.cat([outcome.macs for outcome in outcomes]).mean()) / 1e9,
        "policy_gmacs": float(torch.cat([outcome.policy_macs for outcome in outcomes]).mean()) / 1e9,
        "keep_per_site": kept.tolist(),
        "source": _as_tuple(outcomes[0].source[:SHOWN].tolist()),
        "predicted": tuple(outcomes[0].logits[:SHOWN].argmax(dim=1).tolist()),
    }


def _given(correct: Tensor | None) -> Tensor:
    assert correct is not None
    return correct


@torch.inference_mode()
def _speed(task: Task, policy: Policy, sites: Sequence[str], pairs: int, timed: int) -> dict[str, Any]:
    """Images per second of the deployable model beside timm's own."""
    images = task.test[0][0][:timed]
    model = PrunedViT(task.backbone, policy, sites).eval()
    times = race(lambda: task.backbone(images), lambda: model(images), images.device, pairs)
    dense, pruned = (statistics.median(column) for column in zip(*times, strict=True))
    ratio = statistics.median(plain / own for plain, own in times)
    return {"images_per_s": len(images) / pruned, "dense_images_per_s": len(images) / dense, "speedup": ratio}


def _setting(contestant: Contestant, policy: Policy) -> str:
    """Where the knob stands."""
    name = "threshold" if contestant.method is None else contestant.method.knob.name
    value = getattr(policy, name, None)
    return f"{name}={value:.5g}" if isinstance(value, float) else "" if value is None else f"{name}={value}"


def interval(correct: np.ndarray) -> tuple[float, float]:
    """95 % interval of an accuracy, of `[seeds, images]` marks: Wilson's for one seed, else bootstrapped over both."""
    seeds, images = correct.shape
    if seeds > 1:
        low, high = np.quantile(_resampled(correct, _image_weights(images)), (0.025, 0.975))
        return float(low), float(high)
    p, z2 = float(correct.mean()), Z95**2 / images
    half = Z95 * sqrt(p * (1 - p) / images + z2 / (4 * images))
    return (p + z2 / 2 - half) / (1 + z2), (p + z2 / 2 + half) / (1 + z2)


def difference(correct: np.ndarray, other: np.ndarray) -> tuple[float, float, float]:
    """How much more accurate one is than another on the same images, and its 95 % interval (paired bootstrap)."""
    weights = _image_weights(correct.shape[1])
    resampled = _resampled(correct, weights, seed=1) - _resampled(other, weights, seed=2)
    low, high = np.quantile(resampled, (0.025, 0.975))
    return float(correct.mean() - other.mean()), float(low), float(high)


def _image_weights(images: int) -> np.ndarray:
    """`[RESAMPLES, images]`, how often each image is drawn; the same for everybody, so that differences are paired."""
    return np.random.default_rng(0).multinomial(images, np.full(images, 1 / images), size=RESAMPLES)


def _resampled(correct: np.ndarray, image_weights: np.ndarray, seed: int = 1) -> np.ndarray:
    """Accuracies `[RESAMPLES]` of resampled seeds and images."""
    seeds, images = correct.shape
    generator = np.random.default_rng(seed)
    seed_weights = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=RESAMPLES)
    return (seed_weights * (image_weights @ correct.T)).sum(axis=1) / (seeds * images)


def flat(result: Result) -> dict[str, Any]:
    """The numbers of a result for a CSV file."""
    row = {name: value for name, value in asdict(result).items() if name not in ("correct", "source", "predicted")}
    row["keep_per_site"] = " ".join(f"{rate:.4f}" for rate in result.keep_per_site)
    row["sites"] = " ".join(result.sites)
    low, high = interval(result.table) if result.correct else (None, None)
    accuracy = result.accuracy if result.correct else None
    return {**row, "accuracy": accuracy, "accuracy_low": low, "accuracy_high": high, "seeds": len(result.correct)}
