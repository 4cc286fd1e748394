"""DynamicViT (Rao et al., 2021): a small trained predictor per site scores the tokens, and the best ones stay."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from ...engine.cost import mlp_macs
from ...engine.tokens import segment_mean
from ...errors import CheckpointError, SiteError
from ...policy import BasePolicy, check_keep_rate, check_precision, keep_top
from ...types import Decision, Observation, Site
from ..argument_checks import whole_number


class ScorePredictor(nn.Module):
    """Log-probabilities of keeping (index 0) and pruning (index 1) each token.

    LayerNorm, a linear layer from D to D, GELU. Half of the channels are then replaced by their mean over the alive
    tokens of the image. Linear layers from D to D/2, D/4 and 2 follow, with GELU between. Parameters are named as in
    the authors' code, whose LayerNorm has PyTorch's epsilon of 1e-5.

    Args:
        embed_dim: D.

    Raises:
        ValueError: for a width that is not a multiple of 4.
    """

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        if embed_dim < 4 or embed_dim % 4:
            raise ValueError(f"embed_dim: expected a multiple of 4, got {embed_dim}")
        self.sizes = (embed_dim, embed_dim // 2, embed_dim // 4, 2)
        self.in_conv = nn.Sequential(nn.LayerNorm(embed_dim), nn.Linear(embed_dim, embed_dim), nn.GELU())
        self.out_conv = nn.Sequential(
            nn.Linear(*self.sizes[0:2]), nn.GELU(), nn.Linear(*self.sizes[1:3]), nn.GELU(), nn.Linear(*self.sizes[2:4])
        )

    @property
    def macs_per_token(self) -> int:
        """Matrix products of one token's score, in MACs."""
        return mlp_macs((self.sizes[0], *self.sizes))

    def forward(self, tokens: Tensor, mean: Callable[[Tensor], Tensor]) -> Tensor:
        """Scores of tokens.

        Args:
            tokens: `[..., D]`.
            mean: replaces half of the channels `[..., D/2]` by their mean over each image's alive tokens.

        Returns:
            `[..., 2]` log-probabilities.
        """
        own, shared = self.in_conv(tokens).chunk(2, dim=-1)
        return self.out_conv(torch.cat([own, mean(shared)], dim=-1)).log_softmax(dim=-1)


class DynamicViT(BasePolicy, nn.Module):
    """Keep the `int(N * keep_rate ** s)` tokens with the best predicted score at site s, N being the original number.

    There is one predictor per site, trained by `fit_dynamicvit`. Untrained predictors have random weights (from `seed`)
    and are made for the width of the first network that the policy acts on.

    Tokens are ranked by the log-odds of being kept. Their order is that of the published log-probability, which
    saturates in single precision.

    Args:
        keep_rate: fraction kept at every site, above 0 and at most 1.
        seed: of the initial weights.
        embed_dim: D; None: that of the first network that it acts on.
        sites: where it acts, one predictor each; None: the backbone's own sites.
    """

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
        self.score_predictor = nn.ModuleList()
        if embed_dim is not None:
            embed_dim = whole_number("embed_dim", embed_dim)
            if self.sites is None:
                raise ValueError(f"sites: expected as many as there are predictors beside embed_dim={embed_dim}")
            self.build(embed_dim, len(self.sites))

    def build(self, embed_dim: int, num_sites: int) -> None:
        """Make fresh predictors, from the seed; the global random state is left alone.

        Args:
            embed_dim: D.
            num_sites: T.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.score_predictor = nn.ModuleList(ScorePredictor(embed_dim) for _ in range(num_sites))

    def default_sites(self, depth: int) -> Sequence[int | str | Site] | None:
        """The sites it was made for; None, the backbone's own, if it was made for none (3, 6, 9 of 12 in the paper)."""
        return self.sites

    def predictor(self, step: int, num_steps: int, like: Tensor) -> ScorePredictor:
        """The predictor of one step of the game.

        Args:
            step: from 0.
            num_steps: T.
            like: tokens `[..., D]` to score, for their width, type and device.

        Raises:
            SiteError: for more or fewer sites than predictors.
            ValueError: for tokens of another width.
            TypeError: for tokens of another precision.
        """
        if not self.score_predictor:
            self.build(like.shape[-1], num_steps)
            self.score_predictor.to(like)
        if len(self.score_predictor) != num_steps:
            raise SiteError(f"sites: DynamicViT has predictors for {len(self.score_predictor)} sites, got {num_steps}")
        module = self.score_predictor[step]
        assert isinstance(module, ScorePredictor)
        if module.sizes[0] != like.shape[-1]:
            raise ValueError(f"tokens: DynamicViT was made for width {module.sizes[0]}, got {like.shape[-1]}")
        check_precision(module, like)
        return module

    @torch.no_grad()
    def decide(self, obs: Observation) -> Decision:
        """Score the alive tokens and keep the best."""
        predictor = self.predictor(obs.step, obs.num_steps, obs.tokens)

        def mean(values: Tensor) -> Tensor:
            return segment_mean(values, obs.image, obs.batch_size)[obs.image]

        scores = predictor(obs.tokens, mean)
        count = self.count(obs.step, obs.num_agents)
        # If no token is to stay, a network without prefix tokens keeps one, so that the number is unknown here.
        known = None if obs.count is None else min(count, obs.count) or None
        keep = keep_top(obs, scores[:, 0] - scores[:, 1], torch.full_like(obs.num_alive, count))
        macs = obs.num_alive.double() * predictor.macs_per_token
        return Decision(keep=keep, macs=macs, count=known)

    def count(self, step: int, num_agents: int) -> int:
        """Tokens that stay at a step (from 0), of `num_agents` before the first."""
        return int(num_agents * self.keep_rate ** (step + 1))

    def at(self, value: float) -> Self:
        """The same policy at another keep rate; the predictors are shared."""
        other = type(self)(value, self.seed, sites=self.sites)
        other.score_predictor = self.score_predictor
        return other.train(self.training)

    def load_published(self, state: Mapping[str, Any]) -> Self:
        """Load the predictors from a checkpoint of the authors' code.

        Args:
            state: parameters by name, or the whole file, which has them under `"model"`. Names that contain
                `score_predictor.0.in_conv...` and so on are read, with any prefix; all others are ignored.

        Raises:
            CheckpointError: for parameters that are missing or of other shapes.
        """
        state = state.get("model", state)
        named = {f"score_predictor.{key.split('score_predictor.', 1)[1]}": value for key, value in state.items()
                 if "score_predictor." in key}  # fmt: skip
        steps = {int(key.split(".")[1]) for key in named}
        first = named.get("score_predictor.0.in_conv.1.weight")
        if first is None:
            raise CheckpointError("state: expected DynamicViT's score_predictor.<site>.in_conv..., found none")
        self.build(first.shape[0], len(steps))
        try:
            self.load_state_dict(named)
        except RuntimeError as error:
            raise CheckpointError(f"state: predictors that do not fit together ({error})") from error
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Tensor], prefix: str, *args: Any, **options: Any) -> None:
        """Make predictors for the weights in `state_dict` if there are none yet."""
        own = f"{prefix}score_predictor."
        first = state_dict.get(f"{own}0.in_conv.1.weight")
        if first is not None and not self.score_predictor:
            self.build(len(first), len({key[len(own) :].split(".")[0] for key in state_dict if key.startswith(own)}))
        super()._load_from_state_dict(state_dict, prefix, *args, **options)

    def config(self) -> dict[str, Any]:
        """Settings for `from_config`, as JSON values; the weights are not among them."""
        width = next((module.sizes[0] for module in self.modules() if isinstance(module, ScorePredictor)), None)
        sites = None if self.sites is None else [site.label for site in self.sites]
        return {"keep_rate": self.keep_rate, "seed": self.seed, "sites": sites,
                "built": [width, len(self.score_predictor)]}  # fmt: skip

    @classmethod
    def from_config(cls, built: Sequence[Any], **settings: Any) -> Self:
        """Build the policy from its `config()`, with untrained weights."""
        policy = cls(**settings)
        if built[1]:
            policy.build(*built)
        return policy
