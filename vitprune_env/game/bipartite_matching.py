"""Bipartite soft matching (Bolya et al., 2023, section 3.2), used by ToMe, LTMP and learnt merging.

Every second token of the current sequence is a sender, the others are receivers. `match_bipartite` finds the most
similar receiver of each sender, independently: several senders may have the same one. The policy selects the senders
that merge, and `merge_senders` merges them. Where no token may be in two pairs, as in decouple and merge, see
`baselines.clusters.pair_matching`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vitprune_env.policy import mean_weights
from vitprune_env.types import Observation, as_index


@dataclass(frozen=True)
class Matching:
    """Which token each sender would merge into.

    Positions in the sequence count from 0 and include the prefix tokens in front. Even positions are senders, odd ones
    receivers. Prefix tokens have positions but neither merge nor receive. The published case is one class token. The
    same rule holds for every model: without prefix tokens the first patch is a sender, and with registers or a
    distillation token the patches go on counting after the last of them.
    """

    sends: Tensor  # [B, N] bool, alive tokens that could merge
    partner: Tensor  # [B, N] int64, the receiver most similar to each sender; itself for all others
    score: Tensor  # [B, N] cosine similarity to it; -inf for all others
    macs: Tensor  # [B] float64, of the similarity matrices


def match_bipartite(obs: Observation) -> Matching:
    """Match the alive tokens by the cosine similarity of their keys (mean over heads).

    Images with equally many tokens are matched in one batch. Ragged batches are matched length by length on a CPU,
    where padding would cost products, and in one padded batch on other devices, where many small calls would be slow.

    Args:
        obs: what the policy sees, with the evidence `"keys"` `[sum n_i, d]`.
    """
    keys = F.normalize(obs.evidence["keys"], dim=1)
    sequence = _in_sequence(obs)
    partner = torch.arange(sequence.shape[0], device=keys.device)
    score = keys.new_full((sequence.shape[0],), float("-inf"))
    first = obs.num_prefix % 2  # place of the first sender among the patch tokens: position num_prefix + first is even
    for rows, lengths in _batches(obs):
        rows = sequence[rows]  # [G, n] packed rows in sequence order
        senders, receivers = rows[:, first::2], rows[:, 1 - first :: 2]
        if not receivers.shape[1]:
            continue
        similarity = keys[senders] @ keys[receivers].transpose(1, 2)
        if lengths is not None:  # padding repeats existing rows, which must not be chosen
            similarity = similarity.masked_fill(_beyond(lengths, receivers, 1 - first)[:, None], float("-inf"))
        best, index = similarity.max(dim=2)
        chosen = receivers.gather(1, index)
        if lengths is None:
            partner[senders.flatten()], score[senders.flatten()] = chosen.flatten(), best.flatten()
        else:
            real = ~_beyond(lengths, senders, first) & (best > float("-inf"))
            partner[senders[real]], score[senders[real]] = chosen[real], best[real]
    spread = obs.scatter(score, float("-inf"))
    itself = torch.arange(obs.num_agents, device=keys.device).expand(obs.alive.shape)
    into = torch.where(obs.alive, obs.scatter(obs.token[partner]), itself)
    return Matching(spread > float("-inf"), into, spread, _macs(obs, keys.shape[1]))


def merge_senders(obs: Observation, matching: Matching, merges: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Merge senders into their receivers, which become the means of their groups weighted by size (section 3.2).

    Args:
        obs: what the policy sees.
        matching: of its tokens.
        merges: `[B, N]` bool, senders that merge.

    Returns:
        `merge_into`, `weight` and `order` of a `Decision`, `[B, N]` each. The new sequence has the remaining senders
        first, then the receivers, each in their old order.
    """
    itself = torch.arange(obs.num_agents, device=merges.device).expand(merges.shape)
    merge_into = torch.where(merges, matching.partner, itself).masked_fill(~obs.alive, -1)
    order = torch.where(is_sender(obs), obs.order, obs.order + obs.num_agents).masked_fill(~obs.alive, -1)
    return merge_into, mean_weights(merge_into, obs.size) * obs.alive, order


def is_sender(obs: Observation) -> Tensor:
    """Alive tokens at even positions of the sequence with its prefix tokens, `[B, N]` bool."""
    return ((obs.order + obs.num_prefix) % 2 == 0) & obs.alive


def _in_sequence(obs: Observation) -> Tensor:
    """Packed rows in sequence order, image by image, `[sum n_i]` int64."""
    place = obs.offsets[obs.image] + obs.gather(obs.order)
    return torch.empty_like(place).scatter(0, place, torch.arange(place.shape[0], device=place.device))


Batches = Iterator[tuple[Tensor, Tensor | None]]
"""Images that are matched together: places `[G, n]` of their tokens, and how many of them are real `[G]`; None: all."""


def _batches(obs: Observation) -> Batches:
    """The images in batches that are matched together."""
    if obs.count is not None:
        places = torch.arange(obs.batch_size * obs.count, device=obs.offsets.device)
        return iter([(places.view(obs.batch_size, obs.count), None)])
    return _by_length(obs) if obs.offsets.device.type == "cpu" else _padded(obs)


def _by_length(obs: Observation) -> Batches:
    """Equally long images together."""
    for length in obs.num_alive.unique().tolist():
        images = as_index(obs.num_alive == length)
        yield obs.offsets[images, None] + torch.arange(length, device=images.device), None


def _padded(obs: Observation) -> Batches:
    """All images at once, without a device synchronisation for their lengths."""
    places = obs.offsets[:-1, None] + torch.arange(obs.num_agents, device=obs.offsets.device)
    yield places.clamp(max=obs.image.shape[0] - 1), obs.num_alive


def _beyond(lengths: Tensor, half: Tensor, first: int) -> Tensor:
    """Which entries of `half` `[G, k]`, every second token from `first` on, are padding, bool."""
    return first + 2 * torch.arange(half.shape[1], device=half.device) >= lengths[:, None]


def _macs(obs: Observation, width: int) -> Tensor:
    """What the similarities cost: senders times receivers times the width of a key, `[B]`."""
    alive = obs.num_alive.double()
    return (alive / 2).ceil() * (alive / 2).floor() * width
