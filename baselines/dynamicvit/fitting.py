"""Fit of DynamicViT's predictors on a network that stays as it is (Rao et al., 2021, section 3.3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from ...data import ImageDataset
from ...engine.backbone import Backbone
from ...engine.masked import MaskedState, classify_masked
from ...engine.walk import Arrival, Masked, Walk
from ...types import Site
from ..argument_checks import check_fields
from ..fitting.keep_rate import KeepRateConfig, KeepRateRecipe, KeepRateTask
from ..fitting.loop import FitConfig
from ..fitting.recipe import FitOptions, Problem, fit_policy
from ..fitting.task import Row
from .policy import DynamicViT

Choose = Callable[[int, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class DynamicViTConfig(KeepRateConfig):
    """Settings of the fit; the weights of the losses are those published for DeiT-S."""

    fit: FitConfig = field(
        default_factory=lambda: FitConfig(
            steps=240, batch_size=32, lr=3e-3, validation=256, validate_every=40, weight_decay=0.05
        )
    )
    """The training loop."""
    ratio_weight: float = 2.0
    """Weight of the squared distance between kept and wanted fractions, mean over sites."""
    logit_weight: float = 0.5
    """Weight of the divergence from the dense network's class probabilities."""
    token_weight: float = 0.5
    """Weight of the squared distance between the surviving tokens and the dense network's."""
    temperature: float = 1.0
    """Temperature of the Gumbel softmax."""

    def __post_init__(self) -> None:
        super().__post_init__()
        names = ("ratio_weight", "logit_weight", "token_weight")
        check_fields(self, names, lambda value: value >= 0, "at least 0")
        check_fields(self, ("temperature",), lambda value: value > 0, "above 0")


class DynamicViTTask(KeepRateTask[DynamicViT]):
    """Weighted sum of class, ratio and distillation losses of the training form; the dense network is the teacher."""

    def loss(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Row]:
        """Loss of a batch, with decisions sampled from the predictors."""
        backbone, state = self.game.backbone, self.data.state(images)
        with torch.no_grad():
            dense = self.data.dense(images, state)
            teacher = classify_masked(backbone, dense)

        def choose(step: int, tokens: Tensor, alive: Tensor) -> Tensor:
            predictor = self.policy.predictor(step, self.game.num_steps, tokens)
            scores = predictor(tokens, lambda values: living_mean(values, alive))
            return sample_keep(scores, self.config.temperature, generator)

        logits, kept, last = forward_train(backbone, state, self.game.sites, choose)
        losses = self.losses(logits, kept, last, labels, teacher, dense.tokens)
        weights = {"class": 1.0, "ratio": self.config.ratio_weight, "logits": self.config.logit_weight,
                   "tokens": self.config.token_weight}  # fmt: skip
        total = torch.stack([weights[name] * value for name, value in losses.items()]).sum()
        fractions = {f"keep/{site.label}": float(k.detach().mean())
                     for site, k in zip(self.game.sites, kept, strict=True)}  # fmt: skip
        return total, {**{name: float(value.detach()) for name, value in losses.items()}, **fractions}

    def losses(
        self, logits: Tensor, kept: Sequence[Tensor], last: MaskedState, labels: Tensor, teacher: Tensor, tokens: Tensor
    ) -> dict[str, Tensor]:
        """The four losses by name."""
        norm = self.game.backbone.model.norm
        return {
            "class": F.cross_entropy(logits, labels),
            "ratio": ratio_loss(kept, self.policy.keep_rate),
            "logits": F.kl_div(logits.log_softmax(1), teacher.log_softmax(1), reduction="batchmean", log_target=True),
            "tokens": token_loss(norm(last.tokens), norm(tokens), kept[-1].detach()),
        }


def _untrained(problem: Problem) -> DynamicViT:
    return DynamicViT(1.0, problem.seed, problem.backbone.embed_dim, problem.sites)


DYNAMICVIT_RECIPE = KeepRateRecipe(
    config=DynamicViTConfig(),
    sites=lambda backbone: backbone.default_sites,
    untrained=_untrained,
    make_task=DynamicViTTask,
    dense=True,
)


def fit_dynamicvit(
    backbone: Backbone,
    dataset: ImageDataset,
    target_gmacs: float,
    *,
    config: DynamicViTConfig | None = None,
    **options: Unpack[FitOptions],
) -> DynamicViT:
    """Train predictors for a budget; see `baselines.fit` for the arguments.

    The network stays as it is; the paper also fine-tunes it, at a hundredth of the learning rate.

    Returns:
        The policy at the keep rate of the budget; `policy.at(rate)` has the same predictors at another one.
    """
    return fit_policy(DYNAMICVIT_RECIPE, backbone, dataset, target_gmacs, config=config, **options)


def forward_train(
    backbone: Backbone, state: MaskedState, sites: Sequence[Site], choose: Choose
) -> tuple[Tensor, list[Tensor], MaskedState]:
    """The training form: no token is removed, but pruned ones are masked as keys for all tokens except themselves.

    Args:
        backbone: the network.
        state: tokens before the first site.
        sites: where decisions are taken.
        choose: returns a decision `[B, N]`, 1 = keep, for a step (from 0), the tokens `[B, N, D]` and the decisions so
            far `[B, N]`.

    Returns:
        Logits `[B, classes]`; for each site 1 where a token is kept, `[B, N]`; and the tokens after the last block.
    """
    kept: list[Tensor] = []

    def decide(arrival: Arrival[MaskedState]) -> MaskedState:
        tokens = arrival.state.tokens
        alive = kept[-1] if kept else tokens.new_ones(tokens.shape[:2])
        kept.append(choose(arrival.step, tokens, alive) * alive)
        return arrival.state.with_weights(kept[-1])

    last = Walk(Masked(backbone, see_themselves=True), sites).through(state, decide)
    return classify_masked(backbone, last, last.weights), kept, last


def living_mean(values: Tensor, alive: Tensor) -> Tensor:
    """Mean of `values` `[B, N, C]` over each image's alive tokens (`alive` `[B, N]`), repeated for all tokens."""
    total = torch.einsum("bnc,bn->bc", values, alive)
    return (total / alive.sum(dim=1, keepdim=True).clamp(min=1))[:, None].expand_as(values)


def sample_keep(scores: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """Straight-through Gumbel softmax: hard decisions with the gradients of the soft ones.

    Args:
        scores: log-probabilities `[B, N, 2]`, index 0 = keep.
        temperature: of the softmax.
        generator: a CPU generator.

    Returns:
        `[B, N]`, 1 = keep.
    """
    noise = torch.empty(scores.shape).exponential_(generator=generator).log().neg().to(scores)
    soft = ((scores + noise) / temperature).softmax(dim=-1)[..., 0]
    return (soft > 0.5).to(soft) + (soft - soft.detach())  # in this order the value is exactly 0 or 1


def ratio_loss(kept: Sequence[Tensor], keep_rate: float) -> Tensor:
    """Mean over sites s and images of `(fraction kept after s - keep_rate ** s) ** 2`."""
    errors = [(alive.mean(dim=1) - keep_rate ** (step + 1)).square().mean() for step, alive in enumerate(kept)]
    return torch.stack(errors).mean()


def token_loss(tokens: Tensor, teacher: Tensor, alive: Tensor) -> Tensor:
    """Mean squared distance of the surviving tokens `[B, N, D]` from the teacher's; `alive` `[B, N]` is 0 or 1."""
    distance = (tokens - teacher).square().mean(dim=-1)
    return (distance * alive).sum() / alive.sum().clamp(min=1)
