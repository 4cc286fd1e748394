"""As many tokens as an image needs, in one graph: one image at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_pruned import Loud, describe, token_policy
from torch import Tensor

from helpers import random_images, toy
from vitprune_env import Policy, PrunedViT
from vitprune_env.baselines import ATS, LTMP, EViT, RandomDrop
from vitprune_env.deploy.export import export_onnx, export_program
from vitprune_env.errors import ExportError

DEIT = "deit_tiny_patch16_224"
POOLED = "vit_medium_patch16_gap_240"  # keeps at least one token


def ragged(backbone: str, policy: Policy | str) -> PrunedViT:
    """A model whose policy decides how many tokens stay."""
    network = toy(backbone)
    return PrunedViT(network, token_policy(network) if isinstance(policy, str) else policy).eval()


def varied_images(model: PrunedViT) -> list[Tensor]:
    """Single images that keep different numbers of tokens."""
    return [(0.3 + seed) * random_images(model.backbone, 1, seed=seed) for seed in range(6)]


def alive_at_the_end(model: PrunedViT, images: list[Tensor]) -> set[int]:
    return {int(model.forward_features(image).alive.sum()) for image in images}


@pytest.mark.parametrize(
    ("backbone", "policy"),
    [
        (DEIT, "learnt"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((POOLED, "learnt"), (DEIT, ATS(16)), (DEIT, LTMP(prune_thresholds=0.05)))
        ),
    ],
    ids=describe,
)
@torch.no_grad()
def test_one_graph_for_every_number_of_tokens(tmp_path: Path, backbone: str, policy: Policy | str) -> None:
    model = ragged(backbone, policy)
    torch.export.save(export_program(model, max_batch=1), tmp_path / "model.pt2")
    graph = torch.export.load(tmp_path / "model.pt2").module()
    images = varied_images(model)
    assert len(alive_at_the_end(model, images)) > 2
    for image in images:
        torch.testing.assert_close(graph(image), model(image), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_nobody_and_everybody_may_stay() -> None:
    """The extremes are sizes like any other: no graph is made for what the example image happened to keep."""
    network = toy(DEIT)
    for threshold, expected in ((1e9, {0}), (-1e9, {network.num_patches})):
        model = ragged(DEIT, token_policy(network).with_threshold(threshold))
        images = varied_images(model)
        assert alive_at_the_end(model, images) == expected
        graph = export_program(model, max_batch=1).module()
        torch.testing.assert_close(graph(images[0]), model(images[0]), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_one_image_at_a_time_with_fixed_counts() -> None:
    model = ragged(DEIT, EViT(0.6))
    image = random_images(model.backbone, 1, seed=1)
    graph = export_program(model, max_batch=1).module()
    torch.testing.assert_close(graph(image), model(image), atol=1e-5, rtol=1e-5)


def test_what_asks_for_its_sizes_in_python_is_refused_with_the_line() -> None:
    for policy, where in ((LTMP(merge_thresholds=0.5), r"matching\.py:\d+ in match"), (Loud(), r"test_pruned\.py")):
        message = rf"{type(policy).__name__} cannot be traced for one image at a time \(Could not .*{where}"
        with pytest.raises(ExportError, match=message) as raised:
            export_program(ragged(DEIT, policy), max_batch=1)
        assert len(str(raised.value)) < 1000


def test_a_random_stream_is_no_part_of_a_graph() -> None:
    """Traced for a single image, its numbers of the day would become constants without a word."""
    with pytest.raises(ExportError, match="RandomDrop decides the same images differently each time at 1"):
        export_program(ragged(DEIT, RandomDrop(0.5)), max_batch=1)


@pytest.mark.parametrize(
    ("backbone", "policy"), [(DEIT, "learnt"), (POOLED, LTMP(prune_thresholds=0.05))], ids=describe
)
@torch.no_grad()
def test_onnx_for_every_number_of_tokens(tmp_path: Path, backbone: str, policy: Policy | str) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model = ragged(backbone, policy)
    images = varied_images(model)
    assert len(alive_at_the_end(model, images)) > 2
    session = runtime.InferenceSession(str(export_onnx(model, tmp_path / "model.onnx", max_batch=1)))
    for image in images:
        (logits,) = session.run(["logits"], {"images": image.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), model(image), atol=1e-4, rtol=1e-4)


def test_onnx_without_an_operator_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    with pytest.raises(ExportError, match=r"ATS cannot be written as ONNX .*searchsorted"):
        export_onnx(ragged(DEIT, ATS(16)), tmp_path / "model.onnx", max_batch=1)
