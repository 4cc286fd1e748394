"""A pruned model as one graph: `torch.export` and ONNX, for policies that know beforehand how many tokens stay.

Which tokens stay is decided in the graph, per image; how many is the same for all images (`Decision.count`), so that
all shapes but the batch size are fixed. Policies that keep as many as an image needs have no such graph: they run in
Python, or compiled around attention (`PrunedViT.compile_parts`).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import UserError
from torch.export import Dim, ExportedProgram

from vitprune_env.errors import ExportError
from vitprune_env.pruned import PrunedViT
from vitprune_env.types import Decision, Site

OPSET = 18
EXAMPLE_BATCH = 2  # a batch of one would be taken for a constant


@torch.no_grad()
def export_program(model: PrunedViT, max_batch: int | None = None) -> ExportedProgram:
    """The model as a graph from images `[B, C, H, W]` to logits `[B, classes]`, with any batch size.

    Args:
        model: a pruned model in evaluation mode; EViT, TopK and the like.
        max_batch: the largest batch size it must take; None: no limit.

    Raises:
        ExportError: if the model is in training mode, or its policy does not know how many tokens stay, or cannot be
            traced.
    """
    if model.training:
        raise ExportError("model: expected a model in evaluation mode; call model.eval() first")
    backbone = model.backbone
    images = torch.zeros(EXAMPLE_BATCH, backbone.in_chans, *backbone.image_size).to(next(backbone.parameters()))
    _check_counts(model, images)
    sizes = {"images": {0: Dim("batch", min=1, max=max_batch)}}
    try:
        return torch.export.export(model, (images,), dynamic_shapes=sizes)
    except (UserError, RuntimeError) as error:
        raise ExportError(
            f"policy: {type(model.policy).__name__} cannot be traced for any batch size ({error}); "
            "it must decide with tensor operations alone, without random numbers or Python numbers of its own"
        ) from error


def export_onnx(model: PrunedViT, path: str | os.PathLike[str]) -> Path:
    """Write the model as an ONNX file with input `images` and output `logits`, any batch size.

    Needs the packages `onnx` and `onnxscript` (`pip install vitprune_env[onnx]`).

    Args:
        model: as for `export_program`.
        path: file name, customarily ending in `.onnx`.

    Raises:
        ExportError: as for `export_program`, or if the packages are missing.
    """
    try:
        table = {torch.ops.aten.sort.stable: _stable_sort()}
    except ImportError as error:
        raise ExportError(f"onnx: {error}; install the packages onnx and onnxscript") from error
    program = torch.onnx.export(
        export_program(model),
        dynamo=True,
        verbose=False,
        opset_version=OPSET,
        input_names=["images"],
        output_names=["logits"],
        custom_translation_table=table,
    )
    assert program is not None  # it is None only for the exporter of old
    program.save(str(path))
    return Path(path)


def _check_counts(model: PrunedViT, images: Tensor) -> None:
    """Play once and make sure that every decision says how many tokens stay."""
    unknown: list[str] = []

    def watch(decision: Decision, site: Site) -> None:
        if decision.count is None:
            unknown.append(site.label)

    model.forward_features(images, on_decision=watch)
    if unknown:
        raise ExportError(
            f"policy: {type(model.policy).__name__} does not say beforehand how many tokens stay after "
            f"{', '.join(unknown)} (Decision.count), and a graph needs fixed shapes; run the model in Python, with "
            "compile_parts() if wanted, or export a policy with fixed counts such as EViT or TopK"
        )


def _stable_sort() -> Any:
    """ONNX has no stable sort by that name, but its TopK takes equal values in order, and so sorts stably."""
    from onnxscript import opset18 as op  # pyright: ignore[reportMissingImports]  # an optional extra

    def sort(values: Any, *, stable: bool = True, dim: int = -1, descending: bool = False) -> Any:  # noqa: ARG001, the operator's own arguments
        size = op.Gather(op.Shape(values), op.Constant(value_ints=[dim]))
        return op.TopK(values, size, axis=dim, largest=int(descending), sorted=1)

    return sort
