"""Every policy at the same mean GMACs on the same images, in one call."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from vitprune_env.benchmarking.contestants import DENSE, Contestant, Entries, Task, contestants_of
from vitprune_env.benchmarking.images import (
    TUNE_IMAGES,
    Images,
    as_batches,
    digest,
    first_images,
    set_aside,
    shown_images,
)
from vitprune_env.benchmarking.measurement import SHOWN, Row, Sites, Timing, measure
from vitprune_env.benchmarking.result import BenchmarkResult, Scenes
from vitprune_env.benchmarking.store import Store
from vitprune_env.data import data_config
from vitprune_env.engine.backbone import Backbone
from vitprune_env.errors import BudgetError, SettingsError
from vitprune_env.files import PathLike, prepare_folder

TIMING = Timing()


def benchmark(
    policies: Entries,
    backbone: Backbone,
    data: Images,
    *,
    budgets: Sequence[float] = (0.25, 0.35, 0.5),
    sites: Sites | Literal["published"] | None = None,
    tune: Images | None = None,
    fit: Images | None = None,
    seeds: int = 5,
    seed: int = 0,
    controls: bool = True,
    timing: Timing | None = TIMING,
    batch_size: int = 250,
    output: PathLike | None = None,
    resume: bool = False,
    quick: bool = False,
    progress: bool = True,
    settings: Mapping[str, Any] | None = None,
) -> BenchmarkResult:
    """Compare policies on one network at equal cost.

    Every policy is brought to each budget on images that are not reported on: the parameter that sets its cost is found
    by bisection, what has to be trained of a method is trained for the budget first, a trained policy's threshold is
    calibrated. By default all stand at the same sites, and every row says where it stands.

    Args:
        policies: names of baselines ("tome", "evit:fuse=False"), policy objects, classes or functions that make one
            from a keep rate, paths of saved policies; or a mapping from labels to any of these.
        backbone: the network; everything runs on its device.
        data: labelled images to report on: a dataset of (image, label) pairs, image files, or a list of batches.
        budgets: mean GMACs per image as shares of the dense model's, the policy's own cost included.
        sites: None: the network's own sites for all, and inside every block for methods that are made to act there;
            "published": where each paper has them; or the sites where all are to act. Trained policies act at the sites
            that they were trained for.
        tune: images to calibrate on; None: the first 256 of `fit`, or else a quarter of `data`, at most 256 images,
            which are then not reported on.
        fit: images to train those methods on that need it.
        seeds: runs of whatever is random.
        seed: the first of them.
        controls: whether dropping at random, actors that never learned, and trained methods before their training
            take part.
        timing: how speed is measured; None: not at all.
        batch_size: images per batch.
        output: folder for everything: results after each row, tables and figures in the end; None: nothing is written.
        resume: go on from the rows in `output`; on an empty folder this starts fresh.
        quick: train methods for a few steps only, to see that everything works.
        progress: whether to show a progress bar.
        settings: further settings to note, and to be the same when resuming, such as the split of the images.

    Returns:
        The rows, with `.table()`, `.csv()`, `.json()`, `.latex()`, `.plot()` and `.save(folder)`.

    Raises:
        ValueError: for budgets or counts out of range, no images, two policies of the same label, or a method that
            needs training without `fit`.
        UnknownNameError: for the name of no baseline.
        ParameterError: for a parameter that a baseline does not have.
        CheckpointError: for a saved policy or stored results that cannot be used.
        StorageError: if `output` cannot be written.
    """
    _check(budgets, sites, seeds, batch_size, timing)
    lines = contestants_of(policies, controls)
    if fit is None and (names := [line.name for line in lines if line.needs_fit]):
        raise ValueError(f"fit: expected training images, which {', '.join(names)} need, got None")
    folder = None if output is None else Path(output)
    if resume and folder is None:
        raise SettingsError("resume: expected an output folder to resume from, got output=None")
    if folder is not None:
        prepare_folder(folder)
    device = next(backbone.parameters()).device
    if tune is None and fit is None:
        data, tune = set_aside(data)
    test = as_batches(data, batch_size, device)
    calibration = as_batches(tune, batch_size, device) if tune is not None else _first(fit, batch_size, device)
    task = Task(backbone, test, [*calibration], fit, sites, seed, seeds, folder, resume, quick)
    images, labels = shown_images(test, SHOWN)
    store = Store(folder, {**_settings(task, images), **(settings or {})}, resume)
    jobs = [(DENSE, None), *((line, share) for share in budgets for line in lines if not line.fixed)]
    jobs += [(line, None) for line in lines if line.fixed]
    with tqdm(jobs, disable=not progress, unit="row") as bar:
        for line, share in bar:
            bar.set_description(line.name if share is None else f"{line.name} at {share:.0%}")
            if store.find(line.name, share, line.origin) is None:
                store.add(_measured(line, share, task, timing))
    config = data_config(backbone)
    names = backbone.class_names or getattr(data, "class_names", None)
    scenes = Scenes(images.cpu(), labels.cpu(), backbone.grid_size, config["mean"], config["std"], names)
    result = BenchmarkResult(tuple(store.rows), store.settings, scenes)
    if folder is not None:
        result.save(folder)
    return result


def _check(budgets: Sequence[float], sites: Any, seeds: int, batch_size: int, timing: Timing | None) -> None:
    if not budgets:
        raise ValueError("budgets: expected at least one share of the dense GMACs, got none")
    for share in budgets:
        if not 0 < share < 1:
            raise ValueError(f"budgets: expected shares of the dense GMACs between 0 and 1, got {share}")
    if isinstance(sites, str) and sites != "published":
        raise ValueError(f"sites: expected 'published', sites or None, got {sites!r}")
    counts = {"seeds": seeds, "batch_size": batch_size}
    if timing is not None:
        counts |= {"pairs": timing.pairs, "timed_images": timing.images}
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name}: expected 1 or more, got {count}")


def _first(fit: Images | None, batch_size: int, device: torch.device) -> list[Any]:
    """The first images of those to train on, in batches of at most `batch_size`."""
    assert fit is not None
    images, labels = first_images(as_batches(fit, min(batch_size, TUNE_IMAGES), device), TUNE_IMAGES)
    return list(zip(images.split(batch_size), labels.split(batch_size), strict=True))


def _settings(task: Task, images: torch.Tensor) -> dict[str, Any]:
    """What the numbers depend on beside policy and budget."""
    sites = task.sites if task.sites is None or isinstance(task.sites, str) else list(map(str, task.sites))
    return {
        "backbone": task.backbone.name,
        "weights": digest(*task.backbone.model.state_dict().values()),
        "images": digest(images),
        "tune_images": sum(len(labels) for _, labels in task.tune),
        "sites": sites,
        "seed": task.seed,
        "seeds": task.seeds,
        "quick": task.quick,
    }


def _measured(line: Contestant, share: float | None, task: Task, timing: Timing | None) -> Row:
    """Bring a policy to a budget and let it classify the images."""
    start = time.perf_counter()
    facts: dict[str, Any] = {"group": line.group, "share": share, "origin": line.origin}
    try:
        policies = line.at(task, (share or 1.0) * task.dense_gmacs)
    except BudgetError as error:
        return Row(line.name, **facts, out_of_reach=str(error), seconds=time.perf_counter() - start)
    setting = ", ".join(filter(None, map(line.setting, policies)))
    row = measure(line.name, task.backbone, policies, task.test, sites=line.sites(task), timing=timing, **facts)
    return replace(row, setting=setting, seconds=time.perf_counter() - start)
