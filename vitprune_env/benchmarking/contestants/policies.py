"""Policies of the caller's own as lines of the table: objects, and what makes them."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch

from vitprune_env.baselines.calibration import KEEP_RATE
from vitprune_env.baselines.registry import METHODS
from vitprune_env.benchmarking.contestants.search import at_budget
from vitprune_env.benchmarking.contestants.task import Contestant, Task
from vitprune_env.benchmarking.contestants.trained import Trained, of_trained
from vitprune_env.benchmarking.images import digest
from vitprune_env.benchmarking.measurement import Group, Sites
from vitprune_env.policy import Policy


def as_it_is(label: str, group: Group, make: Callable[[], Policy], origin: str = "") -> Contestant:
    """A policy that has nothing to turn."""

    def sites(task: Task) -> Sites:
        return task.where_for(make())

    return Contestant(label, group, lambda _task, _budget: [make()], sites, origin=origin, fixed=True)


def of_factory(label: str, make: Callable[..., Policy]) -> Contestant:
    """A class or function that makes a policy; with a parameter `seed` it is run with several seeds."""
    parameters = list(inspect.signature(make).parameters)
    origin = _code(make)
    if not parameters:
        return as_it_is(label, "own", make, origin)

    def sites(task: Task) -> Sites:
        return task.where_for(make(1.0))

    def at(task: Task, budget: float) -> list[Policy]:
        seeds = [{"seed": task.seed + index} for index in range(task.seeds)] if "seed" in parameters else [{}]
        where = sites(task)
        return [at_budget(lambda rate, more=more: make(rate, **more), KEEP_RATE, budget, task, where) for more in seeds]

    return Contestant(label, "own", at, sites, parameters[0], origin)


def _code(make: Callable[..., Policy]) -> str:
    """Tells versions of a policy apart, so that a changed one is measured again; empty where there is no source."""
    try:
        source = inspect.getsource(make)
    except (OSError, TypeError):
        return ""
    return digest(torch.frombuffer(bytearray(source.encode()), dtype=torch.uint8))


def of_policy(label: str, policy: Policy, origin: str = "") -> Contestant:
    """A policy object: a trained one by its threshold, another by its knob, and one without any as it is."""
    if isinstance(policy, Trained):
        return of_trained(label, [policy], origin)
    method = next((method for method in METHODS if method.make is type(policy)), None)
    trained = hasattr(policy, "at")  # methods of this package that are trained: their weights go with their sites
    knob = KEEP_RATE if method is None else method.fitted_knob if trained else method.knob
    make = getattr(policy, "at", None) or knob.turner(policy)
    group = "own" if method is None and not trained else "baseline"
    if make is None:
        return as_it_is(label, group, lambda: policy, origin)

    def sites(task: Task) -> Sites | None:
        if trained:
            return None
        return task.where_for(policy)

    def at(task: Task, budget: float) -> list[Policy]:
        return [at_budget(make, knob, budget, task, sites(task))]

    return Contestant(label, group, at, sites, knob.name, origin)
