"""A pruned model as one graph: `torch.export` and ONNX.

The graph decides per image which tokens stay. If the policy fixes their number in advance (`Decision.count`), all
shapes but the batch size are constant. If the number depends on the image, the graph takes one image at a time, and the
number of tokens is a size that the graph computes from its data (torch: an unbacked size).
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import UserError
from torch.export import Dim, ExportedProgram
from torch.onnx import OnnxExporterError

from vitprune_env.deploy.pruned_vit import PrunedViT
from vitprune_env.errors import ExportError
from vitprune_env.types import Decision, Site

OPSET = 18
EXAMPLE_BATCH = 2  # torch.export treats a batch of one as a constant


@torch.no_grad()
def export_program(model: PrunedViT, max_batch: int | None = None) -> ExportedProgram:
    """The model as a graph from images `[B, C, H, W]` to logits `[B, classes]`.

    Args:
        model: a pruned model in evaluation mode.
        max_batch: the largest batch size of the graph; None: no limit. With 1 the graph takes exactly one image, and
            the number of tokens that stay may depend on it (learnt policies, thresholds). Above 1 the policy must fix
            the number in advance (`Decision.count`, as EViT and TopK do).

    Raises:
        ExportError: if the model is in training mode, if its policy does not fix the number of tokens for a batch, or
            if it cannot be traced; the message names the place.
        ValueError: for a `max_batch` below 1.
    """
    if model.training:
        raise ExportError("model: expected a model in evaluation mode; call model.eval() first")
    if max_batch is not None and max_batch < 1:
        raise ValueError(f"max_batch: expected at least 1 or None, got {max_batch}")
    backbone, single = model.backbone, max_batch == 1
    batch = 1 if single else EXAMPLE_BATCH
    images = torch.zeros(batch, backbone.in_chans, *backbone.image_size).to(next(backbone.parameters()))
    _check_decisions(model, images, single)
    sizes = None if single else {"images": {0: Dim("batch", min=1, max=max_batch)}}
    try:
        return torch.export.export(model, (images,), dynamic_shapes=sizes)
    except (UserError, RuntimeError) as error:
        raise ExportError(
            f"policy: {type(model.policy).__name__} cannot be traced for "
            f"{'one image at a time' if single else 'any batch size'} ({_reason(error)}); it must decide with tensor "
            "operations alone, without random numbers or Python numbers of its own"
        ) from error


def export_onnx(model: PrunedViT, path: str | os.PathLike[str], max_batch: int | None = None) -> Path:
    """Write the model as an ONNX file with input `images` and output `logits`.

    Needs the packages `onnx` and `onnxscript` (`pip install vitprune_env[onnx]`). Warnings of the exporter, which are
    about its own steps, are left out; what goes wrong is an error.

    Args:
        model: as for `export_program`.
        path: file name, customarily ending in `.onnx`.
        max_batch: as for `export_program`.

    Raises:
        ExportError: as for `export_program`, or if the packages are missing, or if ONNX lacks an operator that the
            policy uses.
        ValueError: as for `export_program`.
    """
    try:
        table = {torch.ops.aten.sort.stable: _stable_sort()}
    except ImportError as error:
        raise ExportError(f"onnx: {error}; pip install vitprune_env[onnx]") from error
    try:
        exported = export_program(model, max_batch)
        with quiet("onnx_ir", "onnxscript", "torch.onnx"):
            program = torch.onnx.export(
                exported,
                dynamo=True,
                verbose=False,
                opset_version=OPSET,
                input_names=["images"],
                output_names=["logits"],
                custom_translation_table=table,
            )
    except OnnxExporterError as error:
        why = str(error.__cause__ or error)
        raise ExportError(f"policy: {type(model.policy).__name__} cannot be written as ONNX ({why})") from error
    assert program is not None  # None is returned only with dynamo=False
    program.save(str(path))
    return Path(path)


@contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Leave out Python's warnings, and what packages log below errors; handlers that they add to the root go again.

    Args:
        *names: of the packages' loggers.
    """
    logs = [logging.getLogger(name) for name in names]
    levels, handlers = [log.level for log in logs], list(logging.root.handlers)
    for log in logs:
        log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.root.handlers[:] = handlers
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)


def _check_decisions(model: PrunedViT, images: Tensor, single: bool) -> None:
    """Run the model twice and compare: decisions must repeat, and for several images they must have a count.

    Raises:
        ExportError: naming the first site where they do not.
    """
    decisions: list[Decision] = []
    sites: list[Site] = []

    def watch(decision: Decision, site: Site) -> None:
        decisions.append(decision)
        sites.append(site)

    for _ in range(2):
        model.forward_features(images, on_decision=watch)
    name, steps = type(model.policy).__name__, len(model.sites)
    for first, again, site in zip(decisions[:steps], decisions[steps:], sites, strict=False):
        if not torch.equal(first.keep, again.keep):  # in a graph, random numbers would become constants
            raise ExportError(
                f"policy: {name} decides the same images differently each time at {site}; "
                "a random stream of its own is no part of a graph"
            )
    unknown = [site.label for site, decision in zip(sites[:steps], decisions, strict=False) if decision.count is None]
    if unknown and not single:
        raise ExportError(
            f"policy: {name} does not say beforehand how many tokens stay after {', '.join(unknown)} "
            "(Decision.count), and a graph for several images needs fixed shapes; export it for one image at a time "
            "(max_batch=1), run the model in Python, with compile_parts() if wanted, or export a policy with fixed "
            "counts such as EViT or TopK"
        )


def _reason(error: Exception) -> str:
    """The two useful lines of torch's long message: what could not be traced, and the line of code."""
    lines = str(error).strip().splitlines()
    return " ".join([*lines[:1], *(line for line in lines[1:] if line.startswith("Caused by"))])


def _stable_sort() -> Any:
    """A stable sort from ONNX operators: TopK of all values, which keeps equal values in their order."""
    from onnxscript import opset18 as op  # pyright: ignore[reportMissingImports]  # an optional extra

    def sort(values: Any, *, stable: bool = True, dim: int = -1, descending: bool = False) -> Any:  # noqa: ARG001, the operator's own arguments
        size = op.Gather(op.Shape(values), op.Constant(value_ints=[dim]))
        return op.TopK(values, size, axis=dim, largest=int(descending), sorted=1)

    return sort
