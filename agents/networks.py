"""Actor and critic: small networks shared by all tokens, and the settings objects that choose their sizes.

The actor sees its own token, the critic the token and the class token of its image (RL4EViT, section III-A), and if
asked for what `Trajectory.context` says about the image. Both normalise their inputs, because the residual stream of a
ViT grows from block to block.

An update uses the same tokens again and again. `standardize` normalises them once, for both networks. The scale and
shift that a norm learns are folded into the layer behind it. Gradients then need not reach the tokens, which saves the
backward pass one of the two matrix products of the widest layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..engine.cost import mlp_macs
from .senses import check_senses, seen_width, sensing_macs
from .shared.settings import check, check_numbers

LIGHT_CRITIC = (64, 64)  # learns as well as the widths of RL4EViT, at a fraction of the update's cost
HIDDEN_GAIN = 2**0.5
ACTOR_GAIN = 0.01
# With plain ReLU all hidden units of an actor may be dead; all tokens then get the same logit, and no threshold can
# keep some of them and prune the others.
LEAK = 0.01


def light_sizes(embed_dim: int) -> tuple[int, ...]:
    """Hidden widths of an actor that costs about one per cent of the network it prunes."""
    return (max(1, embed_dim // 2),)


def paper_sizes(embed_dim: int) -> tuple[int, ...]:
    """Hidden widths that RL4EViT prints for DeiT: the actor alone then costs 13 % of DeiT-S at three sites."""
    return (4 * embed_dim, 256, 64)


class TokenActor(nn.Module):
    """Token features to one logit per action; with two actions, index 1 = keep.

    Starts close to a constant policy (last layer of gain 0.01) that keeps more than it prunes: with probability 0.5
    most tokens would be gone at the last site before anything is learnt.

    Args:
        embed_dim: D.
        hidden: widths of the hidden layers; None: `light_sizes`.
        keep_bias: at the start, how far the logits of all other actions lie above that of action 0, which drops the
            token; 1 means keeping 73 % of the tokens if there are two actions.
        generator: of the initial weights; None: always the same ones.
        num_actions: A, actions of every agent.
        senses: names of what it sees beside a token, see `senses`; its rows then have W = `seen_width` columns.
    """

    def __init__(
        self,
        embed_dim: int,
        hidden: Sequence[int] | None = None,
        keep_bias: float = 1.0,
        generator: torch.Generator | None = None,
        num_actions: int = 2,
        senses: Sequence[str] = (),
    ) -> None:
        super().__init__()
        check_senses(senses)
        self.embed_dim = embed_dim
        self.num_actions = num_actions
        self.senses = tuple(senses)
        self.width = seen_width(self.senses, embed_dim)
        self.hidden = light_sizes(embed_dim) if hidden is None else tuple(hidden)
        self.norm = nn.LayerNorm(self.width)
        self.layers = mlp((self.width, *self.hidden, num_actions), ACTOR_GAIN, _own(generator), LEAK)
        with torch.no_grad():
            self.last.bias.copy_(torch.tensor([0.0] + [keep_bias] * (num_actions - 1)))

    @property
    def macs_per_token(self) -> int:
        """What one decision costs, in MACs; evidence not counted."""
        return sensing_macs(self.senses, self.embed_dim) + mlp_macs((self.width, *self.hidden, self.num_actions))

    def forward(self, tokens: Tensor) -> Tensor:
        """What is seen of tokens, `[rows, W]`, to logits `[rows, A]`."""
        return self.layers(self.norm(tokens))

    def keep_logit(self, tokens: Tensor) -> Tensor:
        """Log-odds of action 1 over action 0 (of keeping each token), `[rows, W]` to `[rows]`."""
        logits = self(tokens)
        return logits[:, 1] - logits[:, 0]

    def folded(self) -> tuple[Tensor, Tensor]:
        """First layer as it acts on standardised rows: weight `[H, W]`, bias `[H]`."""
        return fold(self.norm, cast(nn.Linear, self.layers[0]))

    def logits_folded(self, tokens: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """`forward` for rows `[rows, W]` that are standardised, given the result of `folded`."""
        return self.layers[1:](F.linear(tokens, weight, bias))

    def keep_logit_folded(self, tokens: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """`keep_logit` of rows `[rows, W]` that are standardised, given the result of `folded`."""
        logits = self.logits_folded(tokens, weight, bias)
        return logits[:, 1] - logits[:, 0]

    @property
    def last(self) -> nn.Linear:
        """The layer that gives the logits."""
        last = self.layers[-1]
        assert isinstance(last, nn.Linear)
        return last


class TokenCritic(nn.Module):
    """Token, class token and whatever else is known of the image to a value.

    The first layer on their concatenation is written as the sum of a token part and an image part; the second is
    computed once per image and gathered, not once per token.

    Args:
        embed_dim: D.
        hidden: widths of the hidden layers, at least one; None: `LIGHT_CRITIC`.
        generator: of the initial weights; None: always the same ones.
        context: E, how many numbers about the image follow the class token. Their weights start at 0.
        last_gain: of the last layer's weights. With 0 all values are 0 before anything is learnt; with random ones the
            first dozens of updates only unlearn them.
        senses: names of what it sees beside a token, see `senses`; its rows then have W = `seen_width` columns.
    """

    def __init__(
        self,
        embed_dim: int,
        hidden: Sequence[int] | None = None,
        generator: torch.Generator | None = None,
        context: int = 0,
        last_gain: float = 1.0,
        senses: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.width = seen_width(senses, embed_dim)
        self.hidden = LIGHT_CRITIC if hidden is None else tuple(hidden)
        if not self.hidden:
            raise ValueError("hidden: expected at least one width for the critic, got none")
        generator = _own(generator)
        self.norm_token = nn.LayerNorm(self.width)
        self.norm_image = nn.LayerNorm(embed_dim)
        first = _linear(self.width + embed_dim, self.hidden[0], HIDDEN_GAIN, generator)
        self.token = _unset(self.width, self.hidden[0])
        self.image = _unset(embed_dim, self.hidden[0], bias=False)
        with torch.no_grad():
            self.token.weight.copy_(first.weight[:, : self.width])
            self.token.bias.copy_(first.bias)
            self.image.weight.copy_(first.weight[:, self.width :])
        self.context = _unset(context, self.hidden[0], bias=False) if context else None
        if self.context is not None:
            nn.init.zeros_(self.context.weight)
        self.layers = mlp((*self.hidden, 1), last_gain, generator)

    def forward(self, tokens: Tensor, images: Tensor, image: Tensor) -> Tensor:
        """Values of tokens.

        Args:
            tokens: `[rows, W]`, what is seen of each.
            images: `[G, D + E]`, class token and context of each image.
            image: `[rows]` int64, the image that each row belongs to.

        Returns:
            `[rows]`.
        """
        per_image = self._of_images(images).index_select(0, image)
        return self.layers(F.relu(self.token(self.norm_token(tokens)) + per_image)).squeeze(1)

    def folded(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """First layer as it acts on standardised rows: weight `[H, W]`, and what each image adds, `[G, H]`."""
        weight, bias = fold(self.norm_token, self.token)
        return weight, self._of_images(images) + bias

    def value_folded(self, tokens: Tensor, image: Tensor, weight: Tensor, per_image: Tensor) -> Tensor:
        """`forward` for rows `[rows, W]` that are standardised, given the result of `folded`."""
        return self.layers(F.relu(torch.addmm(per_image.index_select(0, image), tokens, weight.T))).squeeze(1)

    def _of_images(self, images: Tensor) -> Tensor:
        """What each image adds to the first layer, `[G, H]`."""
        added = self.image(self.norm_image(images[:, : self.embed_dim]))
        return added if self.context is None else added + self.context(images[:, self.embed_dim :])


def standardize(tokens: Tensor) -> Tensor:
    """Every row `[rows, D]` to mean 0 and variance 1: a LayerNorm without scale and shift."""
    return F.layer_norm(tokens, tokens.shape[-1:])


def fold(norm: nn.LayerNorm, layer: nn.Linear) -> tuple[Tensor, Tensor]:
    """Weight and bias for which `linear(standardize(x), weight, bias)` equals `layer(norm(x))`."""
    return layer.weight * norm.weight, F.linear(norm.bias, layer.weight, layer.bias)


@dataclass(frozen=True)
class LightNetworks:
    """Small networks: an actor that costs about one per cent of the network it prunes."""

    actor_hidden: tuple[int, ...] = ()
    """Hidden widths of the actor; empty: (D / 2)."""
    critic_hidden: tuple[int, ...] = ()
    """Hidden widths of the critic, which is not deployed; empty: (64, 64)."""
    keep_bias: float = 1.0
    """Log-odds of keeping a token at the start."""

    critic_context: bool = False
    """Whether MAPPO's critic is told of the image what `Trajectory.context` holds."""
    senses: tuple[str, ...] = ()
    """What actor and critic see beside a token, by name; see `agents.senses`."""

    def __post_init__(self) -> None:
        check_numbers(self)
        check_senses(self.senses)
        for name in ("actor_hidden", "critic_hidden"):
            check(self, name, all(width >= 1 for width in getattr(self, name)), "widths of at least 1")

    def actor(self, embed_dim: int, num_actions: int, generator: torch.Generator) -> TokenActor:
        """An actor for tokens of width `embed_dim`."""
        widths = self.actor_widths(embed_dim)
        return TokenActor(embed_dim, widths, self.keep_bias, generator, num_actions, self.senses)

    def actor_widths(self, embed_dim: int) -> tuple[int, ...]:
        """Hidden widths of the actor for tokens of width `embed_dim`."""
        return self.actor_hidden or light_sizes(embed_dim)

    def critic_widths(self, embed_dim: int) -> tuple[int, ...]:
        """Hidden widths of the critic for tokens of width `embed_dim`."""
        return self.critic_hidden or LIGHT_CRITIC


@dataclass(frozen=True)
class PaperNetworks(LightNetworks):
    """Networks of the widths that RL4EViT prints for DeiT, (4 D, 256, 64), unless other ones are given."""

    actor_hidden: tuple[int, ...] = ()
    """Hidden widths of the actor; empty: (4 D, 256, 64)."""
    critic_hidden: tuple[int, ...] = ()
    """Hidden widths of the critic, which is not deployed; empty: (4 D, 256, 64)."""

    def actor_widths(self, embed_dim: int) -> tuple[int, ...]:
        """Hidden widths of the actor for tokens of width `embed_dim`."""
        return self.actor_hidden or paper_sizes(embed_dim)

    def critic_widths(self, embed_dim: int) -> tuple[int, ...]:
        """Hidden widths of the critic for tokens of width `embed_dim`."""
        return self.critic_hidden or paper_sizes(embed_dim)


def _own(generator: torch.Generator | None) -> torch.Generator:
    return torch.Generator().manual_seed(0) if generator is None else generator


def _unset(inputs: int, outputs: int, bias: bool = True) -> nn.Linear:
    """A linear layer with uninitialised parameters: torch's own initialisation draws from the global random stream."""
    return cast(nn.Linear, nn.utils.skip_init(nn.Linear, inputs, outputs, bias=bias))


def _linear(inputs: int, outputs: int, gain: float, generator: torch.Generator) -> nn.Linear:
    """A linear layer with orthogonal weights and zero bias."""
    layer = _unset(inputs, outputs)
    nn.init.orthogonal_(layer.weight, gain, generator=generator)
    nn.init.zeros_(layer.bias)
    return layer


def mlp(sizes: Sequence[int], last_gain: float, generator: torch.Generator, leak: float = 0.0) -> nn.Sequential:
    """Linear layers with ReLU between them, orthogonal weights and zero biases.

    Args:
        sizes: widths of input, hidden layers and output.
        last_gain: of the last layer's weights; those of the others have gain sqrt(2).
        generator: of the weights.
        leak: slope of the ReLU below 0.
    """
    layers: list[nn.Module] = []
    for index, (inputs, outputs) in enumerate(zip(sizes, sizes[1:], strict=False)):
        is_last = index == len(sizes) - 2
        layers.append(_linear(inputs, outputs, last_gain if is_last else HIDDEN_GAIN, generator))
        if not is_last:
            layers.append(nn.LeakyReLU(leak) if leak else nn.ReLU())
    return nn.Sequential(*layers)
