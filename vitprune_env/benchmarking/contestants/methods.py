"""Registered baselines as lines of the table: as they are, or trained for the budget."""

from __future__ import annotations

import dataclasses
from statistics import median_high
from typing import Any, cast

import torch

from vitprune_env.baselines import Method, available, fit, parsed
from vitprune_env.baselines.fitting.recipe import recipe_sites
from vitprune_env.benchmarking.contestants.search import at_budget
from vitprune_env.benchmarking.contestants.task import Contestant, Task
from vitprune_env.benchmarking.measurement import Sites
from vitprune_env.errors import BudgetError
from vitprune_env.policy import Policy


def is_method(text: str) -> bool:
    """Whether a text names a baseline, with or without parameters."""
    return text.partition(":")[0] in available()


def of_method(label: str, text: str) -> list[Contestant]:
    """A registered method, and its untrained self where it is trained.

    Args:
        label: name of the line.
        text: the method's name, or `name:parameter=value,...`.

    Raises:
        ParameterError: for a parameter that the method does not have.
        ValueError: for a way out that there is not.
    """
    method, parameters = parsed(text)

    def where(task: Task) -> Sites:
        return task.where(method.sites(task.backbone), _published(method, task))

    def calibrated(task: Task, budget: float) -> list[Policy]:
        return _calibrated(method, task, budget, where(task), parameters)

    def fitted(task: Task, budget: float) -> list[Policy]:
        trained = _fitted(method, task, budget, where(task))
        trained = trained.leaving(**parameters) if parameters else trained
        return [at_budget(trained.at, method.fitted_knob, budget, task, where(task))]

    as_it_is = Contestant(
        label, "control" if method.name == "random" else "baseline", calibrated, where, method.knob.name
    )
    if method.recipe is None:
        return [as_it_is]
    found = []
    if set(parameters) <= {"leave"}:  # other ones belong to the untrained method
        found.append(Contestant(label, "baseline", fitted, where, method.fitted_knob.name, needs_fit=True))
    if method.needs_only_knob:
        found.append(dataclasses.replace(as_it_is, name=f"{label} (unfitted)", group="control"))
    return found


def _published(method: Method, task: Task) -> Sites:
    """Where the paper has it, at the same share of the depth."""
    if method.recipe is not None:
        return recipe_sites(method.recipe, task.backbone, "published")
    setting = method.knob.setting(1.0, task.backbone.num_patches, 1)
    return task.backbone.sites_for(method(**{**method.start, method.knob.name: setting}), "published")


def _calibrated(method: Method, task: Task, budget: float, sites: Sites, parameters: dict[str, Any]) -> list[Policy]:
    """A method as it is, once per seed if it has one; what it costs does not depend on that."""
    knob = method.knob

    def build(setting: Any, **more: Any) -> Policy:
        return method(**{**method.start, knob.name: setting, **parameters, **more})

    policy = at_budget(build, knob, budget, task, sites)
    if not method.is_random:
        return [policy]
    setting = getattr(policy, knob.name)
    return [build(setting, seed=task.seed + index) for index in range(task.seeds)]


def _fitted(method: Method, task: Task, budget: float, sites: Sites) -> Any:
    """The trained method, whose knob may still have to be turned to the budget."""
    own = budget / task.dense_gmacs
    shares = [own]
    if task.fits.budgets == "middle" and task.shares:
        shares.insert(0, median_high(task.shares))
    try:
        return _trained(method, task, shares[0], sites)
    except BudgetError:  # the middle may be out of reach where a dearer budget is not
        return _trained(method, task, own, sites)


def _trained(method: Method, task: Task, share: float, sites: Sites) -> Policy:
    """The method trained for a budget, kept for the other budgets."""
    assert task.fit is not None
    place = "-published" if isinstance(task.sites, str) else ""
    folder = f"{method.name}{place}-{share:.3g}"
    if folder not in task.fitted:
        with _autocast_for_training(task):
            task.fitted[folder] = fit(
                method,
                task.backbone,
                cast(Any, task.fit),
                share * task.dense_gmacs,
                sites=sites,
                seed=task.seed,
                output=None if task.output is None else task.output / "fits" / folder,
                resume=task.resume,
                progress=task.progress,
                config=_config(method, task),
            )
    return task.fitted[folder]


def _config(method: Method, task: Task) -> Any:
    """The method's settings of a fit, as long as asked for; of few images a quarter is held out for validation."""
    config, fits = method.fit_config(), task.fits
    if fits.quick:
        config = config.quick()
    elif fits.steps is not None:
        config = _with_loop(config, steps=fits.steps)
    loop, images = getattr(config, "fit", config), len(cast(Any, task.fit))
    images = min(images, getattr(config, "images", 0) or images)
    if images >= loop.validation + loop.batch_size:
        return config
    return _with_loop(config, validation=images // 4, batch_size=min(loop.batch_size, images - images // 4))


def _with_loop(config: Any, **values: Any) -> Any:
    """Settings of a fit with other ones of its training loop, which are in them or are them."""
    if hasattr(config, "fit"):
        return dataclasses.replace(config, fit=dataclasses.replace(config.fit, **values))
    return dataclasses.replace(config, **values)


def _autocast_for_training(task: Task) -> torch.autocast:
    """The precision around, if gradients survive in it; fp16 would lose them.

    Autocast remembers the half-precision copies of weights until its outermost context ends. Weights change in
    training, so nothing is remembered here.
    """
    device = task.backbone.position.device.type
    dtype = torch.get_autocast_dtype(device)
    enabled = torch.is_autocast_enabled(device) and dtype == torch.bfloat16
    return torch.autocast(device, dtype, enabled=enabled, cache_enabled=False)
