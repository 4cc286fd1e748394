"""A policy to start from: a new actor learns which tokens another policy keeps (behaviour cloning).

What the other policy decides by, such as class attention, may cost evidence, or be a rule. The actor that imitates it
looks at tokens alone, like any actor, and `train` goes on from there.
"""

from __future__ import annotations

from collections.abc import Sequence, Sized
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from ..data import fetch
from ..engine.backbone import Backbone
from ..engine.cost import check_budget
from ..envs.actions import ActionKind, KeepActions, action_kind
from ..game.token_game import TokenGame
from ..policy import Policy
from ..types import Observation, Site
from .budgets.calibration import calibrate_threshold
from .networks import LightNetworks, PaperNetworks
from .policies import TokenPolicy
from .senses import needed, see
from .shared.settings import check, check_numbers
from .shared.training_images import BatchedDataset

BATCH = 64  # images that the other policy plays at once
LIGHT = LightNetworks()


@dataclass(frozen=True)
class Cloning:
    """Settings of behaviour cloning."""

    images: int = 512
    """Images that the other policy plays; the threshold is set on them as well."""
    steps: int = 600
    """Gradient steps."""
    batch_size: int = 2048
    """Decisions per step."""
    lr: float = 3e-3
    """Learning rate of Adam at the start; it falls linearly to 0."""

    def __post_init__(self) -> None:
        check_numbers(self)
        for name in ("images", "steps", "batch_size"):
            check(self, name, getattr(self, name) >= 1, "at least 1")
        check(self, "lr", self.lr > 0, "above 0")


def cloned_policy(
    backbone: Backbone,
    data: BatchedDataset | Dataset[Any],
    teacher: Policy,
    share: float,
    *,
    sites: Sequence[int | str | Site] | None = None,
    actions: ActionKind | str = KeepActions(),  # noqa: B008, frozen
    networks: LightNetworks | PaperNetworks = LIGHT,
    settings: Cloning = Cloning(),
    seed: int = 0,
    progress: bool = False,
) -> TokenPolicy:
    """Fit a new actor to what another policy does, in the games that this one plays.

    The loss is the cross-entropy of the teacher's actions, which for keeping and pruning is the binary cross-entropy of
    its keep decisions. The threshold is then set so that the actor's own play costs the budget.

    Args:
        backbone: the network.
        data: images, normalised as the backbone wants them; labels are not looked at.
        teacher: any policy whose decisions the actions can express, near the budget.
        share: what the new policy may cost, as a share of the dense network's MACs.
        sites: where both act; None: the backbone's own.
        actions: what the actor's actions mean, or the name of a registered kind.
        networks: sizes of the actor, and what it sees.
        settings: see `Cloning`.
        seed: of initial weights, images and batches.
        progress: whether to show progress bars.

    Returns:
        The policy; a start for `train`, or one to deploy as it is.

    Raises:
        BudgetError: for a share that no policy can meet.
        TypeError: for a dataset without a length.
        ValueError: for sites outside the network, an empty dataset, or a teacher that does what the actions cannot say,
            such as merging where they prune or keep.
    """
    if not isinstance(data, Sized):
        raise TypeError(f"data: expected images with a length, got {data!r}")
    if not len(data):
        raise ValueError("data: expected at least one image, got an empty dataset")
    kind = action_kind(actions, "actions")
    seen = teacher.needs | kind.needs | needed(networks.senses)
    game = TokenGame(backbone, sites, needs=seen, attention_bias=kind.attention_bias)
    target = share * game.cost.dense()
    check_budget(target, game.cost.floor(game.sites), game.cost.dense())
    generator = torch.Generator().manual_seed(seed)
    actor = networks.actor(backbone.embed_dim, kind.count(game.num_agents), generator)
    device = next(backbone.parameters()).device
    rows = torch.randperm(len(data), generator=generator)[: settings.images]
    chosen = tqdm(rows.split(BATCH), desc="teacher", unit="batch", disable=not progress)
    batches = [fetch(cast(Any, data), some)[0].to(device) for some in chosen]
    played = [part for images in batches for part in _played(game, teacher, kind, networks.senses, images)]
    tokens, taken = (torch.cat(parts) for parts in zip(*played, strict=True))
    policy = TokenPolicy(actor.to(device), sites=game.sites, actions=kind)
    adam = torch.optim.Adam(actor.parameters(), lr=settings.lr)
    for step in tqdm(range(settings.steps), desc="clone", unit="step", disable=not progress):
        adam.param_groups[0]["lr"] = settings.lr * (1 - step / settings.steps)
        some = torch.randint(len(taken), (settings.batch_size,), generator=generator).to(device)
        adam.zero_grad()
        F.cross_entropy(actor(tokens[some]), taken[some]).backward()
        adam.step()
    policy = calibrate_threshold(TokenGame.for_policy(backbone, policy), policy, batches, target)
    policy.info = {"backbone": backbone.name, "target_macs": target, "seed": seed, "algorithm": "cloning"}
    return policy


@torch.no_grad()
def _played(
    game: TokenGame, teacher: Policy, kind: ActionKind, senses: Sequence[str], images: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """What an actor sees of the alive tokens at each site, `[rows, W]`, and the teacher's actions, `[rows]` int64."""
    teacher.reset(len(images), game.num_agents)
    found: list[tuple[Tensor, Tensor]] = []
    obs: Observation | None = game.reset(images)
    while obs is not None:
        decision = teacher.decide(obs)
        found.append((see(obs, senses).tokens.float(), obs.gather(kind.encode(decision, obs))))
        obs = game.step(decision)[0]
    return found
