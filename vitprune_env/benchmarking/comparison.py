"""Every policy at the same mean GMACs on the same images, in one call."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from tqdm import tqdm

from vitprune_env.benchmarking.contestants import DENSE, Contestant, Entries, Fits, Task, contestants_of
from vitprune_env.benchmarking.images import (
    TUNE_IMAGES,
    Images,
    as_batches,
    digest,
    first_images,
    read_once,
    set_aside,
    shown_images,
)
from vitprune_env.benchmarking.measurement import SHOWN, Row, Sites, Timing, row_of, run_of, speed_of
from vitprune_env.benchmarking.prepared import PreparedImages
from vitprune_env.benchmarking.result import BenchmarkResult, Scenes
from vitprune_env.benchmarking.store import RESULTS, Store, machine
from vitprune_env.data import data_config
from vitprune_env.engine.backbone import Backbone
from vitprune_env.engine.kernels import Amp, autocast
from vitprune_env.errors import BudgetError, SettingsError
from vitprune_env.files import PathLike, locked, make_way, prepare_folder

TIMING = Timing()
FITS = Fits()
Places = Literal["backbone", "published", "both"]


def benchmark(
    policies: Entries,
    backbone: Backbone,
    data: Images,
    *,
    budgets: float | Sequence[float] = (0.25, 0.35, 0.5),
    sites: Sites | Places = "backbone",
    tune: Images | None = None,
    fit: Images | None = None,
    seeds: int = 5,
    seed: int = 0,
    controls: bool = True,
    timing: Timing | None = TIMING,
    batch_size: int = 250,
    amp: Amp = "off",
    fits: Fits = FITS,
    output: PathLike | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    settings: Mapping[str, Any] | None = None,
    command: str = "",
) -> BenchmarkResult:
    """Compare policies on one network at equal cost.

    Every policy is brought to each budget on images that are not reported on: the parameter that sets its cost is
    searched, what has to be trained of a method is trained first, a trained policy's threshold is calibrated. By
    default all stand at the same sites, and every row says where it stands.

    Image files are decoded once. The part of the network before the first site runs once per image, for all policies
    that begin at the same place. Both need memory, at most 1 GiB for each set of images.

    Args:
        policies: names of baselines ("tome", "evit:fuse=False"), policy objects, classes or functions that make one
            from a keep rate, paths of saved policies; or a mapping from labels to any of these.
        backbone: the network; everything runs on its device.
        data: labelled images to report on: a dataset of (image, label) pairs, image files, or a list of batches.
        budgets: mean GMACs per image as shares of the dense model's, the policy's own cost included; one or several.
        sites: "backbone": the network's own sites for all, and inside every block for methods that are made to act
            there; "published": where each paper has them, at the same share of the depth; "both": the first, and a
            second row for methods that were published elsewhere; or the sites where all are to act. Trained policies
            act at the sites that they were trained for.
        tune: images to calibrate on; None: the first 256 of `fit`, or else a quarter of `data`, at most 256 images,
            which are then not reported on.
        fit: images to train those methods on that need it.
        seeds: runs of whatever is random.
        seed: the first of them.
        controls: whether dropping at random, actors that never learned, and trained methods before their training
            take part.
        timing: how speed is measured; None: not at all.
        batch_size: images per batch.
        amp: precision of everything that is measured and calibrated, see `engine.kernels.autocast`. Methods are trained
            in it too, except in fp16, which would lose gradients.
        fits: how methods are trained: for each budget or once for the middle one, and for how many steps.
        output: folder for everything: results after each run, tables and figures in the end; None: nothing is written.
        resume: go on from the runs in `output`; on an empty folder this starts fresh.
        overwrite: whether to replace results that are in `output`, which are refused otherwise.
        progress: whether to show a progress bar.
        settings: further settings to note, and to be the same when resuming, such as the split of the images.
        command: what the user typed, for the head of `table.md`.

    Returns:
        The rows, with `.table()`, `.report()`, `.csv()`, `.json()`, `.latex()`, `.plot()` and `.save(folder)`.

    Raises:
        ValueError: for budgets or counts out of range, no images, two policies of the same label, or a method that
            needs training without `fit`.
        UnknownNameError: for the name of no baseline.
        ParameterError: for a parameter that a baseline does not have.
        CheckpointError: for a saved policy or stored results that cannot be used.
        StorageError: if `output` cannot be written.
    """
    budgets = (budgets,) if isinstance(budgets, int | float) else budgets
    _check(budgets, sites, seeds, batch_size, timing)
    lines = contestants_of(policies, controls)
    needs_fit = [line.name for line in lines if line.needs_fit]
    if fit is None and needs_fit:
        raise ValueError(f"fit: expected training images, which {', '.join(needs_fit)} need, got None")
    folder = None if output is None else Path(output)
    if resume and folder is None:
        raise SettingsError("resume: expected an output folder to resume from, got output=None")
    device = next(backbone.parameters()).device
    precision = autocast(device, amp)
    if folder is not None:
        prepare_folder(folder)
        if not resume:
            make_way(folder, (RESULTS,), overwrite)
    names = backbone.class_names or getattr(data, "class_names", None)
    data = read_once(data)
    if needs_fit and fit is not None:
        fit = read_once(fit)
    if tune is None and fit is None:
        data, tune = set_aside(data)
    test = PreparedImages(backbone, as_batches(data, batch_size, device))
    calibration = _first(fit, batch_size, device) if tune is None else as_batches(read_once(tune), batch_size, device)
    places = sites if isinstance(sites, str) else "given"
    task = Task(
        backbone,
        test,
        PreparedImages(backbone, calibration),
        fit,
        tuple(budgets),
        "published" if places == "published" else sites if not isinstance(sites, str) else None,
        seed,
        seeds,
        fits,
        folder,
        resume,
        progress,
    )
    if places == "both":
        second = {line.name: line.published(task) for line in lines}
        lines = [row for line in lines for row in (line, second[line.name]) if row is not None]
    images, labels = shown_images(test, SHOWN)
    asked = {
        **_settings(task, images),
        "sites": sites if isinstance(sites, str) else list(map(str, sites)),
        "precision": _name_of(precision, device),
        **(settings or {}),
    }
    store = Store(folder, asked, resume, {"command": command, **machine()})
    jobs = [(DENSE, None), *((line, share) for share in budgets for line in lines if not line.fixed)]
    jobs += [(line, None) for line in lines if line.fixed]
    alone = nullcontext() if folder is None else locked(folder)
    with alone, tqdm(jobs, disable=not progress, unit="row") as bar, precision:
        for line, share in bar:
            bar.set_description(line.name if share is None else f"{line.name} at {share:.0%}")
            if store.find(line.name, share, line.origin) is None:
                store.add(_measured(line, share, task, timing, store))
    config = data_config(backbone)
    scenes = Scenes(images.cpu(), labels.cpu(), backbone.grid_size, config["mean"], config["std"], names)
    result = BenchmarkResult(tuple(store.rows), store.settings, scenes, store.about)
    if folder is not None:
        result.save(folder)
    return result


def _check(budgets: Sequence[float], sites: Any, seeds: int, batch_size: int, timing: Timing | None) -> None:
    if not budgets:
        raise ValueError("budgets: expected at least one share of the dense GMACs, got none")
    for share in budgets:
        if not 0 < share < 1:
            raise ValueError(f"budgets: expected shares of the dense GMACs between 0 and 1, got {share}")
    if isinstance(sites, str) and sites not in get_args(Places):
        raise ValueError(f"sites: expected 'backbone', 'published', 'both' or sites, got {sites!r}")
    counts = {"seeds": seeds, "batch_size": batch_size}
    if timing is not None:
        counts |= {"pairs": timing.pairs, "timed_images": timing.images, "warm_up": timing.warm_up}
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name}: expected 1 or more, got {count}")


def _name_of(precision: torch.autocast, device: torch.device) -> str:
    """What is multiplied: fp32, bf16 or fp16."""
    with precision:
        if not torch.is_autocast_enabled(device.type):
            return "fp32"
        return "fp16" if torch.get_autocast_dtype(device.type) == torch.float16 else "bf16"


def _first(fit: Images | None, batch_size: int, device: torch.device) -> list[Any]:
    """The first images of those to train on, in batches of at most `batch_size`."""
    assert fit is not None
    images, labels = first_images(as_batches(fit, min(batch_size, TUNE_IMAGES), device), TUNE_IMAGES)
    return list(zip(images.split(batch_size), labels.split(batch_size), strict=True))


def _settings(task: Task, images: torch.Tensor) -> dict[str, Any]:
    """What the numbers depend on beside policy and budget."""
    return {
        "backbone": task.backbone.name,
        "depth": task.backbone.depth,
        "weights": digest(*task.backbone.model.state_dict().values()),
        "images": digest(images),
        "test_images": len(task.test),
        "tune_images": len(task.tune),
        "seed": task.seed,
        "seeds": task.seeds,
        "fits": task.fits,
    }


def _measured(line: Contestant, share: float | None, task: Task, timing: Timing | None, store: Store) -> Row:
    """Bring a policy to a budget and let it classify the images, run by run; runs that are there are not repeated."""
    start = time.perf_counter()
    facts: dict[str, Any] = {"group": line.group, "share": share, "origin": line.origin}
    task.notes.clear()
    try:
        policies = line.at(task, (share or 1.0) * task.dense_gmacs)
    except BudgetError as error:
        return Row(line.name, **facts, out_of_reach=str(error), seconds=time.perf_counter() - start)
    place = (line.name, share, line.origin)
    sites = line.sites(task)
    for policy in policies[len(store.runs(*place)) :]:
        store.add_run(run_of(task.backbone, policy, task.test, sites), *place)
    if timing is not None:
        facts |= speed_of(task.backbone, policies[0], task.test, sites, timing)
    setting = ", ".join(filter(None, [*map(line.setting, policies), *task.notes]))
    row = row_of(line.name, store.runs(*place), **facts, setting=setting)
    return replace(row, seconds=time.perf_counter() - start)
