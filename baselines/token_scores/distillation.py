"""Distilled attention: tokens are scored by how much attention the dense network will pay to them later on.

No labels, no reward, and no gradient through the network: one dense pass per training image gives the targets, and
fitting a small network to them takes seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from ...data import ImageDataset
from ...engine.backbone import Backbone
from ...types import Site
from ..fitting.inputs import MEMORY, PreparedTokens, device_of
from ..fitting.loop import FitConfig
from ..fitting.recipe import FitOptions, Problem, fit_policy
from ..fitting.task import ModuleTask, Row
from .fitting import ScoreConfig, ScoreRecipe, ScoreTask
from .policy import TokenScores


@dataclass(frozen=True)
class DistillationConfig(ScoreConfig):
    """Settings of the fit."""

    fit: FitConfig = field(
        default_factory=lambda: FitConfig(steps=600, batch_size=32, lr=3e-3, validation=256, validate_every=100)
    )
    """The training loop."""
    images: int = 1024
    """Training images, spread evenly over the data set; each is run through the network once, when first drawn, and its
    tokens at all sites are kept while memory lasts. 0: all, each run whenever it is drawn."""


class AttendedTokens(PreparedTokens):
    """Tokens of the dense network at every site, and the attention that they receive later, `[B, T, N, D + 1]`.

    Entry D of the last dimension is the target, the same at all sites: the logarithm of the class token's attention to
    the patch, mean over the heads and blocks of the second half of the network, relative to the mean over all patches.
    Where the class is read from the patches, it is the attention of all queries (mean) instead.

    Args:
        backbone: the network.
        dataset: images; labels are not used.
        sites: where tokens are wanted.
        images: so many images, spread evenly over the data set; 0: all, none of them kept.
    """

    def __init__(self, backbone: Backbone, dataset: ImageDataset, sites: Sequence[Site], images: int) -> None:
        super().__init__(backbone, dataset, sites[0].half, images or None, device_of(backbone))
        values = len(sites) * backbone.num_patches * (backbone.embed_dim + 1)
        self.room = int(MEMORY * 2**30 // (4 * values)) if images else 0
        self.sites = sites

    def _run(self, images: Tensor) -> Tensor:
        backbone = self.backbone
        asked = "cls_attention" if backbone.has_class_token and not backbone.reads_patches else "mean_attention"
        late = [2 * block - 1 for block in range(backbone.depth // 2 + 1, backbone.depth + 1)]
        state, found, received = backbone.embed(images.to(self.device)), {}, []
        shape = (len(images), backbone.num_patches, -1)
        for stop in sorted({*late, *(site.half for site in self.sites)}):
            state, evidence = backbone.run(state, stop, {asked} if stop in late else ())
            received += [value.float() for value in evidence.values()]
            found[stop] = state.tokens.view(shape).float()
        share = torch.stack(received).mean(dim=0).view(shape)
        target = (share / share.mean(dim=1, keepdim=True)).clamp(min=1e-6).log()
        return torch.stack([torch.cat([found[site.half], target], dim=2) for site in self.sites], dim=1).cpu()


class DistillationTask(ScoreTask):
    """Squared distance between the scores and the logarithm of the attention that the tokens will receive."""

    def loss(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Row]:
        """Mean over images, sites and tokens of `AttendedTokens`; it uses neither labels nor random numbers."""
        tokens, target = images[..., :-1], images[..., -1]
        return F.mse_loss(self.policy.scorer(tokens)(tokens), target), {}

    @torch.no_grad()
    def validate(self, batches: Sequence[tuple[Tensor, Tensor]]) -> Row:
        """The same on held-out images."""
        return ModuleTask.validate(self, batches)


def _task(problem: Problem, policy: TokenScores) -> DistillationTask:
    data = AttendedTokens(problem.backbone, problem.dataset, problem.sites, problem.config.images)
    return DistillationTask(problem, policy, data)


DISTILLATION_RECIPE = ScoreRecipe(DistillationConfig(), _task)


def fit_distilled_attention(
    backbone: Backbone,
    dataset: ImageDataset,
    target_gmacs: float,
    *,
    config: DistillationConfig | None = None,
    **options: Unpack[FitOptions],
) -> TokenScores:
    """Train scores on the network's own late attention; see `baselines.fit` for the arguments.

    Returns:
        The policy at the threshold of the budget; `policy.at(threshold)` has the same scores at another one.
    """
    return fit_policy(DISTILLATION_RECIPE, backbone, dataset, target_gmacs, config=config, **options)
