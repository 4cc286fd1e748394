"""Policies that take part in a benchmark, and how each is brought to a budget."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from vitprune_env.agents import AdaptivePolicy, TokenActor, TokenPolicy, calibrate_threshold
from vitprune_env.baselines import Knob, Method, available, calibrate, describe, fit
from vitprune_env.baselines.calibration import KEEP_RATE
from vitprune_env.baselines.registry import METHODS
from vitprune_env.benchmarking.images import Batches, Images, digest
from vitprune_env.benchmarking.measurement import Group, Sites
from vitprune_env.deploy.policy_files import load_policy
from vitprune_env.engine.backbone import Backbone
from vitprune_env.errors import CheckpointError, UnknownNameError
from vitprune_env.game.token_game import TokenGame
from vitprune_env.policy import KeepAll, Policy

Entry = str | Path | Policy | Callable[..., Policy]
Entries = Sequence[Entry] | Mapping[str, Entry | Sequence[Entry]]

CALIBRATION_TOLERANCE = 0.002  # how far above the budget the search may stop
POLICY_FILE = "policy.safetensors"


@dataclass(frozen=True)
class Task:
    """What all policies are compared on.

    Attributes:
        backbone: the network.
        test: images to report on.
        tune: images to calibrate on.
        fit: images to train methods on that need it; None: there are none.
        sites: where methods act: None for the same sites (the backbone's own, or inside every block for methods that
            are made to act there), "published" for those of each paper, or the sites themselves.
        seed: first of the seeds.
        seeds: runs of what is random.
        output: folder for fits; None: they are not kept.
        resume: whether to go on with fits that are there.
        quick: fits of a few steps, to see that everything works.
    """

    backbone: Backbone
    test: Batches
    tune: Sequence[Any]
    fit: Images | None = None
    sites: Sites | str | None = None
    seed: int = 0
    seeds: int = 5
    output: Path | None = None
    resume: bool = False
    quick: bool = False

    @property
    def dense_gmacs(self) -> float:
        """GMACs of the unpruned network."""
        return TokenGame(self.backbone).cost.dense() / 1e9

    def where(self, usual: Sites) -> Sites | None:
        """Where a method acts whose place in a fair comparison is `usual`; None: where it was published."""
        if self.sites is None:
            return usual
        return None if isinstance(self.sites, str) else self.sites


@dataclass(frozen=True)
class Contestant:
    """A line of the table.

    Attributes:
        name: of the line.
        group: what it is.
        at: brings it to a budget in GMACs; one policy per run.
        sites: where these policies act; None: where they want to.
        knob: parameter that is turned to meet the budget, for the report.
        origin: tells saved policies with the same name apart.
        fixed: whether it has nothing to turn, and plays as it is.
        needs_fit: whether it is trained for each budget.
    """

    name: str
    group: Group
    at: Callable[[Task, float], list[Policy]]
    sites: Callable[[Task], Sites | None]
    knob: str = ""
    origin: str = ""
    fixed: bool = False
    needs_fit: bool = False

    def setting(self, policy: Policy) -> str:
        """Where the knob of one of its policies stands."""
        value = getattr(policy, self.knob, None)
        text = f"{value:.5g}" if isinstance(value, float) else str(value)
        return "" if value is None else f"{self.knob}={text}"


def _equal_sites(task: Task) -> Sites | None:
    """The network's own sites, unless the comparison has others."""
    return task.where(task.backbone.default_sites)


def _own_sites(_: Task) -> Sites | None:
    """Where the policy wants to act."""


def _as_it_is(label: str, group: Group, make: Callable[[], Policy], origin: str = "") -> Contestant:
    """A policy that has nothing to turn."""
    return Contestant(label, group, lambda _task, _budget: [make()], _equal_sites, origin=origin, fixed=True)


def contestants_of(policies: Entries, controls: bool = True) -> list[Contestant]:
    """The lines of a comparison: controls first, then the policies as they were given.

    Args:
        policies: what to compare. In a sequence, or as values of a mapping from labels:

            - the name of a baseline, with parameters if it reads `name:parameter=value,...`,
            - a policy object,
            - a class or function that makes a policy, from a keep rate if it takes an argument,
            - the path of a saved policy, or of a run folder with one,
            - in a mapping, several trained policies: at each budget those play that were trained for the nearest one.
        controls: whether dropping at random, actors that never learned and trained methods before their training
            take part.

    Raises:
        UnknownNameError: for the name of no baseline.
        ParameterError: for a parameter that the baseline does not have.
        CheckpointError: for a saved policy that cannot be read, or has a fine-tuned network of its own.
        ValueError: for two lines with the same label.
        TypeError: for what is no policy.
    """
    if isinstance(policies, str | Path | Policy):
        policies = [policies]
    named = policies.items() if isinstance(policies, Mapping) else ((_label(entry), entry) for entry in policies)
    found = [contestant for label, entry in named for contestant in _entered(label, entry)]
    names = [contestant.name for contestant in found]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"policies: expected different labels, got {name!r} twice; a mapping gives labels")
    if not controls:
        return [contestant for contestant in found if contestant.group != "control" or contestant.name == "random"]
    if "random" not in names:
        found = [*_of_method("random", "random"), *found]
    found.sort(key=lambda contestant: (contestant.group != "control", contestant.name != "random"))
    return [found[0], UNTRAINED, *found[1:]]


def _label(entry: Any) -> str:
    """The name of a line for which none was given."""
    if isinstance(entry, str) and _is_method(entry):
        return entry
    if isinstance(entry, str | Path):
        path = Path(entry)
        return path.parent.name if path.name == POLICY_FILE else path.stem or str(path)
    return entry.__name__ if callable(entry) and hasattr(entry, "__name__") else type(entry).__name__


def _is_method(text: str) -> bool:
    return text.partition(":")[0] in available()


def _entered(label: str, entry: Any) -> Iterable[Contestant]:
    """The lines of one entry: one, or two for a method that is compared with its untrained self."""
    if isinstance(entry, str) and _is_method(entry):
        return _of_method(label, entry)
    if isinstance(entry, str | Path):
        path = Path(entry)
        if isinstance(entry, str) and not path.exists() and len(path.parts) == 1 and not path.suffix:
            raise UnknownNameError("baseline", entry.partition(":")[0], available())
        return [_of_files(label, [path])]
    if isinstance(entry, type):
        method = next((method for method in METHODS if method.make is entry), None)
        return [_of_factory(label, cast(Any, entry))] if method is None else _of_method(label, method.name)
    if isinstance(entry, Policy):
        return [_of_policy(label, entry)]
    if isinstance(entry, Sequence):
        if all(isinstance(each, str | Path) for each in entry):
            return [_of_files(label, list(map(Path, entry)))]
        if entry and all(isinstance(each, TokenPolicy) for each in entry):
            return [_of_trained(label, entry)]
    elif callable(entry):
        return [_of_factory(label, cast(Any, entry))]
    raise TypeError(
        f"policies: expected names of baselines, policies, functions that make one, or paths of saved ones, "
        f"got {entry!r} as {label!r}"
    )


# Baselines


def _of_method(label: str, text: str) -> list[Contestant]:
    """A registered method, and its untrained self where it is trained."""
    name, _, rest = text.partition(":")
    method = describe(name)
    parameters = {key: _value(value) for key, _, value in (part.partition("=") for part in rest.split(",") if part)}
    method.check(parameters)

    def where(task: Task) -> Sites | None:
        return task.where(method.sites(task.backbone))

    def calibrated(task: Task, budget: float) -> list[Policy]:
        return _calibrated(method, task, budget, where(task), parameters)

    def fitted(task: Task, budget: float) -> list[Policy]:
        return _fitted(method, task, budget, where(task))

    as_it_is = Contestant(label, "control" if name == "random" else "baseline", calibrated, where, method.knob.name)
    if method.recipe is None:
        return [as_it_is]
    found = []
    if not parameters:
        found.append(Contestant(label, "baseline", fitted, where, method.fitted_knob.name, needs_fit=True))
    if method.needs_only_knob:
        found.append(dataclasses.replace(as_it_is, name=f"{label} (unfitted)", group="control"))
    return found


def _value(text: str) -> Any:
    """A parameter's value: JSON if it is that, else a word."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return {"True": True, "False": False, "None": None}.get(text, text)


def _calibrated(
    method: Method, task: Task, budget: float, sites: Sites | None, parameters: dict[str, Any]
) -> list[Policy]:
    """A method as it is, once per seed if it has one; what it costs does not depend on that."""
    options: dict[str, Any] = {"sites": sites, "tolerance": CALIBRATION_TOLERANCE, **parameters}
    policy = calibrate(method.name, budget, task.backbone, task.tune, **options)
    if not method.is_random:
        return [policy]
    setting = {**method.start, **parameters, method.knob.name: getattr(policy, method.knob.name)}
    return [method(**{**setting, "seed": task.seed + index}) for index in range(task.seeds)]


def _fitted(method: Method, task: Task, budget: float, sites: Sites | None) -> list[Policy]:
    """A method trained for the budget, then brought to it exactly."""
    assert task.fit is not None
    config = method.fit_config()
    folder = f"{method.name}-{budget / task.dense_gmacs:.3g}"
    policy: Any = fit(
        method,
        task.backbone,
        cast(Any, task.fit),
        budget,
        sites=sites,
        seed=task.seed,
        output=None if task.output is None else task.output / "fits" / folder,
        resume=task.resume,
        config=config.quick() if task.quick else config,
    )
    return [_turned(policy.at, method.fitted_knob, task, budget, sites)]


# Policies and factories of the caller's own


def _of_factory(label: str, make: Callable[..., Policy]) -> Contestant:
    """A class or function that makes a policy; with a parameter `seed` it is run with several seeds."""
    parameters = list(inspect.signature(make).parameters)
    if not parameters:
        return _as_it_is(label, "baseline", make)

    def at(task: Task, budget: float) -> list[Policy]:
        sites = _equal_sites(task)
        seeds = [{"seed": task.seed + index} for index in range(task.seeds)] if "seed" in parameters else [{}]
        return [_turned(lambda rate, seed=seed: make(rate, **seed), KEEP_RATE, task, budget, sites) for seed in seeds]

    return Contestant(label, "baseline", at, _equal_sites, parameters[0])


def _of_policy(label: str, policy: Policy, origin: str = "") -> Contestant:
    """A policy object: a trained one by its threshold, another by its knob, and one without any as it is."""
    if isinstance(policy, TokenPolicy):
        return _of_trained(label, [policy], origin)
    method = next((method for method in METHODS if method.make is type(policy)), None)
    trained = hasattr(policy, "at")  # methods of this package that are trained: their weights go with their sites
    knob = KEEP_RATE if method is None else method.fitted_knob if trained else method.knob
    make = getattr(policy, "at", None) or _with(policy, knob)
    if make is None:
        return _as_it_is(label, "baseline", lambda: policy, origin)

    def sites(task: Task) -> Sites | None:
        if trained:
            return None
        return _equal_sites(task) if method is None else task.where(method.sites(task.backbone))

    def at(task: Task, budget: float) -> list[Policy]:
        return [_turned(make, knob, task, budget, sites(task))]

    return Contestant(label, "baseline", at, sites, knob.name, origin)


def _with(policy: Policy, knob: Knob) -> Callable[[Any], Policy] | None:
    """What makes the same policy with another setting of its knob; None: it has no such parameter."""
    if not hasattr(policy, knob.name):
        return None

    def make(value: Any) -> Policy:
        made = copy.copy(policy)
        object.__setattr__(made, knob.name, value)  # also where the policy is a frozen dataclass
        return made

    return make


def _turned(make: Callable[[Any], Policy], knob: Knob, task: Task, budget: float, sites: Sites | None) -> Policy:
    """The policy whose knob is turned until it costs the budget."""
    return calibrate(make, budget, task.backbone, task.tune, sites, knob=knob, tolerance=CALIBRATION_TOLERANCE)


# Trained policies


def _of_files(label: str, paths: Sequence[Path]) -> Contestant:
    """Saved policies; a folder stands for the policy in it."""
    files = [path / POLICY_FILE if path.is_dir() else path for path in paths]
    policies = [_loaded(file) for file in files]
    origin = digest(*(torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.uint8) for file in files))
    if len(policies) == 1:
        return _of_policy(label, policies[0], origin)
    for file, policy in zip(files, policies, strict=True):
        if not isinstance(policy, TokenPolicy):
            raise CheckpointError(
                f"{file}: expected a trained policy, as {label!r} has several; got {type(policy).__name__}"
            )
    return _of_trained(label, cast(Any, policies), origin)


def _loaded(file: Path) -> Policy:
    """A saved policy of the network as it is.

    Raises:
        CheckpointError: for one whose network was fine-tuned with it, and would not be the one that is compared.
    """
    policy = load_policy(file)
    if isinstance(policy, TokenPolicy) and policy.info.get("finetune", "off") != "off":
        raise CheckpointError(
            f"{file}: expected a policy of the network as it is, got one with a fine-tuned network of its own; "
            "`vitprune evaluate` reports such runs"
        )
    return policy


def _of_trained(label: str, policies: Sequence[TokenPolicy], origin: str = "") -> Contestant:
    """Trained policies: at each budget those whose own budget is the nearest, at the sites of their training."""

    def at(task: Task, budget: float) -> list[Policy]:
        asked = [_asked(policy, budget / task.dense_gmacs) for policy in policies]
        distances = [abs(_own_budget(policy, task) - budget) for policy in asked]
        nearest = min(distances) + 1e-3 * budget
        chosen = [policy for policy, distance in zip(asked, distances, strict=True) if distance <= nearest]
        return [_with_threshold(policy, task, budget) for policy in chosen]

    return Contestant(label, "learned", at, _own_sites, "threshold", origin)


def _asked(policy: TokenPolicy, share: float) -> TokenPolicy:
    """A policy for a range of budgets at the asked one, or at the end of its range that is nearest."""
    if not isinstance(policy, AdaptivePolicy):
        return policy
    return policy.at(min(max(share, policy.shares[0]), policy.shares[-1]))


def _own_budget(policy: TokenPolicy, task: Task) -> float:
    """GMACs that a policy was trained for, or told to spend."""
    if isinstance(policy, AdaptivePolicy):
        return policy.share * task.dense_gmacs
    return float(policy.info.get("target_macs") or 0) / 1e9


def untrained_policies(task: Task, budget: float, **actor: Any) -> list[Policy]:
    """Actors with fresh weights at a budget: what the shape of the learned policy achieves without learning.

    Args:
        task: network, images to calibrate on and seeds.
        budget: GMACs per image.
        **actor: arguments of `TokenActor`, such as `hidden`.
    """
    sites = _equal_sites(task)
    generators = [torch.Generator().manual_seed(task.seed + index) for index in range(task.seeds)]
    actors = [TokenActor(task.backbone.embed_dim, generator=generator, **actor) for generator in generators]
    return [_with_threshold(TokenPolicy(actor, sites=sites), task, budget) for actor in actors]


DENSE = _as_it_is("dense", "control", KeepAll)
UNTRAINED = Contestant("untrained actor", "control", untrained_policies, _own_sites, "threshold")


def _with_threshold(policy: TokenPolicy, task: Task, budget: float) -> Policy:
    policy = policy.to(task.tune[0][0].device)
    game = TokenGame.for_policy(task.backbone, policy)
    prepared = [game.prepare(images) for images, _ in task.tune]
    return calibrate_threshold(game, policy, prepared, budget * 1e9)
