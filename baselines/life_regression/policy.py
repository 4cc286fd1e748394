"""Life regression (Chen et al., Life Regression based Patch Slimming for Vision Transformers).

A predictor at the first site decides once, for all sites, how long each token stays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any, Self

import torch
from torch import Tensor, nn

from ...policy import BasePolicy, check_keep_rate, check_precision, keep_top
from ...types import Decision, Observation, Site, quarter_sites
from ..argument_checks import whole_number

INITIAL_SPREAD = 0.02  # of W; lives do not depend on its scale, but the effect of the learning rate does


@dataclass(frozen=True)
class LifeTable:
    """How many tokens leave at which block, and the mean and standard deviation of these lives (Eqs. 9 and 10)."""

    lives: tuple[int, ...]  # for each site the last block that uses the tokens which leave there; then the depth
    leaving: tuple[int, ...]  # for each of them the number of tokens

    @classmethod
    def of(cls, counts: Sequence[int], num_tokens: int, sites: Sequence[Site], depth: int) -> LifeTable:
        """Build the table from the number of tokens that stay.

        Args:
            counts: tokens that stay after each site.
            num_tokens: N, before the first one.
            sites: where tokens leave.
            depth: blocks of the network.
        """
        before = (num_tokens, *counts)
        leaving = [more - less for more, less in zip(before, counts, strict=False)]
        return cls((*(site.block for site in sites), depth), (*leaving, before[-1]))

    @property
    def mean(self) -> float:
        """mu, Eq. 9."""
        return sum(life * count for life, count in zip(self.lives, self.leaving, strict=True)) / sum(self.leaving)

    @property
    def spread(self) -> float:
        """sigma, Eq. 10 with the square that is missing in print (without it the sum is 0)."""
        pairs = zip(self.lives, self.leaving, strict=True)
        return sqrt(sum(count * (life - self.mean) ** 2 for life, count in pairs) / sum(self.leaving))


class LifeRegression(BasePolicy, nn.Module):
    """Predict at the first site how long each token is needed, and keep the longest-lived tokens at every site.

    The importance of token i is `LN(cls)^T W LN(x_i)` (Eqs. 1 and 2), and its life is the importance standardised over
    the image (Eq. 3). `round(N * keep_rate ** s)` tokens stay after site s. Inference only uses their order.

    Tokens leave after blocks 4, 7 and 10 of 12 (`n = N` in block 4 itself), as the printed FLOPs require; the paper's
    interval, read literally, would have them leave before these blocks. The prediction is made at the first site,
    wherever it is. `fit_life_regression` trains W; untrained it is random (from `seed`).

    Args:
        keep_rate: fraction kept at every site, above 0 and at most 1.
        seed: of the initial W.
        embed_dim: D; None: that of the first network that it acts on.
        sites: where it was trained to act; None: the backbone's own.
    """

    norm: nn.LayerNorm | None
    weight: nn.Parameter | None

    def __init__(
        self,
        keep_rate: float,
        seed: int = 0,
        embed_dim: int | None = None,
        sites: Sequence[int | str | Site] | None = None,
    ) -> None:
        super().__init__()
        check_keep_rate(keep_rate)
        self.keep_rate = keep_rate
        self.seed = whole_number("seed", seed)
        self.sites = None if sites is None else tuple(Site.parse(site) for site in sites)
        self.register_module("norm", None)  # so that copies made before `build` share both parts
        self.register_parameter("weight", None)
        self._importance: Tensor | None = None  # [B, N] of the current games
        if embed_dim is not None:
            self.build(embed_dim)

    def build(self, embed_dim: int) -> None:
        """Make an untrained W `[D, D]` from the seed; the global random state does not change.

        Raises:
            ValueError: for a width below 1.
        """
        embed_dim = whole_number("embed_dim", embed_dim, least=1)
        generator = torch.Generator().manual_seed(self.seed)
        self.norm = nn.LayerNorm(embed_dim)
        self.weight = nn.Parameter(INITIAL_SPREAD * torch.randn(embed_dim, embed_dim, generator=generator))

    def default_sites(self, depth: int) -> Sequence[int | str | Site] | None:
        """Where it was trained to act; untrained at the backbone's own sites."""
        return self.sites

    def published_sites(self, depth: int) -> Sequence[int | str | Site] | None:
        """Where it was trained to act; untrained after blocks 4, 7 and 10 of 12."""
        return quarter_sites(depth, later=1) if self.sites is None else self.sites

    def reset(self, batch_size: int, num_agents: int) -> None:
        """Discard the importance of the last images."""
        self._importance = None

    def importance(self, tokens: Tensor, cls: Tensor) -> Tensor:
        """Importance `[B, N]` of tokens `[B, N, D]` for class tokens `[B, D]` (Eq. 2).

        Raises:
            ValueError: for tokens of another width.
            TypeError: for tokens of another precision.
        """
        if self.weight is None:
            self.build(tokens.shape[-1])
            self.to(tokens)
        assert self.norm is not None
        assert self.weight is not None
        if len(self.weight) != tokens.shape[-1]:
            raise ValueError(f"tokens: LifeRegression was made for width {len(self.weight)}, got {tokens.shape[-1]}")
        check_precision(self, tokens)
        query = self.norm(cls) @ self.weight
        return (self.norm(tokens) @ query[:, :, None]).squeeze(2)

    @torch.no_grad()
    def decide(self, obs: Observation) -> Decision:
        """Predict lives at the first site; keep the longest-lived at every site.

        Raises:
            ValueError: if the importance was not predicted at the first site of these games.
        """
        macs = None
        if obs.step == 0:
            tokens = obs.tokens.view(*obs.alive.shape, -1) if obs.count == obs.num_agents else obs.dense()
            self._importance = self.importance(tokens, obs.cls)
            width = tokens.shape[-1]
            macs = torch.full_like(obs.num_alive, width * (width + obs.num_agents), dtype=torch.float64)
        if self._importance is None or self._importance.shape != obs.alive.shape:
            raise ValueError("obs: expected games that LifeRegression saw at their first site, got others")
        count = self.count(obs.step, obs.num_agents)
        scores = obs.gather(self._importance)
        # If no token is to stay, a network without prefix tokens keeps one, so that the number is unknown here.
        known = None if obs.count is None else min(count, obs.count) or None
        keep = keep_top(obs, scores, torch.full_like(obs.num_alive, count))
        return Decision(keep=keep, macs=macs, count=known)

    def count(self, step: int, num_agents: int) -> int:
        """Tokens that stay at a step (from 0), of `num_agents` before the first."""
        return round(num_agents * self.keep_rate ** (step + 1))

    def lives(self, importance: Tensor, sites: Sequence[Site], depth: int) -> Tensor:
        """Lives `[B, N]` in blocks (Eq. 3).

        Args:
            importance: `[B, N]`, of all tokens.
            sites: where tokens leave.
            depth: blocks of the network.
        """
        num_tokens = importance.shape[1]
        counts = [self.count(step, num_tokens) for step in range(len(sites))]
        table = LifeTable.of(counts, num_tokens, sites, depth)
        centred = importance - importance.mean(dim=1, keepdim=True)
        spread = centred.square().mean(dim=1, keepdim=True).clamp(min=torch.finfo(centred.dtype).tiny).sqrt()
        return centred / spread * table.spread + table.mean

    def at(self, value: float) -> Self:
        """The same policy at another keep rate; the predictor is shared."""
        other = type(self)(value, self.seed, sites=self.sites)
        other.norm, other.weight = self.norm, self.weight
        return other.train(self.training)

    def _load_from_state_dict(self, state_dict: Mapping[str, Tensor], prefix: str, *args: Any, **options: Any) -> None:
        """Make W for the weights in `state_dict` if there is none yet."""
        if self.weight is None and f"{prefix}weight" in state_dict:
            self.build(len(state_dict[f"{prefix}weight"]))
        super()._load_from_state_dict(state_dict, prefix, *args, **options)

    def config(self) -> dict[str, Any]:
        """Arguments of the constructor, as JSON values; W is not among them."""
        return {
            "keep_rate": self.keep_rate,
            "seed": self.seed,
            "embed_dim": None if self.weight is None else len(self.weight),
            "sites": None if self.sites is None else [site.label for site in self.sites],
        }
