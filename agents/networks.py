"""Actor and critic: small networks shared by all tokens.

The actor sees its own token, the critic the token and the class token of its image (paper 000, section III-A). Both
normalise their inputs, because the residual stream of a ViT grows from block to block.

An update looks at the same tokens again and again. `standardize` normalises them once, for both networks; what a norm
learns, its scale and shift, is folded into the layer behind it. No gradient then has to reach the tokens, which spares
the backward pass one of the two matrix products of the widest layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..engine.cost import mlp_macs

LIGHT_CRITIC = (64, 64)  # learns as well as the paper's widths, at a fraction of the update's cost
HIDDEN_GAIN = 2**0.5
ACTOR_GAIN = 0.01
# Where all hidden units of the actor are dead, tokens get the very same logit, and no threshold can keep some of them.
LEAK = 0.01


def light_sizes(embed_dim: int) -> tuple[int, ...]:
    """Hidden widths of an actor that costs about one per cent of the network it prunes."""
    return (max(1, embed_dim // 2),)


def paper_sizes(embed_dim: int) -> tuple[int, ...]:
    """Hidden widths that paper 000 prints for DeiT: the actor alone then costs 13 % of DeiT-S at three sites."""
    return (4 * embed_dim, 256, 64)


class TokenActor(nn.Module):
    """Token features to two logits, index 1 = keep.

    Starts close to a constant policy (last layer of gain 0.01) that keeps more than it prunes: at 0.5 most tokens
    would be gone at the last site before anything is learnt.

    Args:
        embed_dim: D.
        hidden: widths of the hidden layers; None: `light_sizes`.
        keep_bias: logit difference at the start, 1 means keeping 73 %.
        generator: of the initial weights; None: always the same ones.
    """

    def __init__(
        self,
        embed_dim: int,
        hidden: Sequence[int] | None = None,
        keep_bias: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.hidden = light_sizes(embed_dim) if hidden is None else tuple(hidden)
        self.norm = nn.LayerNorm(embed_dim)
        self.layers = _chain((embed_dim, *self.hidden, 2), ACTOR_GAIN, _own(generator), LEAK)
        with torch.no_grad():
            self._last.bias.copy_(torch.tensor([0.0, keep_bias]))

    @property
    def macs_per_token(self) -> int:
        """What one decision costs, in MACs."""
        return mlp_macs((self.embed_dim, *self.hidden, 2))

    def forward(self, tokens: Tensor) -> Tensor:
        """`[rows, D]` to logits `[rows, 2]`."""
        return self.layers(self.norm(tokens))

    def keep_logit(self, tokens: Tensor) -> Tensor:
        """Log-odds of keeping each token, `[rows, D]` to `[rows]`."""
        logits = self(tokens)
        return logits[:, 1] - logits[:, 0]

    def folded(self) -> tuple[Tensor, Tensor]:
        """First layer as it acts on standardised tokens: weight `[H, D]`, bias `[H]`."""
        return fold(self.norm, cast(nn.Linear, self.layers[0]))

    def keep_logit_folded(self, tokens: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """`keep_logit` of tokens `[rows, D]` that were standardised before, given what `folded` returned."""
        logits = self.layers[1:](F.linear(tokens, weight, bias))
        return logits[:, 1] - logits[:, 0]

    @property
    def _last(self) -> nn.Linear:
        last = self.layers[-1]
        assert isinstance(last, nn.Linear)
        return last


class TokenCritic(nn.Module):
    """Token and class token to a value.

    The first layer on their concatenation is written as the sum of a token part and a class-token part; the second is
    computed once per image and gathered, not once per token.

    Args:
        embed_dim: D.
        hidden: widths of the hidden layers, at least one; None: `LIGHT_CRITIC`.
        generator: of the initial weights; None: always the same ones.
    """

    def __init__(
        self, embed_dim: int, hidden: Sequence[int] | None = None, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.hidden = LIGHT_CRITIC if hidden is None else tuple(hidden)
        if not self.hidden:
            raise ValueError("hidden: expected at least one width for the critic, got none")
        generator = _own(generator)
        self.norm_token = nn.LayerNorm(embed_dim)
        self.norm_image = nn.LayerNorm(embed_dim)
        first = _linear(2 * embed_dim, self.hidden[0], HIDDEN_GAIN, generator)
        self.token = _unset(embed_dim, self.hidden[0])
        self.image = _unset(embed_dim, self.hidden[0], bias=False)
        with torch.no_grad():
            self.token.weight.copy_(first.weight[:, :embed_dim])
            self.token.bias.copy_(first.bias)
            self.image.weight.copy_(first.weight[:, embed_dim:])
        self.layers = _chain((*self.hidden, 1), 1.0, generator)

    def forward(self, tokens: Tensor, cls: Tensor, image: Tensor) -> Tensor:
        """Values of tokens.

        Args:
            tokens: `[rows, D]`.
            cls: `[G, D]`, class tokens.
            image: `[rows]` int64, the class token that belongs to each row.

        Returns:
            `[rows]`.
        """
        per_image = self.image(self.norm_image(cls)).index_select(0, image)
        return self.layers(F.relu(self.token(self.norm_token(tokens)) + per_image)).squeeze(1)

    def folded(self, cls: Tensor) -> tuple[Tensor, Tensor]:
        """First layer as it acts on standardised tokens: weight `[H, D]`, and what each image adds, `[G, H]`."""
        weight, bias = fold(self.norm_token, self.token)
        return weight, self.image(self.norm_image(cls)) + bias

    def value_folded(self, tokens: Tensor, image: Tensor, weight: Tensor, per_image: Tensor) -> Tensor:
        """`forward` for tokens `[rows, D]` that were standardised before, given what `folded` returned."""
        return self.layers(F.relu(torch.addmm(per_image.index_select(0, image), tokens, weight.T))).squeeze(1)


def standardize(tokens: Tensor) -> Tensor:
    """Every row `[rows, D]` to mean 0 and variance 1: a LayerNorm that has learnt nothing."""
    return F.layer_norm(tokens, tokens.shape[-1:])


def fold(norm: nn.LayerNorm, layer: nn.Linear) -> tuple[Tensor, Tensor]:
    """Weight and bias for which `linear(standardize(x), weight, bias)` equals `layer(norm(x))`."""
    return layer.weight * norm.weight, F.linear(norm.bias, layer.weight, layer.bias)


def keep_log_prob(logit: Tensor, keep: Tensor) -> Tensor:
    """Log-probability of the actions `keep` (bool) given the log-odds of keeping."""
    return F.logsigmoid(torch.where(keep, logit, -logit))


def keep_entropy(logit: Tensor) -> Tensor:
    """Entropy of keep-or-prune in nats, given the log-odds of keeping."""
    return F.softplus(logit) - logit * logit.sigmoid()


def _own(generator: torch.Generator | None) -> torch.Generator:
    return torch.Generator().manual_seed(0) if generator is None else generator


def _unset(inputs: int, outputs: int, bias: bool = True) -> nn.Linear:
    """A linear layer whose parameters are yet to be set; torch's own would be drawn from the global random stream."""
    return cast(nn.Linear, nn.utils.skip_init(nn.Linear, inputs, outputs, bias=bias))


def _linear(inputs: int, outputs: int, gain: float, generator: torch.Generator) -> nn.Linear:
    """A linear layer with orthogonal weights and zero bias."""
    layer = _unset(inputs, outputs)
    nn.init.orthogonal_(layer.weight, gain, generator=generator)
    nn.init.zeros_(layer.bias)
    return layer


def _chain(sizes: Sequence[int], last_gain: float, generator: torch.Generator, leak: float = 0.0) -> nn.Sequential:
    """Linear layers with ReLU between them, leaky if asked for."""
    layers: list[nn.Module] = []
    for index, (inputs, outputs) in enumerate(zip(sizes, sizes[1:], strict=False)):
        is_last = index == len(sizes) - 2
        layers.append(_linear(inputs, outputs, last_gain if is_last else HIDDEN_GAIN, generator))
        if not is_last:
            layers.append(nn.LeakyReLU(leak) if leak else nn.ReLU())
    return nn.Sequential(*layers)
