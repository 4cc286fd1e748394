"""The words of the game: what a site, an observation, a decision, a step, an outcome and an episode are.

Letters in shapes: B images, N patch tokens (= agents), P prefix tokens, D embedding width, T sites (= steps),
C classes, n_i alive tokens of image i.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from vitprune_env.errors import SiteError
from vitprune_env.lazy_fields import lazily


@dataclass(frozen=True, order=True)
class Site:
    """A place in the network where the game takes a step.

    A block has two halves, attention and MLP; a site lies right after one of them. `Site.parse(3)` is after block 3
    (1-based, as the papers count), `Site.parse("4.attn")` is inside block 4, between attention and MLP.
    """

    half: int  # number of half-blocks that run before the site: 2 * block, or 2 * block - 1 for "block.attn"

    @classmethod
    def parse(cls, site: int | str | Site) -> Site:
        """Read a site from its notation.

        Raises:
            SiteError: if it is neither a block number nor `"<block>.attn"`.
        """
        if isinstance(site, Site):
            if site.half < 1:
                raise SiteError(f"sites: expected a site after the first half-block or later, got {site!r}")
            return site
        text = str(site)
        number, dot, half = text.partition(".")
        if isinstance(site, bool) or not number.isdecimal() or int(number) < 1 or (dot and half != "attn"):
            raise SiteError(f"sites: expected a 1-based block number such as 3 or '4.attn', got {site!r}")
        return cls(2 * int(number) - (1 if dot else 0))

    @property
    def block(self) -> int:
        """The 1-based block that the site is in or after."""
        return (self.half + 1) // 2

    @property
    def inside(self) -> bool:
        """Whether the site lies between attention and MLP of its block."""
        return self.half % 2 == 1

    @property
    def label(self) -> str:
        """The site in the notation that `parse` reads."""
        return f"{self.block}.attn" if self.inside else str(self.block)

    def __str__(self) -> str:
        return self.label


def parse_sites(sites: Sequence[int | str | Site], depth: int) -> tuple[Site, ...]:
    """Read and check the sites of a network with `depth` blocks.

    Raises:
        SiteError: if there is none, or one lies outside the network, or they do not increase.
    """
    if isinstance(sites, str) or not isinstance(sites, Iterable) or not len(sites):
        raise SiteError(f"sites: expected a non-empty sequence such as (3, 6, 9), got {sites!r}")
    parsed = tuple(Site.parse(site) for site in sites)
    for site in parsed:
        if site.block > depth:
            raise SiteError(f"sites: expected blocks 1 to {depth}, got {site.label!r}")
    if any(a >= b for a, b in zip(parsed, parsed[1:], strict=False)):
        raise SiteError(f"sites: expected increasing sites, got {[site.label for site in parsed]}")
    return parsed


def every_block(depth: int) -> list[str]:
    """Sites inside every block of a network with `depth` blocks, between attention and MLP."""
    return [f"{block}.attn" for block in range(1, depth + 1)]


def quarter_sites(depth: int, later: int = 0, inside: bool = False) -> list[str]:
    """Sites after the first, second and third quarter of a network: after blocks 3, 6 and 9 of 12.

    Args:
        depth: blocks of the network; in short networks sites that coincide become one.
        later: blocks by which the sites are moved towards the end: 1 for blocks 4, 7 and 10 of 12.
        inside: whether the sites lie inside these blocks, between attention and MLP, rather than after them.
    """
    blocks = sorted({min(depth, max(1, round(depth * part / 4) + later)) for part in (1, 2, 3)})
    return [f"{block}.attn" if inside else str(block) for block in blocks]


@lazily("image", "token", "offsets", "size", "order", "position")
@dataclass(frozen=True)
class Observation:
    """What a policy sees at a site: the alive tokens as packed rows, so that dead tokens cost nothing."""

    tokens: Tensor  # [sum n_i, D] alive patch tokens, image by image, in token order
    image: Tensor  # [sum n_i] int64, the image of each row
    token: Tensor  # [sum n_i] int64, the patch number of each row
    offsets: Tensor  # [B + 1] int64, rows offsets[b] to offsets[b + 1] belong to image b
    cls: Tensor  # [B, D] class token, or the mean of the alive tokens where the model has none
    alive: Tensor  # [B, N] bool
    size: Tensor  # [B, N] float, patches that each alive or waiting token stands for; 0 for the dead
    order: Tensor  # [B, N] int64, rank of the alive tokens in the current sequence; -1 for all others
    position: Tensor  # [N, 2] float, row and column of each patch, 0 to 1
    site: Site  # where in the network this is
    step: int  # which step of the game this is, 0 to num_steps - 1
    num_steps: int  # T
    depth: int  # blocks of the network
    evidence: Mapping[str, Tensor] = field(default_factory=dict)  # name -> [sum n_i, ...], only what was asked for
    count: int | None = None  # alive tokens of every image where all have equally many; known in advance
    num_prefix: int = 1  # P, prefix tokens that stand in front of the sequence which `order` ranks
    parked: Tensor | None = None  # [B, N] bool, tokens that wait: not among `alive`, yet not dead; None: none wait

    @property
    def batch_size(self) -> int:
        """B, the number of images."""
        return self.alive.shape[0]

    @property
    def num_agents(self) -> int:
        """N, the number of patch tokens."""
        return self.alive.shape[1]

    @property
    def present(self) -> Tensor:
        """`[B, N]` bool, the tokens in the game, alive or waiting."""
        return self.alive if self.parked is None else self.alive | self.parked

    @cached_property
    def num_alive(self) -> Tensor:
        """Alive tokens of each image, `[B]` int64."""
        return self.offsets.diff()

    def scatter(self, values: Tensor, fill: float | bool = 0.0) -> Tensor:
        """Spread one value (or vector) per alive token `[sum n_i, ...]` over all tokens, `[B, N, ...]`."""
        out = values.new_full((*self.alive.shape, *values.shape[1:]), fill)
        out[self.image, self.token] = values
        return out

    def gather(self, values: Tensor) -> Tensor:
        """Pick the alive tokens' rows `[sum n_i, ...]` out of `[B, N, ...]`."""
        return values[self.image, self.token]

    def dense(self) -> Tensor:
        """Tokens as `[B, N, D]`, zeros for the dead."""
        return self.scatter(self.tokens)


@dataclass(frozen=True)
class Decision:
    """What a policy answers at a site.

    Token j becomes the sum over all i with `merge_into[i] = j` of `weight[i] * x_i`, j itself included, with the
    weights as given. `merge_into[i] = i` stands alone, -1 is dropped, and a group whose target is not kept leaves
    whole. Without `merge_into` every kept token stands alone, times its weight if there are weights.

    A token that is kept and parked waits: no half-block touches it and it costs nothing, until a later decision says
    otherwise. Every decision says anew which tokens wait: a waiting token that is kept and parked waits on, one
    that is kept and not parked comes back behind the others of the sequence, one that is not kept dies. Tokens that
    still wait at the end come back before the image is classified.
    """

    keep: Tensor  # [B, N] bool, False for the dead; a waiting token must be kept, too, or it dies
    merge_into: Tensor | None = None  # [B, N] int64
    weight: Tensor | None = None  # [B, N] float; None: 1 for every token
    order: Tensor | None = None  # [B, N], sorts the tokens that stay into their new sequence; None: as before
    macs: Tensor | None = None  # [B] float, MACs that taking this decision cost; None: nothing
    count: int | None = None  # tokens that go on in every image (kept, not parked), where known; makes it exportable
    features: Tensor | None = None  # [sum n_i, D], what the alive tokens are before they merge; None: as they are
    park: Tensor | None = None  # [B, N] bool, tokens that wait outside the computation; among those that stay
    park_count: int | None = None  # tokens that wait in every image, where known beforehand


@dataclass(frozen=True)
class Step:
    """What a reward gets to see of one step of the game."""

    site: Site
    acted: Tensor  # [B, N] bool, tokens that were in the game and decided, waiting ones included
    kept: Tensor  # [B, N] bool, tokens that are in the game afterwards, waiting ones included
    share: float  # part of the network's half-blocks between this site and the next one (or the end), 0 to 1
    parked: Tensor | None = None  # [B, N] bool, of those kept, the ones that wait up to the next site; None: none
    merged: Tensor | None = None  # [B, N] bool, of those not kept, the ones merged into another token; None: none
    overhead: Tensor | None = None  # [B] float, MACs of evidence and decision as a share of the dense network's

    @property
    def carried(self) -> Tensor:
        """`[B, N]` bool: tokens that the network carries on to the next site, the kept ones that do not wait."""
        return self.kept if self.parked is None else self.kept & ~self.parked


@dataclass(frozen=True)
class Outcome:
    """How a batch of games ended."""

    logits: Tensor  # [B, C]
    correct: Tensor | None  # [B] bool; None without labels
    n_kept: Tensor  # [B, T] int64, tokens that go on after each site; waiting ones cost nothing and are left out
    macs: Tensor  # [B] float64, the whole pass, evidence and policy included
    policy_macs: Tensor  # [B] float64, the part of `macs` spent on evidence and policy
    source: Tensor  # [B, N] int64, token that each original patch ended up in; -1 where it was pruned
    size: Tensor  # [B, N] float, patches that each token alive at the end stands for; 0 for the dead
    alive: Tensor  # [B, N] bool, tokens alive at the end, waiting ones included
    reward: Tensor | None  # [T, B, N] float; None without labels


@dataclass(frozen=True)
class Episode:
    """A batch of finished games, step by step."""

    alive: Tensor  # [T, B, N] bool, in the game before each decision: the agents that acted
    keep: Tensor  # [T, B, N] bool, in the game after each decision
    reward: Tensor | None  # [T, B, N] float; None without labels
    outcome: Outcome
    observations: tuple[Observation, ...] = ()  # T of them, when recording was asked for
    parked: Tensor | None = None  # [T, B, N] bool, of those kept, the waiting ones after each decision; None: none

    @property
    def terminated(self) -> Tensor:
        """`[T, B, N]` bool: agents whose game ended at a step (pruned, or the last site)."""
        done = self.alive & ~self.keep
        done[-1] = self.alive[-1]
        return done


def as_index(flags: Tensor) -> Tensor:
    """Positions of the true entries of a flat bool tensor, `[k]` int64."""
    return torch.nonzero(flags).squeeze(1)
