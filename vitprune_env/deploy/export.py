"""A pruned model as one graph: `torch.export` and ONNX.

Which tokens stay is decided in the graph, per image. Where the policy knows beforehand how many (`Decision.count`), all
shapes but the batch size are fixed. Where every image keeps as many as it needs, the graph takes one image at a time,
and the number of tokens becomes a size that it reads from its own data (an unbacked size, in the terms of torch).
"""

from __future__ import annotations

import os
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
EXAMPLE_BATCH = 2  # a batch of one would be taken for a constant


@torch.no_grad()
def export_program(model: PrunedViT, max_batch: int | None = None) -> ExportedProgram:
    """The model as a graph from images `[B, C, H, W]` to logits `[B, classes]`.

    Args:
        model: a pruned model in evaluation mode.
        max_batch: the largest batch size it must take; None: no limit. With 1 the graph takes exactly one image, and
            the policy may keep as many tokens of it as it likes (learnt policies, thresholds); above 1 it must say
            beforehand how many (`Decision.count`; EViT, TopK and the like).

    Raises:
        ExportError: if the model is in training mode, its policy does not know how many tokens stay in every image of
            a batch, or it cannot be traced; the message says where.
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

    Needs the packages `onnx` and `onnxscript` (`pip install vitprune_env[onnx]`).

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
        raise ExportError(f"onnx: {error}; install the packages onnx and onnxscript") from error
    try:
        program = torch.onnx.export(
            export_program(model, max_batch),
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
    assert program is not None  # it is None only for the exporter of old
    program.save(str(path))
    return Path(path)


def _check_decisions(model: PrunedViT, images: Tensor, single: bool) -> None:
    """Play twice: every decision must come again, and say how many tokens stay unless the graph takes single images."""
    decisions: list[Decision] = []
    sites: list[Site] = []

    def watch(decision: Decision, site: Site) -> None:
        decisions.append(decision)
        sites.append(site)

    for _ in range(2):
        model.forward_features(images, on_decision=watch)
    name, steps = type(model.policy).__name__, len(model.sites)
    for first, again, site in zip(decisions[:steps], decisions[steps:], sites, strict=False):
        if not torch.equal(first.keep, again.keep):  # traced, its random numbers would be the same for ever
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
    """What torch could not trace, and the line of code where: the two sentences of its page-long message."""
    lines = str(error).strip().splitlines()
    return " ".join([*lines[:1], *(line for line in lines[1:] if line.startswith("Caused by"))])


def _stable_sort() -> Any:
    """ONNX has no stable sort by that name, but its TopK takes equal values in order, and so sorts stably."""
    from onnxscript import opset18 as op  # pyright: ignore[reportMissingImports]  # an optional extra

    def sort(values: Any, *, stable: bool = True, dim: int = -1, descending: bool = False) -> Any:  # noqa: ARG001, the operator's own arguments
        size = op.Gather(op.Shape(values), op.Constant(value_ints=[dim]))
        return op.TopK(values, size, axis=dim, largest=int(descending), sorted=1)

    return sort
