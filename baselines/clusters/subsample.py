"""Convolution and MLP, the trained alternatives to density peaks in Long et al., 2023, Table 4."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...policy import check_precision
from ...types import Observation, Site
from ..argument_checks import whole_number
from .decouple import DecoupleAndMerge, Merged
from .mergers import runs
from .token_lists import TokenLists

KERNELS = {"convolution": 3, "mlp": 1}


class SubSample(nn.Module):
    """Two layers with a residual over lists of tokens, the first of them a convolution.

    Args:
        width: D.
        hidden: width between the layers.
        kernel: tokens in the window of the convolution, odd; 1 makes it a linear layer.
    """

    def __init__(self, width: int, hidden: int, kernel: int) -> None:
        super().__init__()
        self.kernel = kernel
        self.norm = nn.LayerNorm(width)
        self.window = nn.Linear(kernel * width, hidden)
        self.out = nn.Linear(hidden, width)
        nn.init.zeros_(self.out.weight)  # untrained layers change nothing
        nn.init.zeros_(self.out.bias)

    def forward(self, lists: TokenLists) -> Tensor:
        """New features `[B, M, D]`; zeros beyond the ends of a list, as a padded convolution has them."""
        normed = self.norm(lists.features).masked_fill(~lists.valid[..., None], 0)
        padded = F.pad(normed, (0, 0, self.kernel // 2, self.kernel // 2))
        window = padded.unfold(1, self.kernel, 1).flatten(2)  # [B, M, D * kernel]
        # Padding rows are left out, so that they cost no MACs.
        rows = window.flatten(0, 1) if lists.is_uniform else window[lists.valid]
        change = self.out(F.gelu(self.window(rows)))
        if lists.is_uniform:
            return lists.features + change.view_as(lists.features)
        return lists.features.masked_scatter(lists.valid[..., None], lists.features[lists.valid] + change)

    @property
    def macs(self) -> int:
        """MACs per token."""
        return self.window.weight.numel() + self.out.weight.numel()


class SubSampleMerge(nn.Module, DecoupleAndMerge):
    """Trained layers on the inattentive tokens before they are averaged: the sub-sampling strategies of Table 4.

    See `DecoupleAndMerge` for what all mergers share. The paper only says that convolutions between attention and MLP
    reduce the tokens. Our reading: two layers with a residual run over the inattentive tokens in patch order, with
    kernels of 3 and 1 for `"convolution"` and of 1 and 1 for `"mlp"`. Then runs of consecutive tokens are averaged,
    which replaces strides and works for any number of tokens. Each site has its own weights. Untrained layers change
    nothing, which makes the policy equal to `PoolMerge`; `fit_merger` trains them.

    Args:
        keep_rate: fraction that is attentive at every site, above 0 and at most 1.
        embed_dim: D of the network.
        num_sites: sites of the game.
        kind: `"convolution"` or `"mlp"`.
        clusters: tokens that the inattentive ones are merged into, one number or one per site; None: a quarter of them.
        pairs: pairs of attentive tokens to merge, likewise; None: as many as `clusters`.
        seed: of the initial weights.
        sites: where it was trained to act; None: at the published sites, where those of version 0.1 were trained.
    """

    def __init__(
        self,
        keep_rate: float,
        embed_dim: int,
        num_sites: int,
        kind: Literal["convolution", "mlp"] = "convolution",
        clusters: int | Sequence[int] | None = None,
        pairs: int | Sequence[int] | None = None,
        seed: int = 0,
        sites: Sequence[int | str | Site] | None = None,
    ) -> None:
        nn.Module.__init__(self)
        DecoupleAndMerge.__init__(self, keep_rate, clusters, pairs)
        if kind not in KERNELS:
            raise ValueError(f"kind: expected one of {', '.join(KERNELS)}, got {kind!r}")
        embed_dim = whole_number("embed_dim", embed_dim, least=1)
        num_sites = whole_number("num_sites", num_sites, least=1)
        self.embed_dim, self.num_sites, self.kind, self.seed = embed_dim, num_sites, kind, whole_number("seed", seed)
        self.sites = None if sites is None else [str(Site.parse(site)) for site in sites]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            layers = [SubSample(embed_dim, embed_dim // 2, KERNELS[kind]) for _ in range(num_sites)]
        self.layers = nn.ModuleList(layers)

    def default_sites(self, depth: int) -> Sequence[int | str | Site] | None:
        """Where it was trained to act."""
        return self.published_sites(depth) if self.sites is None else self.sites

    def config(self) -> dict[str, Any]:
        """Arguments of the constructor, as JSON values."""
        names = ("keep_rate", "embed_dim", "num_sites", "kind", "clusters", "pairs", "seed", "sites")
        return {name: getattr(self, name) for name in names}

    def at(self, value: float) -> Self:
        """The same policy at another keep rate; the weights are shared."""
        other = type(self)(**{**self.config(), "keep_rate": value})
        other.layers = self.layers
        return other

    def merge(self, lists: TokenLists, count: Tensor, obs: Observation) -> Merged:
        """Apply the layers of this site, then average runs."""
        if obs.num_steps != self.num_sites or obs.tokens.shape[1] != self.embed_dim:
            raise ValueError(
                f"num_sites, embed_dim: this {self.kind} was made for {self.num_sites} sites of width {self.embed_dim},"
                f" got {obs.num_steps} of width {obs.tokens.shape[1]}"
            )
        check_precision(self.layers, obs.tokens)
        layers = self.layers[obs.step]
        assert isinstance(layers, SubSample)
        return Merged(
            runs(lists, count),
            importance=torch.ones_like(lists.features[..., 0]),
            features=layers(lists),
            macs=lists.length.double() * layers.macs,
        )
