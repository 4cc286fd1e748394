"""Check a policy of your own against what the game expects, before you train or publish it."""

from __future__ import annotations

import torch
from torch import Tensor

from vitprune_env.engine.backbone import Backbone
from vitprune_env.game.rollout import play
from vitprune_env.game.token_game import TokenGame
from vitprune_env.policy import Policy, check_members
from vitprune_env.types import Episode


def check_policy(policy: Policy, backbone: Backbone, images: Tensor, deterministic: bool = True) -> None:
    """Play a batch and make sure that the policy keeps the contract.

    Checked are: the protocol's members, the decisions' shapes and types (by the game itself), that the same batch is
    decided the same way again, and that an image's decisions (which tokens stay, and which wait) do not depend on
    the other images of its batch.

    Args:
        policy: the policy.
        backbone: a network for it to play on.
        images: `[B, C, H, W]` with B of at least 2.
        deterministic: whether equal batches must be decided equally; False for policies that sample.

    Raises:
        TypeError: if a member of the `Policy` protocol is missing.
        ValueError: if a decision does not fit, or changes with the run or with the batch.
    """
    check_members(policy)
    if len(images) < 2:
        raise ValueError(f"images: expected at least 2 to tell whether they influence each other, got {len(images)}")
    game = TokenGame.for_policy(backbone, policy)
    together = _decisions(play(game, policy, images))
    if not deterministic:
        return
    if not torch.equal(together, _decisions(play(game, policy, images))):
        raise ValueError(f"policy: {type(policy).__name__} decides the same batch differently each time")
    for index in range(len(images)):
        alone = _decisions(play(game, policy, images[index : index + 1]))
        if not torch.equal(together[:, :, index], alone[:, :, 0]):
            raise ValueError(
                f"policy: {type(policy).__name__} decides image {index} differently when it is alone; "
                "decisions may not depend on the rest of the batch"
            )


def _decisions(episode: Episode) -> Tensor:
    """Which tokens stay and which of them wait, `[2, T, B, N]` bool."""
    parked = torch.zeros_like(episode.keep) if episode.parked is None else episode.parked
    return torch.stack([episode.keep, parked])
