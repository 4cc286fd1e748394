"""Bipartite soft matching: every second token of the current sequence looks for the most similar of the others.

What ToMe (Bolya et al., 2023, section 3.2) and LTMP (Bonnaerens & Dambre, 2023) share; they differ in who then merges.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..types import Observation, as_index


@dataclass(frozen=True)
class Matching:
    """Which token each sender would merge into.

    The sequence, prefix tokens in front, alternates between senders (even positions, the class token at 0 among them)
    and receivers (odd ones). Prefix tokens stay out of it: they neither merge nor receive. One class token is the
    published case; we let every model follow the same rule, so that without prefix tokens the first patch is a sender,
    and behind registers or a distillation token the parity goes on from the last of them.
    """

    sends: Tensor  # [B, N] bool, alive tokens that could merge
    partner: Tensor  # [B, N] int64, the receiver most similar to each sender; itself for all others
    score: Tensor  # [B, N] cosine similarity to it; -inf for all others
    macs: Tensor  # [B] float64, of the similarity matrices


def match(obs: Observation) -> Matching:
    """Match the alive tokens by the cosine similarity of their keys (mean over heads).

    Images with equally many tokens are matched in one batch. On a CPU ragged images go through length by length,
    because padding would multiply what nobody needs; other devices take one padded batch rather than many small calls.

    Args:
        obs: what the policy sees, with the evidence `"keys"` `[sum n_i, d]`.
    """
    keys = F.normalize(obs.evidence["keys"], dim=1)
    sequence = _in_sequence(obs)
    partner = torch.arange(sequence.shape[0], device=keys.device)
    score = keys.new_full((sequence.shape[0],), float("-inf"))
    first = obs.num_prefix % 2  # the sender in front of everybody: position num_prefix + first is even
    for rows, lengths in _batches(obs):
        rows = sequence[rows]  # [G, n] packed rows in sequence order
        senders, receivers = rows[:, first::2], rows[:, 1 - first :: 2]
        if not receivers.shape[1]:
            continue
        similarity = keys[senders] @ keys[receivers].transpose(1, 2)
        if lengths is not None:  # padding repeats a row that is there; as a receiver it must not win
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


def merge(obs: Observation, matching: Matching, merges: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Let senders merge: the receiver becomes the mean of its group, weighted by size (ToMe, section 3.2).

    Args:
        obs: what the policy sees.
        matching: of its tokens.
        merges: `[B, N]` bool, senders that merge.

    Returns:
        `merge_into`, `weight` and `order` of a `Decision`, `[B, N]` each. The new sequence is what is left of the
        senders, then the receivers, each in their old order.
    """
    itself = torch.arange(obs.num_agents, device=merges.device).expand(merges.shape)
    target = torch.where(merges, matching.partner, itself)
    total = torch.zeros_like(obs.size).scatter_add(1, target, obs.size)
    weight = obs.size / total.gather(1, target).clamp(min=1)
    order = torch.where(is_sender(obs), obs.order, obs.order + obs.num_agents).masked_fill(~obs.alive, -1)
    return target.masked_fill(~obs.alive, -1), weight, order


def is_sender(obs: Observation) -> Tensor:
    """Alive tokens at even positions of the sequence with its prefix tokens, `[B, N]` bool."""
    return ((obs.order + obs.num_prefix) % 2 == 0) & obs.alive


def _in_sequence(obs: Observation) -> Tensor:
    """Packed rows in sequence order, image by image, `[sum n_i]` int64."""
    place = obs.offsets[obs.image] + obs.gather(obs.order)
    return torch.empty_like(place).scatter(0, place, torch.arange(place.shape[0], device=place.device))


Batches = Iterator[tuple[Tensor, Tensor | None]]
"""Images that are matched together: places `[G, n]` of their tokens; how many are real `[G]`, None: all."""


def _batches(obs: Observation) -> Batches:
    """How to go through the images."""
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
    """All images at once; the device need not say how long they are."""
    places = obs.offsets[:-1, None] + torch.arange(obs.num_agents, device=obs.offsets.device)
    yield places.clamp(max=obs.image.shape[0] - 1), obs.num_alive


def _beyond(lengths: Tensor, half: Tensor, first: int) -> Tensor:
    """Entries of `half` `[G, k]`, every second token from `first` on, that are padding, bool."""
    return first + 2 * torch.arange(half.shape[1], device=half.device) >= lengths[:, None]


def _macs(obs: Observation, width: int) -> Tensor:
    """What the similarities cost: senders times receivers times the width of a key, `[B]`."""
    alive = obs.num_alive.double()
    return (alive / 2).ceil() * (alive / 2).floor() * width
