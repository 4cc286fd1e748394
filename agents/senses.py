"""Senses: what an actor and its critic see beside a token.

RL4EViT's actor sees its own token and nothing else. A sense is a record: a name, how many columns it adds to a token,
how they are computed from an observation, what evidence that takes and what it costs. `see` puts the columns of several
senses behind the token. Token and senses as wide as a token are standardised each on their own, so that none drowns the
others whatever its scale; all other columns are of order 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..engine.tokens import segment_mean
from ..errors import SettingsError
from ..types import Observation

NEIGHBOURS = 8


@dataclass(frozen=True)
class Sense:
    """One thing to see."""

    name: str
    see: Callable[[Observation], Tensor]  # -> [sum n_i, columns]
    columns: int | None = None  # how many it adds; None: D, as many as a token has
    needs: frozenset[str] = frozenset()  # evidence that it is made of
    macs: Callable[[int], int] = lambda _width: 0  # D -> MACs per token of making it, the evidence not counted

    def width(self, embed_dim: int) -> int:
        """Columns that it adds to tokens of width `embed_dim`."""
        return embed_dim if self.columns is None else self.columns


SENSES: dict[str, Sense] = {}
"""All registered senses by name."""


def register_sense(sense: Sense) -> Sense:
    """Make a sense known by its name, which stands in the files of policies.

    Raises:
        SettingsError: for a name that stands for another sense already.
    """
    if SENSES.get(sense.name, sense) != sense:
        raise SettingsError(f"name: expected one that is not taken, got {sense.name!r}")
    SENSES[sense.name] = sense
    return sense


def check_senses(names: Sequence[str]) -> None:
    """Refuse names that no sense has, or that stand there twice.

    Raises:
        SettingsError: naming them.
    """
    for name in names:
        if name not in SENSES or list(names).count(name) > 1:
            raise SettingsError(f"senses: expected different ones of {', '.join(SENSES)}, got {', '.join(names)}")


def seen_width(names: Sequence[str], embed_dim: int) -> int:
    """Columns of a token of width `embed_dim` and of what is seen beside it."""
    return embed_dim + sum(SENSES[name].width(embed_dim) for name in names)


def sensing_macs(names: Sequence[str], embed_dim: int) -> int:
    """MACs per token of making the columns, evidence not counted."""
    return sum(SENSES[name].macs(embed_dim) for name in names)


def needed(names: Sequence[str]) -> frozenset[str]:
    """The evidence that senses are made of."""
    return frozenset().union(*(SENSES[name].needs for name in names))


def see(obs: Observation, names: Sequence[str]) -> Observation:
    """An observation whose tokens carry the columns of senses; the class tokens stay as they are.

    Args:
        obs: what there is to see.
        names: of the senses; without any the observation is returned as it is.

    Returns:
        The same with tokens `[sum n_i, seen_width(names, D)]`, standardised part by part.
    """
    if not names:
        return obs
    parts = [standardized(obs.tokens.float()), *(SENSES[name].see(obs).float() for name in names)]
    return replace(obs, tokens=torch.cat(parts, dim=1))


def standardized(part: Tensor) -> Tensor:
    """Every row of `[rows, D]` with mean 0 and variance 1; a row of zeros stays one."""
    return F.layer_norm(part, part.shape[-1:])


def neighbour_table(position: Tensor) -> tuple[Tensor, Tensor]:
    """The neighbours of every patch in the grid, those across a corner included.

    Args:
        position: `[N, 2]`, row and column of each patch, equally spaced.

    Returns:
        Their numbers, `[N, 8]` int64, and which of them exist, `[N, 8]` bool.
    """
    apart = (position[:, None] - position[None]).abs()  # [N, N, 2]
    step = apart.masked_fill(apart == 0, float("inf")).amin(dim=(0, 1))
    near = (apart < 1.5 * step).all(dim=2) & (apart > 0).any(dim=2)
    exists, number = near.float().topk(min(NEIGHBOURS, len(position)), dim=1)
    return number, exists.bool()


def _neighbours(obs: Observation, values: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of `values` `[B, N, columns]` over the alive neighbours of each alive token, and the number of these."""
    number, exists = neighbour_table(obs.position)
    total = values.new_zeros(len(obs.token), values.shape[2])
    count = total.new_zeros(len(obs.token), 1)
    for each in range(number.shape[1]):
        place = obs.image, number[:, each][obs.token]
        here = (exists[:, each][obs.token] & obs.alive[place])[:, None]
        total = total + values[place] * here
        count = count + here
    return total, count


def _mean_of_neighbours(obs: Observation) -> Tensor:
    """Mean token of the alive neighbours, standardised; zeros where there are none."""
    total, count = _neighbours(obs, obs.dense().float())
    return standardized(total / count.clamp(min=1))


def _crowd(obs: Observation) -> Tensor:
    """Share of the eight neighbouring places where a token is alive, -1 to 1."""
    return 2 * _neighbours(obs, obs.tokens.new_zeros(*obs.alive.shape, 0))[1] / NEIGHBOURS - 1


def _class_attention(obs: Observation) -> Tensor:
    """Logarithm of the attention of the class token, relative to the mean over the alive tokens of the image."""
    attention = obs.evidence["cls_attention"].float()[:, None]
    mean = segment_mean(attention, obs.image, obs.batch_size)[obs.image]
    return (attention.clamp(min=1e-12) / mean.clamp(min=1e-12)).log()


def _alive(obs: Observation) -> Tensor:
    """Share of the image's tokens that are alive, -1 to 1."""
    return 2 * obs.num_alive[obs.image, None].float() / obs.num_agents - 1


def _site(obs: Observation) -> Tensor:
    """How many half-blocks have run, -1 to 1."""
    return obs.tokens.new_full((len(obs.token), 1), obs.site.half / obs.depth - 1.0)


for _sense in (
    Sense("neighbours", _mean_of_neighbours, macs=lambda width: NEIGHBOURS * width),
    Sense("crowd", _crowd, 1),
    Sense("class_token", lambda obs: standardized(obs.cls.float())[obs.image]),
    Sense("class_attention", _class_attention, 1, frozenset({"cls_attention"})),
    Sense("size", lambda obs: obs.gather(obs.size).float()[:, None].log2(), 1),
    Sense("alive", _alive, 1),
    Sense("site", _site, 1),
    Sense("position", lambda obs: 2 * obs.position[obs.token].float() - 1, 2),
):
    register_sense(_sense)
