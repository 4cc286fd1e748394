"""Training of DynamicViT's predictors for a network that stays as it is (Rao et al., 2021, section 3.3)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from ...data import ImageDataset
from ...engine.backbone import Backbone
from ...engine.masked import MaskedState, classify_masked, run_masked
from ...files import PathLike
from ...game.token_game import TokenGame
from ...types import Site, parse_sites
from ..fitting.inputs import Inputs, at_budget, deployed, device_of, inputs_of
from ..fitting.loop import FitConfig, fit
from ..fitting.task import ModuleTask, Row, frozen
from .policy import DynamicViT

Choose = Callable[[int, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class DynamicViTConfig:
    """How to train the predictors; weights of the losses as published for DeiT-S."""

    fit: FitConfig = field(
        default_factory=lambda: FitConfig(
            steps=240, batch_size=32, lr=3e-3, validation=256, validate_every=40, weight_decay=0.05
        )
    )
    """The training itself."""
    images: int = 4096
    """Training images, prepared up to the first site and kept in memory; 0: all, prepared whenever they are drawn."""
    ratio_weight: float = 2.0
    """Of the squared distance between kept and wanted fractions, mean over sites."""
    logit_weight: float = 0.5
    """Of the divergence from the dense network's class probabilities."""
    token_weight: float = 0.5
    """Of the squared distance between the surviving tokens and the dense network's."""
    temperature: float = 1.0
    """Of the Gumbel softmax."""

    def __post_init__(self) -> None:
        for name in ("ratio_weight", "logit_weight", "token_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)!r}")
        if self.temperature <= 0:
            raise ValueError(f"temperature: expected above 0, got {self.temperature!r}")
        if self.images < 0:
            raise ValueError(f"images: expected at least 0, got {self.images!r}")

    def quick(self) -> Self:
        """Hardly any training, to see that everything works."""
        return replace(self, fit=self.fit.quick(), images=min(self.images, 64) if self.images else 0)


def fit_dynamicvit(
    backbone: Backbone,
    dataset: ImageDataset,
    target_gmacs: float,
    *,
    sites: Sequence[int | str | Site] | None = None,
    seed: int = 0,
    output: PathLike | None = None,
    resume: bool = False,
    progress: bool = False,
    config: DynamicViTConfig | None = None,
) -> DynamicViT:
    """Train predictors for a budget; the backbone stays as it is (the original fine-tunes it at a hundredth the rate).

    Args:
        backbone: the network, also the teacher of its pruned self.
        dataset: labelled training images.
        target_gmacs: mean GMACs per image, predictors included; it decides the keep rate.
        sites: where to prune; None: the backbone's own sites.
        seed: of predictors, batches and Gumbel noise.
        output: folder for checkpoints; None: none are written.
        resume: whether to go on from the checkpoint in `output`.
        progress: whether to show a progress bar.
        config: how to train; None: the defaults. Its seed gives way to `seed`.

    Returns:
        The policy at the keep rate of the budget; `policy.at(rate)` has the same predictors at another one.

    Raises:
        BudgetError: for a budget that no keep rate meets.
        CheckpointError: for a checkpoint of another fit.
    """
    config = DynamicViTConfig() if config is None else config
    parsed = parse_sites(backbone.default_sites if sites is None else sites, backbone.depth)
    start = DynamicViT(1.0, seed, backbone.embed_dim, parsed).to(device_of(backbone))
    policy = at_budget(start.at, target_gmacs, backbone, dataset, parsed)
    with frozen(backbone):
        inputs = inputs_of(backbone, dataset, parsed[0].half, config.images)
        task = DynamicViTTask(policy, TokenGame.for_policy(backbone, policy), inputs, config)
        settings = {**asdict(config), "fit": None, **policy.config(), "backbone": backbone.name}
        options: dict[str, Any] = {"output": output, "resume": resume, "progress": progress, "settings": settings}
        fit(task, inputs, replace(config.fit, seed=seed), device=device_of(backbone), **options)
    return policy.eval()


class DynamicViTTask(ModuleTask):
    """Weighted sum of class, ratio and distillation losses of the training form.

    Args:
        policy: whose predictors learn.
        game: gives backbone and sites.
        inputs: the training images.
        config: weights of the losses, temperature.
    """

    def __init__(self, policy: DynamicViT, game: TokenGame, inputs: Inputs, config: DynamicViTConfig) -> None:
        super().__init__(policy)
        self.policy, self.game, self.inputs, self.config = policy, game, inputs, config

    def loss(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Row]:
        """Loss of a batch, its decisions drawn from the predictors."""
        backbone, state = self.game.backbone, self.inputs.state(images)
        with torch.no_grad():
            dense, _ = run_masked(backbone, state, 2 * backbone.depth)
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

    def validate(self, batches: Sequence[tuple[Tensor, Tensor]]) -> Row:
        """As deployed."""
        return deployed(self.game, self.policy, self.inputs, batches)

    def state_dict(self) -> Mapping[str, Any]:
        """The predictors'."""
        return self.policy.state_dict()


def forward_train(
    backbone: Backbone, state: MaskedState, sites: Sequence[Site], choose: Choose
) -> tuple[Tensor, list[Tensor], MaskedState]:
    """The training form: every token stays, removed ones are seen by nobody but themselves.

    Args:
        backbone: the network.
        state: tokens before the first site.
        sites: where decisions are taken.
        choose: step (from 0), tokens `[B, N, D]` and what is kept so far `[B, N]` to a decision `[B, N]`, 1 = keep.

    Returns:
        Logits `[B, classes]`, what is kept after each site `[B, N]` each, and the tokens that leave the last block.
    """
    alive, kept = state.tokens.new_ones(state.tokens.shape[:2]), []
    weights = None
    for step, site in enumerate(sites):
        state, _ = run_masked(backbone, state, site.half, weights, see_themselves=weights is not None)
        weights = alive = choose(step, state.tokens, alive) * alive
        kept.append(alive)
    state, _ = run_masked(backbone, state, 2 * backbone.depth, weights, see_themselves=True)
    return classify_masked(backbone, state, weights), kept, state


def living_mean(values: Tensor, alive: Tensor) -> Tensor:
    """Mean over each image's living tokens, for all of them: `[B, N, C]` with `[B, N]` to `[B, N, C]`."""
    total = torch.einsum("bnc,bn->bc", values, alive)
    return (total / alive.sum(dim=1, keepdim=True).clamp(min=1))[:, None].expand_as(values)


def sample_keep(scores: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """Gumbel softmax, straight through: hard decisions, gradients of the soft ones.

    Args:
        scores: log-probabilities `[B, N, 2]`, index 0 = keep.
        temperature: of the softmax that the gradients are those of.
        generator: a CPU generator.

    Returns:
        `[B, N]`, 1 = keep.
    """
    noise = torch.empty(scores.shape).exponential_(generator=generator).log().neg().to(scores)
    soft = ((scores + noise) / temperature).softmax(dim=-1)[..., 0]
    return (soft > 0.5).to(soft) + (soft - soft.detach())  # brackets: exactly 0 or 1


def ratio_loss(kept: Sequence[Tensor], keep_rate: float) -> Tensor:
    """Mean over sites s and images of `(fraction kept after s - keep_rate ** s) ** 2`: a fixed rate for every image."""
    errors = [(alive.mean(dim=1) - keep_rate ** (step + 1)).square().mean() for step, alive in enumerate(kept)]
    return torch.stack(errors).mean()


def token_loss(tokens: Tensor, teacher: Tensor, alive: Tensor) -> Tensor:
    """Mean squared distance of the surviving tokens `[B, N, D]` from the teacher's; `alive` `[B, N]` is 0 or 1."""
    distance = (tokens - teacher).square().mean(dim=-1)
    return (distance * alive).sum() / alive.sum().clamp(min=1)
