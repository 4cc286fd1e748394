"""Two-stage training of life regression: the predictor for a fixed network, then, if wanted, the network for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from ...data import ImageDataset
from ...engine.backbone import Backbone
from ...engine.masked import MaskedState, classify_masked, run_masked, start_masked
from ...files import PathLike
from ...game.token_game import TokenGame
from ...types import Site, parse_sites
from ..fitting.inputs import ImageInputs, Inputs, at_budget, deployed, device_of, inputs_of
from ..fitting.loop import FitConfig, fit
from ..fitting.task import ModuleTask, Row, frozen
from .policy import LifeRegression


@dataclass(frozen=True)
class LifeConfig:
    """How to train the predictor, and the network after it."""

    fit: FitConfig = field(
        default_factory=lambda: FitConfig(steps=240, batch_size=32, lr=1e-2, validation=256, validate_every=40)
    )
    """First stage: the predictor. The paper prints a rate of 1e-5, most likely swapped with the backbone's 1e-3."""
    finetune: FitConfig = field(
        default_factory=lambda: FitConfig(steps=240, batch_size=32, lr=1e-4, validation=256, validate_every=40)
    )
    """Second stage: the network (`finetune_life_regression`)."""
    images: int = 4096
    """Training images, prepared up to the first site and kept in memory; 0: all, prepared whenever they are drawn."""
    sharpness: float = 8.0
    """U, how steeply a token's weight falls at the end of its life, per block. The paper has 1.5; on the built-in task,
    whose sites lie closer together, 8 was best on validation images (25 % of the MACs, 150 steps, U of 1, 1.5, 4, 8 and
    16: 92.2, 93.9, 95.2, 96.0 and 94.9 %)."""

    def __post_init__(self) -> None:
        if self.sharpness <= 0:
            raise ValueError(f"sharpness: expected above 0, got {self.sharpness!r}")
        if self.images < 0:
            raise ValueError(f"images: expected at least 0, got {self.images!r}")

    def quick(self) -> Self:
        """Hardly any training, to see that everything works."""
        images = min(self.images, 64) if self.images else 0
        return replace(self, fit=self.fit.quick(), finetune=self.finetune.quick(), images=images)


def fit_life_regression(
    backbone: Backbone,
    dataset: ImageDataset,
    target_gmacs: float,
    *,
    sites: Sequence[int | str | Site] | None = None,
    seed: int = 0,
    output: PathLike | None = None,
    resume: bool = False,
    progress: bool = False,
    config: LifeConfig | None = None,
) -> LifeRegression:
    """First stage: train the predictor for a budget; the backbone stays as it is.

    Args:
        backbone: the network.
        dataset: labelled training images.
        target_gmacs: mean GMACs per image, predictor included; it decides the keep rate.
        sites: where to prune, the first one predicts; None: one block after each quarter of the network.
        seed: of predictor and batches.
        output: folder for checkpoints; None: none are written.
        resume: whether to go on from the checkpoint in `output`.
        progress: whether to show a progress bar.
        config: how to train; None: the defaults. Its seed gives way to `seed`.

    Returns:
        The policy at the keep rate of the budget; `policy.at(rate)` has the same predictor at another one.

    Raises:
        BudgetError: for a budget that no keep rate meets.
        CheckpointError: for a checkpoint of another fit.
    """
    config = LifeConfig() if config is None else config
    wanted = LifeRegression(1.0).default_sites(backbone.depth) if sites is None else sites
    parsed = parse_sites(wanted or backbone.default_sites, backbone.depth)
    start = LifeRegression(1.0, seed, backbone.embed_dim, parsed).to(device_of(backbone))
    policy = at_budget(start.at, target_gmacs, backbone, dataset, parsed)
    with frozen(backbone):
        inputs = inputs_of(backbone, dataset, parsed[0].half, config.images)
        task = _PredictorTask(policy, backbone, inputs, config.sharpness)
        options: dict[str, Any] = {"output": output, "resume": resume, "progress": progress}
        settings = _settings(policy, backbone, config)
        fit(task, inputs, replace(config.fit, seed=seed), device=device_of(backbone), settings=settings, **options)
    return policy.eval()


def finetune_life_regression(
    backbone: Backbone,
    policy: LifeRegression,
    dataset: ImageDataset,
    *,
    seed: int = 0,
    output: PathLike | None = None,
    resume: bool = False,
    progress: bool = False,
    config: LifeConfig | None = None,
) -> Backbone:
    """Second stage: train a copy of the network for a fitted predictor, which stays as it is.

    Args:
        backbone: the network; itself left alone.
        policy: what `fit_life_regression` returned.
        dataset: labelled training images.
        seed: of the batches.
        output: folder for checkpoints, another one than the first stage's; None: none are written.
        resume: whether to go on from the checkpoint in `output`.
        progress: whether to show a progress bar.
        config: how to train; None: the defaults. Its seed gives way to `seed`.

    Returns:
        The trained copy.

    Raises:
        CheckpointError: for a checkpoint of another fit.
    """
    config = LifeConfig() if config is None else config
    tuned = deepcopy(backbone).eval().requires_grad_(True)
    with frozen(policy):
        task = _BackboneTask(policy, tuned, ImageInputs(tuned, dataset, 0), config.sharpness)
        options: dict[str, Any] = {"output": output, "resume": resume, "progress": progress}
        settings = {**_settings(policy, backbone, config), "weight": float(policy.state_dict()["weight"].sum())}
        rate = replace(config.finetune, seed=seed)
        fit(task, task.inputs, rate, device=device_of(backbone), settings=settings, **options)
    for mine, theirs in zip(tuned.parameters(), backbone.parameters(), strict=True):
        mine.requires_grad_(theirs.requires_grad)
    return tuned


def forward_soft_lives(backbone: Backbone, state: MaskedState, lives: Tensor, sharpness: float) -> Tensor:
    """Logits `[B, classes]` of the training form (Eqs. 6 and 7).

    In block t a token is seen with weight `1 / (1 + exp(U (t - tau)))`, which falls with t; as printed it would rise.
    The class token always has weight 1 (a life of T would give it 0.5 in the last block).

    Args:
        backbone: the network.
        state: tokens where the lives were predicted.
        lives: tau `[B, N]`, in blocks.
        sharpness: U, per block.
    """
    weights = None
    for block in range(state.half // 2 + 1, backbone.depth + 1):
        weights = (sharpness * (lives - block)).sigmoid()
        state, _ = run_masked(backbone, state, 2 * block, weights)
    return classify_masked(backbone, state, weights)


class _PredictorTask(ModuleTask):
    """Cross-entropy of the training form; the predictor learns."""

    def __init__(self, policy: LifeRegression, backbone: Backbone, inputs: Inputs, sharpness: float) -> None:
        super().__init__(policy)
        self.policy, self.inputs = policy, inputs
        self.game = TokenGame.for_policy(backbone, policy)
        self.sharpness = sharpness

    def loss(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Row]:
        """Loss of a batch."""
        return self.cross_entropy(self.inputs.state(images), labels)

    def cross_entropy(self, state: MaskedState, labels: Tensor) -> tuple[Tensor, Row]:
        """From the tokens at the first site."""
        backbone, sites = self.game.backbone, self.game.sites
        cls = state.prefix[:, 0] if backbone.has_class_token else state.tokens.mean(dim=1)
        lives = self.policy.lives(self.policy.importance(state.tokens, cls), sites, backbone.depth)
        logits = forward_soft_lives(backbone, state, lives, self.sharpness)
        accuracy = (logits.argmax(dim=1) == labels).float().mean()
        return F.cross_entropy(logits, labels), {"accuracy": float(accuracy)}

    def validate(self, batches: Sequence[tuple[Tensor, Tensor]]) -> Row:
        """As deployed."""
        return deployed(self.game, self.policy, self.inputs, batches)


class _BackboneTask(_PredictorTask):
    """The same loss; the network learns."""

    def __init__(self, policy: LifeRegression, backbone: Backbone, inputs: Inputs, sharpness: float) -> None:
        super().__init__(policy, backbone, inputs, sharpness)
        self.module = backbone.model

    def loss(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Row]:
        """Loss of a batch of images, with gradients from the first block on."""
        backbone = self.game.backbone
        state, _ = run_masked(backbone, start_masked(backbone, images), self.game.sites[0].half)
        return self.cross_entropy(state, labels)

    def state_dict(self) -> Mapping[str, Any]:
        """The network's."""
        return self.module.state_dict()


def _settings(policy: LifeRegression, backbone: Backbone, config: LifeConfig) -> dict[str, Any]:
    """What a checkpoint must agree in."""
    return {**asdict(config), "fit": None, "finetune": None, **policy.config(), "backbone": backbone.name}
