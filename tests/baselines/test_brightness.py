"""Brightness keeps the brightest patches, wherever tokens come from; the deployed model and its export do the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from helpers import random_images, toy
from vitprune_env import PrunedViT, TokenGame, play
from vitprune_env.baselines import Brightness, calibrate
from vitprune_env.benchmarking.prepared import PreparedImages
from vitprune_env.deploy.export import export_program
from vitprune_env.engine.backbone import Backbone

NAME = "vit_tiny_patch16_224"


def brightest(backbone: Backbone, images: Tensor, count: int) -> Tensor:
    """`[B, N]` bool, by loops over patches."""
    rows, columns = backbone.grid_size
    height, width = backbone.image_size[0] // rows, backbone.image_size[1] // columns
    means = [
        images[:, :, row * height : (row + 1) * height, column * width : (column + 1) * width].mean(dim=(1, 2, 3))
        for row in range(rows)
        for column in range(columns)
    ]
    best = torch.stack(means, dim=1).topk(count, dim=1).indices
    return torch.zeros(len(images), rows * columns, dtype=torch.bool).scatter(1, best, True)


@torch.no_grad()
def test_it_keeps_the_brightest_patches_for_nothing() -> None:
    backbone = toy(NAME)
    images, policy = random_images(backbone, 3), Brightness(0.5)
    game = TokenGame.for_policy(backbone, policy, sites=(1, "3.attn"))
    episode = play(game, policy, images)
    counts = ((backbone.num_patches + 1) // 2, ((backbone.num_patches + 1) // 2 + 1) // 2)
    assert episode.outcome.n_kept.tolist() == [list(counts)] * 3
    for step, count in enumerate(counts):
        assert torch.equal(episode.keep[step], brightest(backbone, images, count))
    assert episode.outcome.policy_macs.tolist() == [0, 0, 0]
    prepared = PreparedImages(backbone, [(images, torch.zeros(3, dtype=torch.int64))])
    for _ in range(2):  # computed, then from memory
        ((state, _),) = prepared.inputs(game)
        assert torch.equal(play(game, policy, state).keep, episode.keep)


@torch.no_grad()
def test_it_is_calibrated_deployed_and_exported() -> None:
    backbone = toy(NAME)
    images = random_images(backbone, 3)
    batches = [(images, torch.zeros(3, dtype=torch.int64))]
    policy = calibrate("brightness", 0.6 * TokenGame(backbone).cost.dense() / 1e9, backbone, batches)
    model = PrunedViT(backbone, policy).eval()
    played = play(TokenGame.for_policy(backbone, policy), policy, images).outcome
    torch.testing.assert_close(model(images), played.logits)
    torch.testing.assert_close(export_program(model).module()(images), model(images), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_it_is_written_as_onnx(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    from vitprune_env.deploy.export import export_onnx

    backbone = toy(NAME)
    model, images = PrunedViT(backbone, Brightness(0.5)).eval(), random_images(backbone, 3)
    session = onnxruntime.InferenceSession(str(export_onnx(model, tmp_path / "model.onnx")))
    (logits,) = session.run(None, {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), model(images), atol=1e-4, rtol=1e-4)
