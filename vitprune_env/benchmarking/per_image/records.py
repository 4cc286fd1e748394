"""What a policy did with each image: tokens, patch lives, diversity, and how hard the image is for the network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vitprune_env.baselines import diversity_score
from vitprune_env.benchmarking.images import Batches
from vitprune_env.benchmarking.measurement import Sites, game_of
from vitprune_env.engine.backbone import Backbone
from vitprune_env.game.rollout import play
from vitprune_env.policy import Policy
from vitprune_env.types import Site, Step


@dataclass(frozen=True)
class ImageRecords:
    """M images, in the order in which they came; N patches, T sites."""

    label: np.ndarray  # [M] int
    predicted: np.ndarray  # [M] int, by the pruned network
    dense_predicted: np.ndarray  # [M] int, by the dense one
    margin: np.ndarray  # [M] of the dense network: logit of the true class minus the largest of the others
    loss: np.ndarray  # [M] cross-entropy of the dense network, in nats
    gmacs: np.ndarray  # [M] of the pruned network, policy included
    kept: np.ndarray  # [M, T] int, tokens that go on after each site
    dropped: np.ndarray  # [M, T] int, tokens whose patches leave there for good
    merged: np.ndarray  # [M, T] int, tokens that become part of another one there
    waiting: np.ndarray  # [M, T] int, tokens that wait outside the computation up to the next site
    lives: np.ndarray  # [M, N] float, see `lives_of`
    diversity: np.ndarray  # [M], r(Z) of the tokens left after the last site
    sites: tuple[Site, ...]
    depth: int
    names: tuple[str, ...] = ()  # files of the images; empty: they have none, or some were left out
    groups: np.ndarray | None = None  # [M] int, the group of each image; None: each is its own

    def __len__(self) -> int:
        return len(self.label)

    @property
    def correct(self) -> np.ndarray:
        """`[M]` bool, whether the pruned network is right."""
        return self.predicted == self.label

    @property
    def tokens(self) -> np.ndarray:
        """`[M]`, mean number of patch tokens in a block: what the lives of all patches sum to, over the blocks."""
        return self.lives.sum(axis=1) / self.depth

    @property
    def last(self) -> np.ndarray:
        """`[M]` int, tokens that go on after the last site: those whose diversity is measured."""
        return self.kept[:, -1]

    @property
    def diversity_per_token(self) -> np.ndarray:
        """`[M]`, the diversity score over the number of its tokens; 0 where there are none."""
        return self.diversity / np.maximum(self.last, 1)


def lives_of(steps: Sequence[Step], depth: int) -> Tensor:
    """How many blocks each patch passes as a token of its own.

    A token lives until it is dropped or merged into another one. A site inside a block, after its attention, counts
    half of the block. Blocks during which a token waits are not counted, as nothing computes it there.

    Args:
        steps: of a batch of finished games.
        depth: blocks of the network.

    Returns:
        `[B, N]` float, from 0.5 (or 1) to `depth`.
    """
    ends = [*(step.site.half for step in steps[1:]), 2 * depth]
    lives = torch.full(steps[0].kept.shape, steps[0].site.half / 2, device=steps[0].kept.device)
    for step, end in zip(steps, ends, strict=True):
        lives += step.carried * ((end - step.site.half) / 2)
    return lives


def margin_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Logit of the true class minus the largest of the others, `[B]`; below 0 the image is misread."""
    own = logits.gather(1, labels[:, None]).squeeze(1)
    return own - logits.scatter(1, labels[:, None], -torch.inf).amax(dim=1)


@torch.inference_mode()
def record(backbone: Backbone, policy: Policy, test: Batches, sites: Sites | None = None) -> ImageRecords:
    """Let the dense network and a policy classify labelled images, and note what happened to each of them.

    Args:
        backbone: the network.
        policy: decides.
        test: labelled images.
        sites: where to prune; None: where the policy wants to, else the backbone's own sites.

    Raises:
        ValueError: for no images.
    """
    game = game_of(backbone, policy, sites)
    found: dict[str, list[Tensor]] = {}
    for images, labels in test:
        dense = backbone(images).float()
        outcome = play(game, policy, images, labels).outcome
        gone = torch.stack([(step.acted & ~step.kept).sum(dim=1) for step in game.steps], dim=1)
        merged = torch.stack([_count(step.merged, labels) for step in game.steps], dim=1)
        facts = {
            "label": labels,
            "predicted": outcome.logits.argmax(dim=1),
            "dense_predicted": dense.argmax(dim=1),
            "margin": margin_of(dense, labels),
            "loss": F.cross_entropy(dense, labels, reduction="none"),
            "gmacs": outcome.macs / 1e9,
            "kept": outcome.n_kept,
            "dropped": gone - merged,
            "merged": merged,
            "waiting": torch.stack([_count(step.parked, labels) for step in game.steps], dim=1),
            "lives": lives_of(game.steps, backbone.depth),
            "diversity": diversity_score(game.state),
        }
        for name, values in facts.items():
            found.setdefault(name, []).append(values.cpu())
    if not found:
        raise ValueError("test: expected at least one batch of labelled images, got an empty dataset")
    columns: dict[str, Any] = {name: torch.cat(parts).numpy() for name, parts in found.items()}
    groups = getattr(test, "groups", None)
    return ImageRecords(
        **columns,
        sites=game.sites,
        depth=backbone.depth,
        names=_names(test, len(columns["label"])),
        groups=None if groups is None else groups.numpy(),
    )


def _count(flags: Tensor | None, labels: Tensor) -> Tensor:
    """Tokens of each image, `[B]`; None: none."""
    return torch.zeros_like(labels) if flags is None else flags.sum(dim=1)


def _names(test: Batches, count: int) -> tuple[str, ...]:
    """Files of the images, where all of them were read."""
    files = getattr(test, "files", None)
    return () if files is None or len(files) != count else tuple(files.name(index) for index in range(count))
