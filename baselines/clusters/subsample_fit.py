"""Training of the mergers with weights (Long et al., 2023, Table 4) for a network that stays as it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from ...data import ImageDataset
from ...engine.backbone import Backbone
from ...engine.tokens import start_state
from ...files import PathLike
from ...game.rollout import play
from ...game.token_game import TokenGame
from ...types import Site, parse_sites
from ..fitting.inputs import Inputs, at_budget, deployed, device_of, inputs_of
from ..fitting.loop import FitConfig, fit
from ..fitting.task import ModuleTask, Row, frozen
from ..topk import attention_sites
from .subsample import SubSampleMerge


@dataclass(frozen=True)
class MergerConfig:
    """How to train a merger with weights."""

    fit: FitConfig = field(
        default_factory=lambda: FitConfig(steps=300, batch_size=32, lr=2e-3, validation=512, validate_every=50)
    )
    """The training itself."""
    images: int = 4096
    """Training images, prepared up to the first site and kept in memory; 0: all, prepared whenever they are drawn."""
    logit_weight: float = 1.0
    """Of the divergence from the dense network's class probabilities; the cross-entropy has 1."""

    def __post_init__(self) -> None:
        for name in ("images", "logit_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)!r}")

    def quick(self) -> Self:
        """Hardly any training, to see that everything works."""
        return replace(self, fit=self.fit.quick(), images=min(self.images, 64) if self.images else 0)


def fit_merger(
    backbone: Backbone,
    dataset: ImageDataset,
    target_gmacs: float,
    *,
    kind: Literal["convolution", "mlp"] = "convolution",
    sites: Sequence[int | str | Site] | None = None,
    seed: int = 0,
    output: PathLike | None = None,
    resume: bool = False,
    progress: bool = False,
    config: MergerConfig | None = None,
) -> SubSampleMerge:
    """Train a merger for a budget; the backbone stays as it is (the paper trains all from scratch).

    The pruned network itself is trained, tokens really merged: which tokens are attentive, and which run a token is
    in, are decided before the layers, and need no gradient.

    Args:
        backbone: the network, also the teacher of its pruned self.
        dataset: labelled training images.
        target_gmacs: mean GMACs per image, the merger included; it decides the keep rate.
        kind: which merger.
        sites: where to merge; None: where the method is at home.
        seed: of weights and batches.
        output: folder for checkpoints; None: none are written.
        resume: whether to go on from the checkpoint in `output`.
        progress: whether to show a progress bar.
        config: how to train; None: the defaults. Its seed gives way to `seed`.

    Returns:
        The policy at the keep rate of the budget; `policy.at(rate)` has the same layers at another one.

    Raises:
        BudgetError: for a budget that no keep rate meets.
        CheckpointError: for a checkpoint of another fit.
    """
    config = MergerConfig() if config is None else config
    parsed = parse_sites(attention_sites(backbone.depth) if sites is None else sites, backbone.depth)
    start = SubSampleMerge(1.0, backbone.embed_dim, len(parsed), kind, seed=seed).to(device_of(backbone))
    policy = at_budget(start.at, target_gmacs, backbone, dataset, parsed)
    with frozen(backbone):
        inputs = inputs_of(backbone, dataset, 2 * (parsed[0].block - 1), config.images)
        task = MergerTask(policy, TokenGame.for_policy(backbone, policy, sites=parsed, grad=True), inputs, config)
        settings = {**asdict(config), "fit": None, **policy.config(), "backbone": backbone.name}
        options: dict[str, Any] = {"output": output, "resume": resume, "progress": progress, "settings": settings}
        fit(task, inputs, replace(config.fit, seed=seed), device=device_of(backbone), **options)
    return policy.eval()


class MergerTask(ModuleTask):
    """Class and distillation loss of the pruned network."""

    def __init__(self, policy: SubSampleMerge, game: TokenGame, inputs: Inputs, config: MergerConfig) -> None:
        super().__init__(policy)
        self.policy, self.game, self.inputs, self.config = policy, game, inputs, config

    def loss(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Row]:
        """Loss of a batch; nothing in it is random."""
        backbone, soft = self.game.backbone, self.inputs.state(images)
        state = start_state(soft.x, soft.num_prefix, soft.half)
        with torch.no_grad():
            teacher = backbone.classify(backbone.run(state, 2 * backbone.depth)[0]).log_softmax(1)
        logits = play(self.game, self.policy, state).outcome.logits
        of_class = F.cross_entropy(logits, labels)
        of_logits = F.kl_div(logits.log_softmax(1), teacher, reduction="batchmean", log_target=True)
        parts = {"class": float(of_class.detach()), "logits": float(of_logits.detach())}
        return of_class + self.config.logit_weight * of_logits, parts

    def validate(self, batches: Sequence[tuple[Tensor, Tensor]]) -> Row:
        """As deployed."""
        return deployed(self.game, self.policy, self.inputs, batches)
