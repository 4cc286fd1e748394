"""A merging policy to start from: importance read off the network's late attention, and the best of a few schedules.

No reward is needed and no labels: tokens are important that the class token attends to late in the network, and a
schedule is good if the network answers as it does with all its tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import exp, log
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from ...data import fetch
from ...engine.backbone import Backbone
from ...engine.cost import bisect, check_budget
from ...game.rewards import log_probability
from ...game.rollout import play
from ...game.token_game import TokenGame
from ...policy import BasePolicy, KeepAll
from ...types import Decision, Observation, Outcome, Site, every_block, parse_sites
from ..shared.training_images import BatchedDataset
from .pairs import FEATURES
from .policy import MergePolicy, PairActor, merged

BATCH = 32  # images whose tokens at all sites are held at once
RIDGE = 1e-4  # penalty of the look, per row
LEAST = 1e-3  # added to attention, relative to its mean, before the logarithm is taken
SHAPES = (0.7, 1.0, 1.5)  # of the schedules that are tried: below 1, most tokens go early
SHORTEST, LONGEST = 0.02, 20.0  # time constants of a schedule, in depths of the network, that drop and keep nearly all
HALVINGS = 9  # of that range, in logarithms


@dataclass(frozen=True)
class Distillation:
    """How a merging policy is read off a network."""

    images: int = 1024
    """Images that importance is fitted on."""
    schedule_images: int = 128
    """Images that the schedule is chosen on; played as one batch."""
    importance: float = 0.5
    """Weight of importance against dissimilarity, both logarithms."""
    temperature: float = 0.3
    """What counts as one logit, in units of their sum."""


class Scheduled(BasePolicy):
    """Plays one batch with as many tokens as a schedule says on average, and sets the actor so that it will, too.

    Args:
        policy: its actor has the look; mean, deviation, weights and bias are set site by site.
        counts: tokens of an image to be left after each site, on average.
        settings: weights of the score.
    """

    def __init__(self, policy: MergePolicy, counts: Sequence[float], settings: Distillation) -> None:
        self.actor, self.counts, self.settings = policy.actor, counts, settings
        self.needs, self.attention_bias = policy.needs, policy.attention_bias

    @torch.no_grad()
    def decide(self, obs: Observation) -> Decision:
        """Merge the pairs with the lowest scores of the batch."""
        actor, step, settings = self.actor, obs.step, self.settings
        pairs = actor.pairs(obs)
        if not len(pairs.token):
            return Decision(keep=obs.alive)
        deviation, mean = torch.std_mean(pairs.features, dim=0, correction=0)
        actor.mean[step], actor.deviation[step] = mean, deviation.clamp(min=LEAST)
        weights = torch.zeros_like(mean)
        weights[FEATURES.index("importance")] = settings.importance / settings.temperature
        weights[FEATURES.index("dissimilarity")] = 1 / settings.temperature
        actor.weight[step], actor.bias[step] = weights * actor.deviation[step], 0.0
        scores = actor(pairs.features, step)
        leaving = int(obs.num_alive.sum()) - round(self.counts[step] * obs.batch_size)
        threshold = scores.sort().values[min(max(leaving, 0), len(scores) - 1)]
        actor.bias[step] = -threshold
        stays = scores >= threshold if leaving > 0 else torch.ones_like(scores, dtype=torch.bool)
        return merged(obs, pairs, stays, actor)


def distilled_policy(
    backbone: Backbone,
    data: BatchedDataset | Dataset[Any],
    share: float,
    *,
    sites: Sequence[int | str | Site] | None = None,
    settings: Distillation = Distillation(),
    seed: int = 0,
) -> MergePolicy:
    """Fit a merging policy to a network without any reward.

    For every site a linear look at the standardised tokens is fitted to the logarithm of the attention that they get
    from the class token in the last third of the blocks (in networks without one: from all tokens), by ridge regression
    on what the dense network computes. Three schedules are set to the budget, and the one is taken with which the
    network most surely answers as it does with all tokens.

    Args:
        backbone: the network.
        data: images, normalised as the backbone wants them; labels are not looked at.
        share: what the policy may cost, as a share of the dense network's MACs.
        sites: where to merge; None: inside every block.
        settings: see `Distillation`.
        seed: of the choice of images.

    Returns:
        The policy; a start for `train`, or one to deploy as it is.

    Raises:
        BudgetError: for a budget that no policy can meet.
        ValueError: for sites outside the network, or an empty dataset.
    """
    placed = parse_sites(every_block(backbone.depth) if sites is None else sites, backbone.depth)
    features = len(FEATURES) if backbone.has_class_token else len(FEATURES) - 1
    policy = MergePolicy(PairActor(len(placed), backbone.embed_dim, features), sites=placed)
    device = next(backbone.parameters()).device
    policy = policy.to(device)
    game = TokenGame.for_policy(backbone, policy)
    check_budget(share * game.cost.dense(), game.cost.floor(placed), game.cost.dense())
    order = torch.randperm(len(cast(Any, data)), generator=torch.Generator().manual_seed(seed))
    policy.actor.look.copy_(_fitted_look(backbone, _batches(data, order[: settings.images], device), placed))
    images = fetch(cast(Any, data), order[-settings.schedule_images :])[0].to(device)
    policy = _best_schedule(game, policy, images, share * game.cost.dense(), settings)
    policy.info = {"backbone": backbone.name, "share": share, "fitted": "distilled"}
    return policy


def _batches(data: Any, rows: Tensor, device: torch.device) -> Iterator[Tensor]:
    """Images, some at a time."""
    for some in rows.split(BATCH):
        yield fetch(data, some)[0].to(device)


@torch.no_grad()
def _fitted_look(backbone: Backbone, batches: Iterator[Tensor], sites: Sequence[Site]) -> Tensor:
    """Weights and bias `[T, D + 1]` that predict late attention from the tokens at each site."""
    seen = "cls_attention" if backbone.has_class_token else "mean_attention"
    first_late = backbone.depth - max(1, backbone.depth // 3) + 1
    late = parse_sites([f"{block}.attn" for block in range(first_late, backbone.depth + 1)], backbone.depth)
    game = TokenGame(backbone, sorted({*sites, *late}), needs=frozenset({seen}), check=False)
    width = backbone.embed_dim + 1
    products = torch.zeros(len(sites), width, width, dtype=torch.float64)
    targets = torch.zeros(len(sites), width, dtype=torch.float64)
    for images in batches:
        obs: Observation | None = game.reset(images)
        tokens: dict[Site, Tensor] = {}
        attention = torch.zeros(len(images), backbone.num_patches, device=images.device)
        while obs is not None:
            if obs.site in sites:
                tokens[obs.site] = obs.tokens
            if obs.site in late:
                attention += obs.evidence[seen].view_as(attention)
            obs = game.step(Decision(keep=obs.alive, count=obs.count))[0]
        relative = attention / attention.mean(dim=1, keepdim=True)
        target = (relative + LEAST).log().flatten().double().cpu()
        for index, site in enumerate(sites):
            rows = F.layer_norm(tokens[site].float(), tokens[site].shape[1:]).double().cpu()
            rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=rows.dtype)], dim=1)
            products[index] += rows.T @ rows
            targets[index] += rows.T @ target
    penalty = RIDGE * products[:, -1, -1, None, None] * torch.eye(width, dtype=torch.float64)
    return torch.cholesky_solve(targets[..., None], torch.linalg.cholesky(products + penalty)).squeeze(2).float()


def _best_schedule(
    game: TokenGame, policy: MergePolicy, images: Tensor, target: float, settings: Distillation
) -> MergePolicy:
    """The policy set to the schedule with which the network most surely answers as it does with all tokens."""
    answers = play(TokenGame(game.backbone), KeepAll(), images).outcome.logits.argmax(dim=1)
    depth = [site.half / (2 * game.backbone.depth) for site in game.sites]

    def played(shape: float, constant: float) -> Outcome:  # the logarithm of the time constant
        counts = [game.num_agents * exp(-((each / exp(constant)) ** shape)) for each in depth]
        return play(game, Scheduled(policy, counts, settings), images).outcome

    best: tuple[float, dict[str, Tensor]] | None = None
    for shape in SHAPES:

        def macs(constant: float, shape: float = shape) -> float:
            return float(played(shape, constant).macs.mean())

        low, _ = bisect(macs, target, log(SHORTEST), log(LONGEST), HALVINGS)
        sure = float(log_probability(played(shape, low).logits, answers).mean())
        if best is None or sure > best[0]:
            best = sure, {name: value.clone() for name, value in policy.actor.state_dict().items()}
    assert best is not None
    policy.actor.load_state_dict(best[1])
    return policy
