"""What leaving means: a token that does not stay is dropped, merges into the kept token most like it, or is fused."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vitprune_env.policy import mean_weights
from vitprune_env.types import Decision, Observation

NEEDS = frozenset({"keys"})  # evidence that merging goes by


def merge_leavers(obs: Observation, keep: Tensor, merges: Tensor | None = None) -> Decision:
    """Merge the tokens that leave into the kept tokens that are most like them.

    Likeness is the cosine similarity of keys (mean over heads), as in ToMe (Bolya et al., 2023). A merged token is the
    mean of its patches. In an image where no token is kept, all that leave are dropped.

    Args:
        obs: what was seen, with the evidence `keys`.
        keep: `[B, N]` bool, tokens that stay.
        merges: `[B, N]` bool, those of the others that merge and are not dropped; None: all.

    Returns:
        The decision, with the MACs of the similarities: leaving tokens times kept tokens times the width of a key.
    """
    keep = keep & obs.alive
    leaves = obs.alive & ~keep if merges is None else obs.alive & ~keep & merges
    keys = F.normalize(obs.scatter(obs.evidence["keys"].float()), dim=2)
    likeness = (keys @ keys.transpose(1, 2)).masked_fill(~keep[:, None, :], float("-inf"))
    target = likeness.argmax(dim=2)
    itself = torch.arange(obs.num_agents, device=keep.device).expand(keep.shape)
    joins = leaves & keep.any(dim=1, keepdim=True)
    merge_into = torch.where(joins, target, itself).masked_fill(~(keep | joins), -1)
    macs = leaves.sum(dim=1).double() * keep.sum(dim=1).double() * keys.shape[2]
    return Decision(keep, merge_into, mean_weights(merge_into, obs.size), macs=macs)


def fuse_leavers(obs: Observation, keep: Tensor) -> Decision:
    """Fuse all tokens that leave an image into one, the mean of their patches.

    It takes the place of the one with the lowest patch number, which therefore stays in the game, like the fused token
    of EViT (Liang et al., 2022).

    Args:
        obs: what was seen.
        keep: `[B, N]` bool, tokens that stay as they are.
    """
    leaves = obs.alive & ~keep
    first = leaves.long().argmax(dim=1, keepdim=True)  # of no meaning where none leaves
    itself = torch.arange(obs.num_agents, device=keep.device).expand(keep.shape)
    merge_into = torch.where(leaves, first, itself).masked_fill(~obs.alive, -1)
    return Decision(obs.alive & (merge_into == itself), merge_into, mean_weights(merge_into, obs.size))
