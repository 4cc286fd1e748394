"""ONNX files: written quietly, run on any number of images, and with matrices of 8-bit integers."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import pytest
import torch
from test_pruned import token_policy

from helpers import random_images, toy
from vitprune_env import PrunedViT
from vitprune_env.deploy.export import export_onnx
from vitprune_env.deploy.onnx_files import OnnxModel, quantise_onnx

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


@torch.no_grad()
def test_a_learnt_policy_in_integers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its numbers of tokens depend on the image: shapes that the exporter wrote stop onnxruntime's quantiser."""
    network = toy("deit_tiny_patch16_224")
    model, images = PrunedViT(network, token_policy(network)).eval(), random_images(network, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = export_onnx(model, tmp_path / "model.onnx", max_batch=1)
        small = quantise_onnx(path, tmp_path / "model.int8.onnx")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert not any(capfd.readouterr())
    dense = model(images)
    exact, rounded = (OnnxModel(file, max_batch=1, threads=1)(images) for file in (path, small))
    torch.testing.assert_close(exact, dense, atol=1e-4, rtol=1e-4)
    assert not torch.equal(rounded, exact)
    assert torch.corrcoef(torch.stack([rounded.flatten(), exact.flatten()]))[0, 1] > 0.98
    assert small.stat().st_size < 0.7 * path.stat().st_size
