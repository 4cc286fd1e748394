"""The loop that fits baselines: same seed same bits, also across interruptions; it stops early and refuses NaN."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers import random_images, toy
from vitprune_env.baselines.fitting import FitConfig, ImageInputs, ModuleTask, PreparedTokens, fit_task, frozen
from vitprune_env.engine.masked import classify_masked
from vitprune_env.errors import CheckpointError, NumericalError, StorageError
from vitprune_env.files import load_state, locked

CONFIG = FitConfig(epochs=3, batch_size=8, lr=0.05, validation=8, validate_every=3, checkpoint_every=3, seed=1)


class Points:
    """Noisy points of a line: inputs `[B, 3]`, class 1 above it."""

    def __init__(self, size: int = 48, seed: int = 0) -> None:
        self.inputs = torch.randn(size, 3, generator=torch.Generator().manual_seed(seed))
        self.labels = (self.inputs.sum(dim=1) > 0).long()
        self.drawn: list[list[int]] = []

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.inputs[index], int(self.labels[index])

    def batch(self, indices: Any) -> tuple[Tensor, Tensor]:
        self.drawn.append([int(index) for index in indices])
        return self.inputs[indices], self.labels[indices]


class Line(ModuleTask):
    """Logistic regression with random input noise; dies in step `dies`, answers NaN in step `nan`."""

    module: Any

    def __init__(self, dies: int = 0, nan: int = 0) -> None:
        super().__init__(nn.Linear(3, 2))
        nn.init.zeros_(self.module.weight)
        nn.init.zeros_(self.module.bias)
        self.calls, self.dies, self.nan, self.clamped = 0, dies, nan, 0

    def loss(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        self.calls += torch.is_grad_enabled()
        if self.calls == self.dies:
            raise KeyboardInterrupt
        noise = torch.randn(images.shape, generator=generator)
        loss = nn.functional.cross_entropy(self.module(images + 0.1 * noise), labels)
        return loss * (float("nan") if self.calls == self.nan else 1.0), {"noise": float(noise.mean())}

    def after_step(self) -> None:
        self.clamped += 1
        with torch.no_grad():
            self.module.bias.clamp_(-0.01, 0.01)


def weights(task: ModuleTask) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in task.module.parameters()])


def test_learns_and_says_what_was_best() -> None:
    task, data = Line(), Points()
    result = fit_task(task, data, CONFIG, progress=False)
    assert result.steps == task.clamped == 3 * 5
    assert [row["step"] for row in result.history] == list(range(1, 16))
    assert result.history[-1]["loss"] < 0.5 < result.history[0]["loss"]
    validated = [row for row in result.history if "validation/loss" in row]
    assert [row["step"] for row in validated] == [3, 6, 9, 12, 15]
    assert result.best == min(validated, key=lambda row: row["validation/loss"])
    assert task.module.bias.abs().max() <= 0.01, "after_step clamps"


def test_an_epoch_sees_every_training_image_once_and_no_held_out_one() -> None:
    data = Points()
    fit_task(Line(), data, CONFIG, progress=False)
    batches = [rows for rows in data.drawn if len(rows) == 8]
    held_out = batches[3]  # three steps, then the first validation
    epochs = [rows for rows in data.drawn if rows != held_out]
    assert len(epochs) == 15
    for start in (0, 5, 10):
        seen = [row for rows in epochs[start : start + 5] for row in rows]
        assert sorted([*seen, *held_out]) == list(range(48))
    assert epochs[:5] != epochs[5:10], "every epoch has its own order"


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("dies", [2, 8, 12])
def test_killed_and_resumed_is_uninterrupted_bit_for_bit(tmp_path: Path, dies: int, optimizer: str) -> None:
    config = replace(CONFIG, optimizer=optimizer)
    whole, broken, resumed = Line(), Line(dies=dies), Line()
    expected = fit_task(whole, Points(), config, progress=False)
    with pytest.raises(KeyboardInterrupt):
        fit_task(broken, Points(), config, output=tmp_path, progress=False)
    result = fit_task(resumed, Points(), config, output=tmp_path, resume=True, progress=False)
    assert resumed.clamped == 15 - (dies - 1) // 3 * 3, "checkpoints are written every 3 steps, also within an epoch"
    assert result == expected
    assert torch.equal(weights(resumed), weights(whole))
    again = Line()
    assert fit_task(again, Points(), config, output=tmp_path, resume=True, progress=False) == expected, (
        "nothing left to do"
    )
    assert again.clamped == 0
    assert torch.equal(weights(again), weights(whole))


def test_seed_decides_everything() -> None:
    results = [fit_task(Line(), Points(), replace(CONFIG, seed=seed), progress=False) for seed in (1, 1, 2)]
    assert results[0] == results[1] != results[2]


def test_stops_early_with_the_best_parameters(tmp_path: Path) -> None:
    class Worse(Line):
        def validate(self, batches: Any) -> dict[str, float]:
            self.scores = [*getattr(self, "scores", []), weights(self)]
            return {"loss": abs(len(self.scores) - 2.0)}

    task = Worse()
    config = replace(CONFIG, patience=2)
    result = fit_task(task, Points(), config, output=tmp_path, progress=False)
    assert result.stopped_early
    assert result.steps == 12
    assert result.best["step"] == 6
    assert torch.equal(weights(task), task.scores[1])
    again = Worse()
    assert fit_task(again, Points(), config, output=tmp_path, resume=True, progress=False) == result
    assert torch.equal(weights(again), task.scores[1]), "the best parameters are in the checkpoint"


def test_nan_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(NumericalError, match=r"loss: expected a finite number, got nan in step 8; .*fit.safetensors"):
        fit_task(Line(nan=8), Points(), CONFIG, output=tmp_path, progress=False)
    assert len(load_state(tmp_path / "fit.safetensors", "fit")["history"]) == 6
    with pytest.raises(NumericalError, match="step 1; no checkpoint was asked for"):
        fit_task(Line(nan=1), Points(), CONFIG, progress=False)


def test_two_fits_do_not_share_a_folder(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(StorageError, match="another process"):
        fit_task(Line(), Points(), CONFIG, output=tmp_path, progress=False)
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"^output: expected a folder that can be written, got .*file"):
        fit_task(Line(), Points(), CONFIG, output=tmp_path / "file", progress=False)


def test_resume_refuses_another_fit_and_starts_afresh_on_an_empty_folder(tmp_path: Path) -> None:
    first = fit_task(
        Line(), Points(), CONFIG, output=tmp_path / "new", resume=True, progress=False, settings={"tau": (1,)}
    )
    assert first == fit_task(Line(), Points(), CONFIG, progress=False)
    options: dict[str, Any] = {"output": tmp_path / "new", "resume": True, "progress": False}
    assert fit_task(Line(), Points(), CONFIG, **options, settings={"tau": (1,)}) == first
    with pytest.raises(CheckpointError, match=r"another \['lr', 'tau'\]"):
        fit_task(Line(), Points(), replace(CONFIG, lr=0.1), **options)
    with pytest.raises(CheckpointError, match=r"another \['first_image'\]"):  # as many, but others
        fit_task(Line(), Points(seed=5), CONFIG, **options, settings={"tau": (1,)})
    with pytest.raises(ValueError, match="resume: expected an output folder"):
        fit_task(Line(), Points(), CONFIG, resume=True)
    with pytest.raises(ValueError, match=r"data: expected at least validation \+ batch_size = 8 \+ 8 images, got 12"):
        fit_task(Line(), Points(12), CONFIG)


def test_parameter_groups_and_schedules() -> None:
    class Frozen(Line):
        def parameters(self) -> list[dict[str, Any]]:
            return [{"params": [self.module.weight]}, {"params": [self.module.bias], "lr": 0.0}]

    task = Frozen()
    fit_task(task, Points(), CONFIG, progress=False)
    assert task.module.bias.abs().max() == 0
    assert task.module.weight.abs().max() > 0
    linear = replace(CONFIG, schedule="linear", warmup=0.2)
    assert [linear.lr_factor(step, 10) for step in (0, 1, 2, 6)] == pytest.approx([1 / 3, 2 / 3, 1, 0.5])
    assert replace(CONFIG, schedule="cosine").lr_factor(5, 10) == pytest.approx(0.5)
    assert replace(CONFIG, schedule="constant").lr_factor(9, 10) == 1


def test_plain_sgd_is_plain_sgd() -> None:
    task, data = Line(), Points()
    config = replace(CONFIG, optimizer="sgd", momentum=0.0, schedule="constant", clip_norm=None, validation=0, steps=1)
    fit_task(task, data, config, progress=False)
    images, labels = data.inputs[data.drawn[0]], data.labels[data.drawn[0]]
    reference = Line()
    noise = torch.Generator().manual_seed(1)
    for size in (48, 48):  # which images are held out, and the order of the epoch
        torch.randperm(size, generator=noise)
    reference.loss(images, labels, noise)[0].backward()
    gradient = reference.module.weight.grad
    torch.testing.assert_close(task.module.weight, -config.lr * gradient)


@pytest.mark.parametrize("name", ["epochs", "steps", "batch_size", "lr", "clip_norm", "patience", "checkpoint_every"])
def test_bad_settings_are_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected"):
        replace(CONFIG, **{name: 0})


def test_frozen_puts_everything_back() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).train()
    module[0].bias.requires_grad_(False)
    module[1].eval()
    with frozen(module):
        assert not any(parameter.requires_grad for parameter in module.parameters())
        assert not module.training
    assert [parameter.requires_grad for parameter in module.parameters()] == [True, False, True, True]
    assert (module.training, module[0].training, module[1].training) == (True, True, False)


class Counted:
    """Images with labels that count how often each is read."""

    def __init__(self, images: Tensor) -> None:
        self.images, self.reads = images, [0] * len(images)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.reads[index] += 1
        return self.images[index], index % 3


def test_prepared_tokens_are_those_of_the_backbone() -> None:
    backbone = toy("deit_tiny_patch16_224")
    images = random_images(backbone, 5)
    data = PreparedTokens(backbone, Counted(images), half=3, dense=True)
    inputs, labels = data.batch([4, 1])
    for half, tokens in zip((3, 2 * backbone.depth), inputs.unbind(1), strict=True):
        expected = backbone.run(backbone.embed(images), half)[0].x.view(5, -1, backbone.embed_dim)
        torch.testing.assert_close(tokens, expected[[4, 1]], atol=1e-5, rtol=0)
    assert labels.tolist() == [1, 1]
    state = data.state(inputs)
    last = data.dense(inputs, state)
    assert (state.half, last.half, len(data)) == (3, 8, 5)
    torch.testing.assert_close(classify_masked(backbone, last), backbone(images[[4, 1]]), atol=1e-5, rtol=0)
    image_inputs = ImageInputs(backbone, Counted(images), half=3)
    state = image_inputs.state(images[[4, 1]])
    torch.testing.assert_close(image_inputs.dense(images[[4, 1]], state).x, last.x, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="dataset: expected at least one image"):
        PreparedTokens(backbone, [], half=3)


def test_prepared_tokens_are_computed_once_while_there_is_room() -> None:
    backbone = toy("deit_tiny_patch16_224")
    dataset = Counted(random_images(backbone, 6))
    gibibytes = 17 * backbone.embed_dim * 4 / 2**30  # of one image
    data = PreparedTokens(backbone, dataset, half=3, memory=4.5 * gibibytes)
    first, _ = data.batch([5, 0, 2, 0])
    assert dataset.reads == [1, 0, 1, 0, 0, 1]
    again, _ = data.batch([0, 2, 5])
    assert dataset.reads == [1, 0, 1, 0, 0, 2], "four images fit, and number 5 is read again"
    torch.testing.assert_close(again, first[[1, 2, 0]], atol=1e-5, rtol=0)
    alone, _ = PreparedTokens(backbone, dataset, half=3).batch([2])
    assert torch.equal(alone[0], first[2]), "the same bits whatever was drawn before"


def test_a_part_of_the_images_is_spread_over_the_data_set() -> None:
    backbone = toy("deit_tiny_patch16_224")
    dataset = Counted(random_images(backbone, 9))
    PreparedTokens(backbone, dataset, half=0, images=3).batch([0, 1, 2])
    assert dataset.reads == [1, 0, 0, 1, 0, 0, 1, 0, 0]
