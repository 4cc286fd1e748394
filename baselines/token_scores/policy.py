"""TokenScores: a small network looks at each token by itself, and tokens above a threshold stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from ...engine.cost import mlp_macs
from ...policy import check_precision
from ...types import Decision, Observation, Site
from ..argument_checks import check_number, whole_number
from ..calibration import Knob
from ..ways_out import Leave, Selection, check_leave

LEAK = 0.01  # slope below 0; with plain ReLU all hidden units may be dead, and no threshold could tell tokens apart
THRESHOLD = Knob("threshold", -40.0, 40.0, rising=False)  # scores are log-odds or logarithms, and far inside of it


class ScoreNetwork(nn.Module):
    """A token to a score: LayerNorm, a hidden layer of half the width, leaky ReLU, one output.

    The widths are those of the light actor of a learned policy, which has one output per action.

    Args:
        embed_dim: D.
        seed: of the initial weights, which are orthogonal.
    """

    def __init__(self, embed_dim: int, seed: int = 0) -> None:
        super().__init__()
        self.sizes = (embed_dim, max(1, embed_dim // 2), 1)
        generator = torch.Generator().manual_seed(seed)
        hidden, last = (nn.utils.skip_init(nn.Linear, *pair) for pair in (self.sizes[:2], self.sizes[1:]))
        for layer, gain in ((hidden, 2**0.5), (last, 1.0)):
            nn.init.orthogonal_(layer.weight, gain, generator=generator)
            nn.init.zeros_(layer.bias)
        self.norm = nn.LayerNorm(embed_dim)
        self.layers = nn.Sequential(hidden, nn.LeakyReLU(LEAK), last)

    @property
    def macs_per_token(self) -> int:
        """Matrix products of one token's score, in MACs."""
        return mlp_macs(self.sizes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores `[...]` of tokens `[..., D]`."""
        return self.layers(self.norm(tokens)).squeeze(-1)


class TokenScores(Selection, nn.Module):
    """Keep the tokens whose score is above a threshold, the same at every site.

    One small network scores each token from its features alone, at all sites. It sees what an agent of a learned policy
    sees, and costs as much. What differs is the training: `fit_distilled_attention` imitates the network's attention,
    `fit_masks` follows gradients through masks. How many tokens stay depends on the image.

    Untrained, it has random weights (from `seed`) and is made for the width of the first network that it acts on.

    Args:
        threshold: on the scores; the higher, the fewer tokens stay.
        seed: of the initial weights.
        embed_dim: D; None: that of the first network that it acts on.
        sites: where it was trained to act; None: the backbone's own.
        leave: way out of the others: "drop", "merge" (into the kept token most like it) or "fuse" (all into one).
    """

    network: ScoreNetwork | None

    def __init__(
        self,
        threshold: float = 0.0,
        seed: int = 0,
        embed_dim: int | None = None,
        sites: Sequence[int | str | Site] | None = None,
        leave: Leave = "drop",
    ) -> None:
        super().__init__()
        check_leave(leave)
        self.leave = leave
        check_number("threshold", threshold)
        self.threshold = float(threshold)
        self.seed = whole_number("seed", seed)
        self.sites = None if sites is None else tuple(Site.parse(site) for site in sites)
        self.network = None
        if embed_dim is not None:
            self.build(embed_dim)

    def build(self, embed_dim: int) -> None:
        """Make an untrained network from the seed; the global random state does not change.

        Raises:
            ValueError: for a width below 1.
        """
        self.network = ScoreNetwork(whole_number("embed_dim", embed_dim, least=1), self.seed)

    def default_sites(self, depth: int) -> Sequence[int | str | Site] | None:
        """Where it was trained to act; untrained at the backbone's own sites."""
        return self.sites

    def scorer(self, like: Tensor) -> ScoreNetwork:
        """The network, made now if there is none.

        Args:
            like: tokens `[..., D]` to score, for their width, type and device.

        Raises:
            ValueError: for tokens of another width.
            TypeError: for tokens of another precision.
        """
        if self.network is None:
            self.build(like.shape[-1])
            self.to(like)
        assert self.network is not None
        if self.network.sizes[0] != like.shape[-1]:
            raise ValueError(f"tokens: TokenScores was made for width {self.network.sizes[0]}, got {like.shape[-1]}")
        check_precision(self.network, like)
        return self.network

    @torch.no_grad()
    def decide(self, obs: Observation) -> Decision:
        """Score every alive token, and keep those above the threshold."""
        network = self.scorer(obs.tokens)
        stays = network(obs.tokens) > self.threshold
        return self.decided(obs, obs.scatter(stays, fill=False), macs=obs.num_alive.double() * network.macs_per_token)

    def at(self, value: float) -> Self:
        """The same policy at another threshold; the network is shared."""
        other = type(self)(value, self.seed, sites=self.sites, leave=self.leave)
        other.network = self.network
        return other.train(self.training)

    def _load_from_state_dict(self, state_dict: Mapping[str, Tensor], prefix: str, *args: Any, **options: Any) -> None:
        """Make a network for the weights in `state_dict` if there is none yet."""
        weight = state_dict.get(f"{prefix}network.norm.weight")
        if weight is not None and self.network is None:
            self.build(len(weight))
        super()._load_from_state_dict(state_dict, prefix, *args, **options)

    def config(self) -> dict[str, Any]:
        """Arguments of the constructor, as JSON values; the weights are not among them."""
        return {
            "threshold": self.threshold,
            "seed": self.seed,
            "embed_dim": None if self.network is None else self.network.sizes[0],
            "sites": None if self.sites is None else [site.label for site in self.sites],
            "leave": self.leave,
        }
