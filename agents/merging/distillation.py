"""A merging policy to start from: importance read off the network's late attention, and the best of a few schedules.

No reward is needed and no labels: tokens are important that the class token attends to late in the network, and a
schedule is good if the network answers as it does with all its tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Sized
from dataclasses import dataclass
from math import exp, log
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from ...data import fetch
from ...engine.backbone import Backbone
from ...engine.cost import bisect
from ...errors import BudgetError
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
CONSTANT = 1e-3  # a feature that deviates less from its mean does not vary, and is not made to by dividing
SHAPES = (0.6, 0.8, 1.1, 1.5)  # of the schedules that are tried: below 1, most tokens go early
SOME = 32  # images on which a schedule's cost is set; it hardly depends on them, since the schedule says how many stay
SHORTEST, LONGEST = 0.01, 50.0  # time constants of a schedule, in depths of the network: from all merging to none
HALVINGS = 9  # of the logarithm of that range, which leave 1.7 % of a time constant


@dataclass(frozen=True)
class Distillation:
    """How a merging policy is read off a network."""

    images: int = 1024
    """Images that importance is fitted on."""
    schedule_images: int = 256
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
        actor.mean[step], actor.deviation[step] = mean, deviation.masked_fill(deviation < CONSTANT, 1.0)
        weights = torch.zeros_like(mean)
        weights[FEATURES.index("importance")] = settings.importance / settings.temperature
        weights[FEATURES.index("dissimilarity")] = 1 / settings.temperature
        actor.weight[step], actor.bias[step] = weights * actor.deviation[step], 0.0
        scores = actor(pairs.features, step).sort().values
        leaving = int(obs.num_alive.sum()) - round(self.counts[step] * obs.batch_size)
        leaving = min(max(leaving, 0), len(scores))
        ends = torch.cat([scores[:1] - 1, scores, scores[-1:] + 1])
        actor.bias[step] = -ends[leaving : leaving + 2].mean()  # between the last one to leave and the first to stay
        return merged(obs, pairs, actor(pairs.features, step) > 0, actor)


def distilled_policy(
    backbone: Backbone,
    data: BatchedDataset | Dataset[Any],
    share: float,
    *,
    sites: Sequence[int | str | Site] | None = None,
    settings: Distillation = Distillation(),
    seed: int = 0,
    progress: bool = False,
) -> MergePolicy:
    """Fit a merging policy to a network without any reward.

    For every site a linear look at the standardised tokens is fitted to the logarithm of the attention that they get
    from the class token in the last third of the blocks (in networks without one: from all tokens), by ridge regression
    on what the dense network computes. Four schedules are set to the budget, and the one is taken with which the
    network most surely answers as it does with all tokens.

    Args:
        backbone: the network.
        data: images, normalised as the backbone wants them; labels are not looked at.
        share: what the policy may cost, as a share of the dense network's MACs.
        sites: where to merge; None: inside every block.
        settings: see `Distillation`.
        seed: of the choice of images.
        progress: whether to show progress bars.

    Returns:
        The policy; a start for `train`, or one to deploy as it is.

    Raises:
        BudgetError: for a share above 1, or below what is left when every pair merges; at every site this is half of
            the tokens.
        TypeError: for a dataset without a length.
        ValueError: for sites outside the network, or an empty dataset.
    """
    if not isinstance(data, Sized):
        raise TypeError(f"data: expected images with a length, got {data!r}")
    if not len(data):
        raise ValueError("data: expected at least one image, got an empty dataset")
    placed = parse_sites(every_block(backbone.depth) if sites is None else sites, backbone.depth)
    features = len(FEATURES) if backbone.has_class_token else len(FEATURES) - 1
    policy = MergePolicy(PairActor(len(placed), backbone.embed_dim, features), sites=placed)
    device = next(backbone.parameters()).device
    policy = policy.to(device)
    game = TokenGame.for_policy(backbone, policy)
    target = share * game.cost.dense()
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    images = fetch(cast(Any, data), order[-settings.schedule_images :])[0].to(device)
    _check_reach(game, policy, images[:1], target, settings)
    batches = _batches(data, order[: settings.images], device, progress)
    policy.actor.look.copy_(_fitted_look(backbone, batches, placed))
    _set_to_best_schedule(game, policy, images, target, settings, progress)
    policy.info = {"backbone": backbone.name, "target_macs": target, "seed": seed, "algorithm": "distillation"}
    return policy


def _check_reach(game: TokenGame, policy: MergePolicy, image: Tensor, target: float, settings: Distillation) -> None:
    """Refuse a budget that merging cannot meet; how much all pairs save does not depend on the image."""
    least = float(play(game, Scheduled(policy, [0.0] * game.num_steps, settings), image).outcome.macs)
    dense = game.cost.dense()
    if not least <= target <= dense:
        raise BudgetError(
            f"share: expected {least / dense:.3g} (every pair merges at {len(game.sites)} sites; more sites make less "
            f"possible) to 1, got {target / dense:.3g}"
        )


def _batches(data: Any, rows: Tensor, device: torch.device, progress: bool) -> Iterator[Tensor]:
    """Images, some at a time."""
    for some in tqdm(rows.split(BATCH), desc="distil", unit="batch", disable=not progress):
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


def _set_to_best_schedule(
    game: TokenGame, policy: MergePolicy, images: Tensor, target: float, settings: Distillation, progress: bool
) -> None:
    """Set the policy to the schedule with which the network most surely answers as it does with all tokens."""
    answers = play(TokenGame(game.backbone), KeepAll(), images).outcome.logits.argmax(dim=1)
    depth = [site.half / (2 * game.backbone.depth) for site in game.sites]

    bar = tqdm(total=len(SHAPES) * (HALVINGS + 1), desc="schedule", unit="pass", disable=not progress)

    def played(shape: float, constant: float, images: Tensor) -> Outcome:
        bar.update()
        counts = [game.num_agents * exp(-((each / constant) ** shape)) for each in depth]
        return play(game, Scheduled(policy, counts, settings), images).outcome

    found: list[tuple[float, dict[str, Tensor]]] = []
    with bar:
        for shape in SHAPES:

            def macs(logarithm: float, shape: float = shape) -> float:
                return float(played(shape, exp(logarithm), images[:SOME]).macs.mean())

            low, _ = bisect(macs, target, log(SHORTEST), log(LONGEST), HALVINGS)
            sure = float(log_probability(played(shape, exp(low), images).logits, answers).mean())
            found.append((sure, {name: value.clone() for name, value in policy.actor.state_dict().items()}))
    policy.actor.load_state_dict(max(found, key=lambda each: each[0])[1])
