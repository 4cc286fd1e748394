"""ONNX files of pruned models: how they are run here, and how their matrices become 8-bit integers.

Needs the package `onnxruntime` (`pip install vitprune_env[onnx]`).
"""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from vitprune_env.deploy.export import quiet
from vitprune_env.errors import ExportError

MATRICES = ("MatMul", "Gemm")  # operators whose weights are quantised; convolutions are slower as integers on most CPUs


class OnnxModel(nn.Module):
    """An ONNX file of `export_onnx` as a module on the CPU: images `[B, C, H, W]` to logits `[B, classes]`.

    Args:
        path: the file.
        max_batch: the largest batch that it takes, as it was exported; larger ones are taken apart. None: any.
        threads: of the CPU; None: as many as torch uses.

    Raises:
        ExportError: if onnxruntime is missing.
    """

    def __init__(self, path: str | os.PathLike[str], max_batch: int | None = None, threads: int | None = None) -> None:
        super().__init__()
        runtime = _imported("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads() if threads is None else threads
        options.log_severity_level = 3  # errors
        self.max_batch = max_batch
        self._session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def forward(self, images: Tensor) -> Tensor:
        """Logits, in single precision.

        Raises:
            TypeError: for images that are no floating-point tensor, such as pixels from 0 to 255.
        """
        if not images.is_floating_point():
            raise TypeError(f"images: expected a floating-point tensor [B, C, H, W], got {images.dtype}")
        parts = images.float().split(self.max_batch or max(1, len(images)))
        return torch.cat([torch.from_numpy(self._session.run(None, {"images": part.numpy()})[0]) for part in parts])


def quantise_onnx(path: str | os.PathLike[str], target: str | os.PathLike[str]) -> Path:
    """Write an ONNX file whose weight matrices are 8-bit integers, one scale per output (dynamic quantisation).

    Activations become integers while the model runs, with a scale for each tensor. Policies decide on the features of
    the quantised network, so that other tokens may stay: measure accuracy and cost again.

    Args:
        path: a file of `export_onnx`.
        target: the file to write.

    Raises:
        ExportError: if onnx or onnxruntime is missing.
    """
    onnx, quantisation = _imported("onnx"), _imported("onnxruntime.quantization")
    model = onnx.load(str(path))
    # torch writes the shapes of all values; some no longer hold once numbers of tokens are known, and onnxruntime's
    # quantiser infers shapes of its own, finds that they differ, and gives up.
    del model.graph.value_info[:]
    for function in model.functions:
        del function.value_info[:]
    with TemporaryDirectory() as folder, quiet("root"):
        bare = Path(folder) / "model.onnx"
        onnx.save(model, str(bare))
        quantisation.quantize_dynamic(
            str(bare),
            str(target),
            op_types_to_quantize=list(MATRICES),
            per_channel=True,
            weight_type=quantisation.QuantType.QInt8,
            extra_options={"MatMulConstBOnly": True},
        )
    return Path(target)


def _imported(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise ExportError(f"onnx: {error}; pip install vitprune_env[onnx]") from error
