"""Differentiable masks: tokens are scored by what the loss of the pruned network says about keeping them.

Decisions are drawn and straight-through: tokens that are pruned are masked, and the gradient of the cross-entropy
reaches the scores as if the masks were soft. What DynamicViT (Rao et al., 2021) and LTMP (Bonnaerens & Dambre, 2023)
train their own parts with, here for the network and the threshold of a learned policy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Unpack, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...data import ImageDataset
from ...engine.backbone import Backbone
from ...engine.cost import bisect
from ...engine.masked import MaskedState, classify_masked
from ...engine.tokens import start_state
from ...engine.walk import Arrival, Masked, Walk
from ...game.rollout import play
from ..argument_checks import check_fields
from ..fitting.inputs import inputs_of
from ..fitting.loop import FitConfig
from ..fitting.recipe import FitOptions, Problem, fit_policy
from ..fitting.task import Row
from .fitting import ScoreConfig, ScoreRecipe, ScoreTask
from .policy import THRESHOLD, TokenScores

VALIDATION_STEPS = 12  # halvings of the range of thresholds
INITIAL_SPREAD = 0.1  # of the last layer's weights: at the start all tokens have nearly the same odds


@dataclass(frozen=True)
class MasksConfig(ScoreConfig):
    """Settings of the fit."""

    fit: FitConfig = field(
        default_factory=lambda: FitConfig(steps=240, batch_size=32, lr=1e-2, validation=256, validate_every=80)
    )
    """The training loop."""
    keep_bias: float = 1.0
    """Log-odds of keeping a token at the start."""
    price: float = 1.0
    """What the dense network's MACs cost at the start, in units of cross-entropy."""
    price_rate: float = 0.5
    """How much the price rises per step and per share of the dense MACs by which a batch exceeds the budget."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, ("price", "price_rate"), lambda value: value >= 0, "at least 0")


class MasksTask(ScoreTask):
    """Cross-entropy of the masked network, and the price of its MACs, which follows the budget.

    `loss = cross-entropy + price * share`, where share is the mean share of the dense MACs as the game counts them, the
    scores included. After every step the price rises by `price_rate * (share - target share)`, and never below 0.
    """

    def __init__(self, problem: Problem, policy: TokenScores) -> None:
        data = inputs_of(problem.backbone, problem.dataset, problem.sites[0].half, problem.config.images)
        super().__init__(problem, policy, data)
        self.dense = self.game.cost.dense()
        self.target = problem.target_gmacs * 1e9 / self.dense
        self.price = float(problem.config.price)
        self.excess = 0.0  # of the last batch

    def loss(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Row]:
        """Loss of a batch, with the decisions drawn."""
        logits, _, macs = self.masked(self.data.state(images), partial(sample, generator=generator))
        error, share = F.cross_entropy(logits, labels), macs.mean() / self.dense
        self.excess = float(share.detach()) - self.target
        accuracy = (logits.argmax(dim=1) == labels).float().mean()
        row = {"class": float(error.detach()), "share": self.target + self.excess, "accuracy": float(accuracy)}
        return error + self.price * share, {**row, "price": self.price}

    def masked(self, start: MaskedState, decided: Callable[[Tensor], Tensor]) -> tuple[Tensor, list[Tensor], Tensor]:
        """The training form: tokens that are pruned stay in place, and no other token sees them.

        Args:
            start: the tokens at or before the first site.
            decided: scores `[B, N]` to decisions `[B, N]`, 1 = keep.

        Returns:
            Logits `[B, classes]`; for each site 1 where a token is there after it, `[B, N]`; and MACs `[B]`, with
            those of the scores. All follow the decisions differentiably.
        """
        backbone, sites = self.game.backbone, self.game.sites
        network = self.policy.scorer(start.tokens)
        keep: list[Tensor] = []

        def decide(arrival: Arrival[MaskedState]) -> MaskedState:
            tokens = arrival.state.tokens
            alive = keep[-1] if keep else tokens.new_ones(tokens.shape[:2])
            chosen = alive * decided(network(tokens))
            keep.append(rescued(chosen, alive, tokens) if backbone.needs_patches else chosen)
            return arrival.state.with_weights(keep[-1])

        last = Walk(Masked(backbone), sites).through(start, decide)
        counts = torch.stack(keep).sum(dim=2).T.double()
        looked_at = backbone.num_patches + counts[:, :-1].sum(dim=1)
        macs = self.game.cost.forward(counts, sites) + looked_at * network.macs_per_token
        return classify_masked(backbone, last, last.weights), keep, macs

    def after_step(self) -> None:
        """Move the price towards the budget."""
        self.price = max(0.0, self.price + self.config.price_rate * self.excess)

    @torch.no_grad()
    def validate(self, batches: Sequence[tuple[Tensor, Tensor]]) -> Row:
        """Mean cross-entropy and accuracy as deployed, pruned tokens removed, at the threshold of the budget."""
        states = [start_state(state.x, state.num_prefix, state.half)
                  for state in (self.data.state(images) for images, _ in batches)]  # fmt: skip

        def macs(threshold: float) -> float:
            policy = self.policy.at(threshold)
            return float(torch.cat([play(self.game, policy, state).outcome.macs for state in states]).mean())

        strictest, loosest = cast(float, THRESHOLD.high), THRESHOLD.low
        target = self.problem.target_gmacs * 1e9
        self.policy.threshold = bisect(macs, target, strictest, loosest, VALIDATION_STEPS)[1]
        found = super().validate(batches)
        self.policy.threshold = 0.0
        return found

    def state_dict(self) -> Mapping[str, Any]:
        """Weights and price."""
        return {"module": self.module.state_dict(), "price": self.price}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> object:
        """Restore both."""
        self.price = state_dict["price"]
        return self.module.load_state_dict(state_dict["module"])


def sample(scores: Tensor, generator: torch.Generator) -> Tensor:
    """Decisions drawn with the odds that the scores are logarithms of; straight-through, with logistic noise.

    Args:
        scores: `[B, N]`, log-odds of keeping each token.
        generator: a CPU generator.

    Returns:
        `[B, N]`, 1 = keep, with the gradients of the sigmoid of score and noise (the binary Gumbel softmax).
    """
    noise = torch.empty(scores.shape).uniform_(generator=generator).logit(eps=1e-6).to(scores)
    soft = (scores + noise).sigmoid()
    return (soft > 0.5).to(soft) + (soft - soft.detach())  # in this order the value is exactly 0 or 1


def rescued(keep: Tensor, alive: Tensor, tokens: Tensor) -> Tensor:
    """Let the token of the largest norm stay where an image would lose its last one, as the game does.

    Args:
        keep: `[B, N]`, 1 = keep.
        alive: `[B, N]`, the same before the decision.
        tokens: `[B, N, D]`.
    """
    empty = ~(keep.detach() > 0).any(dim=1, keepdim=True)
    norms = tokens.detach().norm(dim=2).masked_fill(alive.detach() == 0, -1)
    stays = torch.zeros_like(empty.expand(keep.shape)).scatter(1, norms.argmax(dim=1, keepdim=True), True) & empty
    return torch.where(stays, 1.0, keep)


def _task(problem: Problem, policy: TokenScores) -> MasksTask:
    """The task of an untrained policy that at first keeps more than it prunes, and nearly the same of every image."""
    network = policy.network
    assert network is not None
    last = cast(nn.Linear, network.layers[-1])
    with torch.no_grad():
        last.weight.mul_(INITIAL_SPREAD)
        last.bias.fill_(problem.config.keep_bias)
    return MasksTask(problem, policy)


MASKS_RECIPE = ScoreRecipe(MasksConfig(), _task)


def fit_masks(
    backbone: Backbone,
    dataset: ImageDataset,
    target_gmacs: float,
    *,
    config: MasksConfig | None = None,
    **options: Unpack[FitOptions],
) -> TokenScores:
    """Train scores through differentiable masks; see `baselines.fit` for the arguments.

    Returns:
        The policy at the threshold of the budget; `policy.at(threshold)` has the same scores at another one.
    """
    return fit_policy(MASKS_RECIPE, backbone, dataset, target_gmacs, config=config, **options)
