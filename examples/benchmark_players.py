"""Who takes part in the benchmark, and how each is brought to a budget."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from vitprune_env import Backbone, KeepAll, Policy, TokenGame
from vitprune_env.agents import AdaptivePolicy, TokenActor, TokenPolicy, calibrate_threshold, load_policy
from vitprune_env.baselines import Method, available, calibrate, describe
from vitprune_env.data import ImageDataset
from vitprune_env.errors import CheckpointError

Batches = Sequence[tuple[Tensor, Tensor]]
Group = Literal["control", "baseline", "learned"]
CONTROLS = ("random",)  # baselines that stay in every table
CALIBRATION_TOLERANCE = 0.002  # how far above the budget the search may stop


@dataclass(frozen=True)
class Task:
    """What everybody is compared on."""

    backbone: Backbone
    training: ImageDataset  # to fit on
    tune: Batches  # to calibrate on
    test: Batches  # to report on
    seed: int
    seeds: int  # runs of what is random
    published_sites: bool
    output: Path
    resume: bool
    quick: bool

    @property
    def dense_gmacs(self) -> float:
        """GMACs of the unpruned network."""
        return TokenGame(self.backbone).cost.dense() / 1e9


@dataclass(frozen=True)
class Contestant:
    """A line of the table: from a budget in GMACs to the policies that play for it, one per seed."""

    name: str
    group: Group
    policies: Callable[[Task, float], list[Policy]]
    method: Method | None = None
    origin: str = ""  # tells checkpoints with the same name apart

    def sites(self, task: Task, policy: Policy) -> list[str]:
        """Where it acts in this comparison."""
        own = policy.default_sites(task.backbone.depth)
        if self.method is not None and not task.published_sites:
            own = self.method.sites(task.backbone)
        return [site.label for site in TokenGame(task.backbone, own).sites]


def _dense(task: Task, budget: float) -> list[Policy]:  # noqa: ARG001, it costs what it costs
    return [KeepAll()]


DENSE = Contestant("dense", "control", _dense)


def contestants(methods: Sequence[str], checkpoints: Sequence[str]) -> list[Contestant]:
    """Controls first, then baselines, then checkpoints.

    Args:
        methods: names of baselines, with parameters if they read `name:parameter=value,...`; none: all of them.
        checkpoints: paths, each with a label of its own if it reads `label=path`.

    Raises:
        UnknownNameError: for the name of no baseline.
        ParameterError: for a parameter that the baseline does not have.
        CheckpointError: for a checkpoint that cannot be read, or has a fine-tuned network of its own.
    """
    names = dict.fromkeys([*CONTROLS, *(methods or available())])
    found = [entry for name in names for entry in _of_method(name)]
    found.sort(key=lambda entry: entry.group != "control")
    return [*found[:1], UNTRAINED, *found[1:], *_of_checkpoints(checkpoints)]


def _of_method(text: str) -> Iterable[Contestant]:
    name, _, rest = text.partition(":")
    method = describe(name)
    parameters = {key: _value(value) for key, _, value in (part.partition("=") for part in rest.split(",") if part)}
    method.check(parameters)

    def calibrated(task: Task, budget: float) -> list[Policy]:
        return _calibrated(method, task, budget, parameters)

    if method.fit is None:
        yield Contestant(text, "control" if text in CONTROLS else "baseline", calibrated, method)
        return
    if not parameters:
        yield Contestant(text, "baseline", lambda task, budget: _fitted(method, task, budget), method)
    if method.needs_only_knob:
        yield Contestant(f"{text} (unfitted)", "control", calibrated, method)


def _value(text: str) -> Any:
    """A parameter's value: JSON if it is that, else a word."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return {"True": True, "False": False, "None": None}.get(text, text)


def _where(method: Method, task: Task) -> Any:
    return None if task.published_sites else method.sites(task.backbone)


def _calibrated(method: Method, task: Task, budget: float, parameters: dict[str, Any]) -> list[Policy]:
    """A method as it is, once per seed if it has one; what it costs does not depend on that."""
    options: dict[str, Any] = {"sites": _where(method, task), "tolerance": CALIBRATION_TOLERANCE, **parameters}
    policy = calibrate(method.name, budget, task.backbone, task.tune, **options)
    if not method.is_random:
        return [policy]
    setting = {**method.start, **parameters, method.knob.name: getattr(policy, method.knob.name)}
    return [method(**{**setting, "seed": task.seed + index}) for index in range(task.seeds)]


def _fitted(method: Method, task: Task, budget: float) -> list[Policy]:
    """A method trained for the budget, then brought to it exactly."""
    assert method.fit is not None
    assert method.fit_config is not None
    where, config = _where(method, task), method.fit_config()
    policy: Any = method.fit(
        task.backbone,
        task.training,
        budget,
        sites=where,
        seed=task.seed,
        output=task.output / "fits" / f"{method.name}-{budget / task.dense_gmacs:.3g}",
        resume=task.resume,
        config=config.quick() if task.quick else config,
    )
    options: dict[str, Any] = {"knob": method.fitted_knob, "tolerance": CALIBRATION_TOLERANCE}
    return [calibrate(policy.at, budget, task.backbone, task.tune, where, **options)]


def _untrained(task: Task, budget: float) -> list[Policy]:
    """Actors with fresh weights: what the shape of the learned policy achieves without learning."""
    return [
        _with_threshold(TokenPolicy(TokenActor(task.backbone.embed_dim, generator=generator)), task, budget)
        for generator in (torch.Generator().manual_seed(task.seed + index) for index in range(task.seeds))
    ]


UNTRAINED = Contestant("untrained actor", "control", _untrained)


def _of_checkpoints(paths: Sequence[str]) -> list[Contestant]:
    """One contestant per label; at each budget it sends those of its policies that were trained for the nearest."""
    groups: dict[str, list[Path]] = {}
    for text in paths:
        label, _, path = text.rpartition("=")
        folder = Path(path)
        groups.setdefault(label or "MAPPO", []).append(folder / "policy.safetensors" if folder.is_dir() else folder)
    found = []
    for label, files in groups.items():
        policies = [_of_this_network(file) for file in files]
        digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
        found.append(Contestant(label, "learned", _Nearest(policies), origin=digest))
    return found


def _of_this_network(file: Path) -> TokenPolicy:
    """A policy that was trained on the network as it is.

    Raises:
        CheckpointError: for one whose network was fine-tuned with it, and would not be the one that is compared.
    """
    policy = load_policy(file)
    if policy.info.get("finetune", "off") != "off":
        raise CheckpointError(
            f"{file}: expected a policy of the network as it is, got one with a fine-tuned network of its own; "
            "examples/evaluate.py reports such runs"
        )
    return policy


@dataclass(frozen=True)
class _Nearest:
    """Trained policies, of which those play whose own budget is the nearest to the asked one."""

    policies: Sequence[TokenPolicy]

    def __call__(self, task: Task, budget: float) -> list[Policy]:
        def distance(policy: TokenPolicy) -> float:
            if isinstance(policy, AdaptivePolicy):
                return abs(policy.share * task.dense_gmacs - budget)
            return abs(float(policy.info.get("target_macs") or 0) / 1e9 - budget)

        policies = [_told(policy, budget / task.dense_gmacs) for policy in self.policies]
        least = min(map(distance, policies))
        chosen = [policy for policy in policies if distance(policy) <= least + 1e-3 * budget]
        return [_with_threshold(policy, task, budget) for policy in chosen]


def _told(policy: TokenPolicy, share: float) -> TokenPolicy:
    """A policy for a range of budgets, told the asked one, or the end of its range that is nearest."""
    if not isinstance(policy, AdaptivePolicy):
        return policy
    return policy.at(min(max(share, policy.shares[0]), policy.shares[-1]))


def _with_threshold(policy: TokenPolicy, task: Task, budget: float) -> Policy:
    policy = policy.to(task.tune[0][0].device)
    game = TokenGame.for_policy(task.backbone, policy)
    prepared = [game.prepare(images) for images, _ in task.tune]
    return calibrate_threshold(game, policy, prepared, budget * 1e9)
