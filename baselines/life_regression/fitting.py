"""Training of life regression (Chen et al.): the predictor for a fixed network, then, if wanted, the network for it.

`fit_life_regression` is the first stage of Algorithm 1, `finetune_life_regression` the second. `train_life_regression`
does both, or the paper's ablation (Table IV), in which predictor and network learn at the same time.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...data import ImageDataset
from ...engine.backbone import Backbone
from ...engine.masked import MaskedState, classify_masked, run_masked, start_masked
from ...engine.walk import Masked, Walk
from ...files import PathLike
from ...game.token_game import TokenGame
from ...models.load import weights_digest
from ...types import Site, parse_sites, quarter_sites
from ..argument_checks import check_fields
from ..fitting.inputs import ImageInputs, device_of
from ..fitting.keep_rate import KeepRateConfig, KeepRateRecipe, KeepRateTask
from ..fitting.loop import FitConfig, fit_task
from ..fitting.recipe import FitOptions, Problem, Sites, fit_policy
from ..fitting.task import Row, frozen
from .policy import LifeRegression


@dataclass(frozen=True)
class LifeConfig(KeepRateConfig):
    """Settings of both stages: training the predictor, and fine-tuning the network for it."""

    fit: FitConfig = field(
        default_factory=lambda: FitConfig(steps=240, batch_size=32, lr=1e-2, validation=256, validate_every=40)
    )
    """First stage, the predictor. The paper prints a learning rate of 1e-5, most likely swapped with the network's
    1e-3."""
    finetune: FitConfig = field(
        default_factory=lambda: FitConfig(steps=240, batch_size=32, lr=1e-4, validation=256, validate_every=40)
    )
    """Second stage, the network (`finetune_life_regression`)."""
    sharpness: float = 8.0
    """U, how steeply a token's weight falls at the end of its life, per block. The paper has 1.5, and compares 0.5, 1,
    1.5, 2 and 3 in Table V. On the built-in task, whose sites lie closer together, 8 was best on validation images
    (25 % of the MACs, 150 steps, U of 1, 1.5, 4, 8 and 16: 92.2, 93.9, 95.2, 96.0 and 94.9 %)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, ("sharpness",), lambda value: value > 0, "above 0")

    def quick(self) -> Self:
        """The same settings with very few steps and images, for tests of the whole fit."""
        return replace(super().quick(), finetune=self.finetune.quick())


def forward_soft_lives(backbone: Backbone, state: MaskedState, lives: Tensor, sharpness: float) -> Tensor:
    """Logits `[B, classes]` of the training form (Eqs. 6 and 7).

    As a key in block t a token has the weight `1 / (1 + exp(U (t - tau)))`, which falls with t; as printed it would
    rise. The class token always has weight 1 (with a life of T it would have 0.5 in the last block).

    Args:
        backbone: the network.
        state: tokens at the site where the lives were predicted.
        lives: tau `[B, N]`, in blocks.
        sharpness: U, per block.
    """
    blocks = range(state.half // 2 + 1, backbone.depth + 1)

    def weighted(tokens: MaskedState, block: int) -> MaskedState:
        return tokens.with_weights((sharpness * (lives - block)).sigmoid())

    walk = Walk(Masked(backbone), [Site(2 * block) for block in blocks[:-1]])
    start = weighted(state, blocks[0]) if blocks else state
    last = walk.through(start, lambda arrival: weighted(arrival.state, arrival.site.block + 1))
    return classify_masked(backbone, last, last.weights)


class _PredictorTask(KeepRateTask[LifeRegression]):
    """Cross-entropy of the training form; the predictor is trained."""

    def loss(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Row]:
        """Loss of a batch."""
        return self.cross_entropy(self.data.state(images), labels)

    def cross_entropy(self, state: MaskedState, labels: Tensor) -> tuple[Tensor, Row]:
        """Loss from the tokens at the first site."""
        backbone, sites = self.game.backbone, self.game.sites
        cls = state.prefix[:, 0] if backbone.has_class_token else state.tokens.mean(dim=1)
        lives = self.policy.lives(self.policy.importance(state.tokens, cls), sites, backbone.depth)
        logits = forward_soft_lives(backbone, state, lives, self.config.sharpness)
        accuracy = (logits.argmax(dim=1) == labels).float().mean()
        return F.cross_entropy(logits, labels), {"accuracy": float(accuracy)}


class _BackboneTask(_PredictorTask):
    """The same loss; the network is trained."""

    def __init__(self, policy: LifeRegression, backbone: Backbone, dataset: ImageDataset, config: LifeConfig) -> None:
        super().__init__(policy, TokenGame.for_policy(backbone, policy), ImageInputs(backbone, dataset, 0), config)
        self.module = backbone.model

    @property
    def settings(self) -> Mapping[str, Any]:
        """Those of the first stage, and a number that differs between predictors."""
        return {**super().settings, "weight": float(self.policy.state_dict()["weight"].sum())}

    def loss(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Row]:
        """Loss of a batch of images, with gradients from the first block on."""
        backbone = self.game.backbone
        state, _ = run_masked(backbone, start_masked(backbone, images), self.game.sites[0].half)
        return self.cross_entropy(state, labels)


class _BothTask(_BackboneTask):
    """The same loss; predictor and network are trained at the same time, each at its own learning rate."""

    def __init__(self, policy: LifeRegression, backbone: Backbone, dataset: ImageDataset, config: LifeConfig) -> None:
        super().__init__(policy, backbone, dataset, config)
        self.module = nn.ModuleDict({"policy": policy, "backbone": backbone.model})

    def parameters(self) -> list[dict[str, Any]]:
        """Two groups, with the learning rates of the two stages."""
        return [
            {"params": list(self.policy.parameters()), "lr": self.config.fit.lr},
            {"params": list(self.game.backbone.model.parameters()), "lr": self.config.finetune.lr},
        ]


def _untrained(problem: Problem) -> LifeRegression:
    return LifeRegression(1.0, problem.seed, problem.backbone.embed_dim, problem.sites)


LIFE_RECIPE = KeepRateRecipe(
    config=LifeConfig(),
    sites=lambda backbone: backbone.default_sites,
    published=lambda backbone: quarter_sites(backbone.depth, later=1),
    untrained=_untrained,
    make_task=_PredictorTask,
)


def fit_life_regression(
    backbone: Backbone,
    dataset: ImageDataset,
    target_gmacs: float,
    *,
    config: LifeConfig | None = None,
    **options: Unpack[FitOptions],
) -> LifeRegression:
    """First stage: train the predictor for a budget; see `baselines.fit` for the arguments.

    Returns:
        The policy at the keep rate of the budget; `policy.at(rate)` has the same predictor at another one.
    """
    return fit_policy(LIFE_RECIPE, backbone, dataset, target_gmacs, config=config, **options)


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
    """Second stage: fine-tune a copy of the network for a fitted predictor, which stays as it is.

    Args:
        backbone: the network; it is not changed.
        policy: the result of `fit_life_regression`.
        dataset: labelled training images.
        seed: of the batches.
        output: folder for checkpoints, not that of the first stage; None: nothing is written.
        resume: whether to continue from the checkpoint in `output`.
        progress: whether to show a progress bar.
        config: settings; None: the defaults. `seed` replaces the seed in them.

    Returns:
        The fine-tuned copy.

    Raises:
        CheckpointError: for a checkpoint of another fit.
    """
    config = LifeConfig() if config is None else config
    tuned = _learning_copy(backbone)
    with frozen(policy):
        task = _BackboneTask(policy, tuned, dataset, config)
        _run(task, replace(config.finetune, seed=seed), backbone, output=output, resume=resume, progress=progress)
    return tuned


def train_life_regression(
    backbone: Backbone,
    dataset: ImageDataset,
    target_gmacs: float,
    scheme: Literal["two_stages", "single_stage"] = "two_stages",
    *,
    config: LifeConfig | None = None,
    sites: Sites | None = None,
    seed: int = 0,
    output: PathLike | None = None,
    resume: bool = False,
    progress: bool = False,
) -> tuple[LifeRegression, Backbone]:
    """Train predictor and network for a budget (Algorithm 1, or the single stage of Table IV).

    Args:
        backbone: the network; it is not changed.
        dataset: labelled training images.
        target_gmacs: mean GMACs per image, policy included.
        scheme: `"two_stages"`: the predictor, then the network; `"single_stage"`: both at the same time, by the loop of
            `config.finetune` for as many steps as the two stages have together, each at its own learning rate.
        config: settings; None: the defaults. `seed` replaces the seed in them.
        sites: where to prune; None: the network's own sites.
        seed: of the initial predictor and the batches.
        output: folder for checkpoints, with one folder for each stage; None: nothing is written.
        resume: whether to continue from the checkpoints in `output`.
        progress: whether to show a progress bar.

    Returns:
        The policy at the keep rate of the budget, and the trained copy of the network.

    Raises:
        BudgetError: for a budget that no keep rate meets.
        CheckpointError: for a checkpoint of another training.
        ValueError: for another scheme, or a single stage where one loop is given in steps and the other in epochs.
    """
    if scheme not in ("two_stages", "single_stage"):
        raise ValueError(f"scheme: expected 'two_stages' or 'single_stage', got {scheme!r}")
    config = LifeConfig() if config is None else config
    folder = None if output is None else Path(output)
    options: FitOptions = {"seed": seed, "resume": resume, "progress": progress}

    def stage(name: str) -> Path | None:
        return None if folder is None else folder / name

    if scheme == "two_stages":
        policy = fit_life_regression(
            backbone, dataset, target_gmacs, config=config, sites=sites, output=stage("predictor"), **options
        )
        tuned = finetune_life_regression(backbone, policy, dataset, config=config, output=stage("network"), **options)
        return policy, tuned
    loop = replace(_as_long_as_both(config), seed=seed)
    where = parse_sites(LIFE_RECIPE.default_sites(backbone) if sites is None else sites, backbone.depth)
    policy = LIFE_RECIPE.at_budget(Problem(backbone, dataset, target_gmacs, where, sites, seed, config))
    tuned = _learning_copy(backbone)
    task = _BothTask(policy, tuned, dataset, config)
    _run(task, loop, backbone, output=stage("both"), resume=resume, progress=progress)
    return task.fitted(), tuned


def _as_long_as_both(config: LifeConfig) -> FitConfig:
    """The loop of the second stage with the steps, or epochs, of both."""
    first, second = config.fit, config.finetune
    if first.steps is None and second.steps is None:
        return replace(second, epochs=first.epochs + second.epochs)
    if first.steps is None or second.steps is None:
        raise ValueError(
            f"config: expected steps, or epochs, in both loops, got steps={first.steps} and steps={second.steps}"
        )
    return replace(second, steps=first.steps + second.steps)


def _learning_copy(backbone: Backbone) -> Backbone:
    return deepcopy(backbone).eval().requires_grad_(True)


def _run(task: _BackboneTask, loop: FitConfig, original: Backbone, **options: Any) -> None:
    """Train the task's network; afterwards the same parameters require gradients as in the original."""
    settings = {**task.settings, "network": weights_digest(original)}
    fit_task(task, task.data, loop, device=device_of(original), settings=settings, **options)
    for copied, parameter in zip(task.game.backbone.parameters(), original.parameters(), strict=True):
        copied.requires_grad_(parameter.requires_grad)
