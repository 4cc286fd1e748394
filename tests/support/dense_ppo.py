"""What the update is compared with: plain PPO over the dense table of all agent-steps, the dead masked out.

Every agent-step of `[T, B, N]` goes through both networks in one batch, the critic reads tokens and class tokens
concatenated, everything is recomputed in every epoch. Played games come from `masked_play`, or from packed play.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from vitprune_env.agents.learners.advantage import generalized_advantage
from vitprune_env.agents.networks import TokenActor, TokenCritic
from vitprune_env.game.token_game import TokenGame
from vitprune_env.types import Episode, Step


@dataclass(frozen=True)
class DenseGames:
    """A batch of games as tables over all agent-steps."""

    tokens: Tensor  # [T, B, N, D]
    cls: Tensor  # [T, B, D]
    keep: Tensor  # [T, B, N] bool
    log_prob: Tensor  # [T, B, N]
    reward: Tensor  # [T, B, N]
    alive: Tensor  # [T, B, N] bool
    terminated: Tensor  # [T, B, N] bool

    @classmethod
    def of(cls, episode: Episode, log_probs: list[Tensor]) -> DenseGames:
        """Spread packed play over the tables."""
        assert episode.reward is not None
        seen = episode.observations
        return cls(
            tokens=torch.stack([obs.dense() for obs in seen]),
            cls=torch.stack([obs.cls for obs in seen]),
            keep=episode.keep,
            log_prob=torch.stack([obs.scatter(rows) for obs, rows in zip(seen, log_probs, strict=True)]),
            reward=episode.reward,
            alive=episode.alive,
            terminated=episode.terminated,
        )


class JoinedCritic(nn.Module):
    """The critic as it is usually written: one first layer on token and class token side by side."""

    def __init__(self, critic: TokenCritic) -> None:
        super().__init__()
        self.norm_token, self.norm_image = copy.deepcopy(critic.norm_token), copy.deepcopy(critic.norm_image)
        self.first = nn.Linear(2 * critic.embed_dim, critic.hidden[0])
        with torch.no_grad():
            self.first.weight.copy_(torch.cat([critic.token.weight, critic.image.weight], dim=1))
            self.first.bias.copy_(critic.token.bias)
        self.rest = copy.deepcopy(critic.layers)

    def forward(self, joined: Tensor) -> Tensor:
        """`[..., 2 D]` to values `[...]`."""
        token, image = joined.chunk(2, dim=-1)
        hidden = self.first(torch.cat([self.norm_token(token), self.norm_image(image)], dim=-1))
        return self.rest(torch.relu(hidden)).squeeze(-1)

    def gradients_like(self, critic: TokenCritic) -> list[Tensor]:
        """The gradients in the sequence of `critic.parameters()`."""
        own = {name: cast(Tensor, parameter.grad) for name, parameter in self.named_parameters()}
        weight = own["first.weight"]
        split = {
            "token.weight": weight[:, : critic.embed_dim],
            "token.bias": own["first.bias"],
            "image.weight": weight[:, critic.embed_dim :],
        }
        names = [name for name, _ in critic.named_parameters()]
        return [split[name] if name in split else own[name.replace("layers.", "rest.")] for name in names]


@dataclass(frozen=True)
class Settings:
    """Of PPO; named as in `MAPPO`."""

    clip: float = 0.2
    value_clip: float = 0.2
    vf_coef: float = 0.5
    ent_coef: float = 0.01
    max_grad_norm: float = 0.5
    gamma: float = 1.0
    gae_lambda: float = 0.95

    def for_mappo(self) -> dict[str, Any]:
        """As arguments of `MAPPO`."""
        return dict(vars(self))


class DensePPO:
    """Full-batch PPO on dense tables, with its own copies of the networks."""

    def __init__(self, actor: TokenActor, critic: TokenCritic, lr: float, settings: Settings) -> None:
        self.actor, self.critic = copy.deepcopy(actor), JoinedCritic(critic)
        self.parameters = [*self.actor.parameters(), *self.critic.parameters()]
        self.optimizer = torch.optim.Adam(self.parameters, lr=lr, eps=1e-5)
        self.settings = settings

    def update(self, games: DenseGames, epochs: int) -> None:
        """So many gradient steps; the last gradient (clipped) stays in the parameters."""
        s, alive = self.settings, games.alive
        count = alive.sum()
        joined = torch.cat([games.tokens, games.cls[:, :, None].expand_as(games.tokens)], dim=-1)
        with torch.no_grad():
            old = self.critic(joined)
            advantage = generalized_advantage(games.reward, old, alive, games.terminated, s.gamma, s.gae_lambda)
            target = advantage + old
            mean = (advantage * alive).sum() / count
            deviation = (((advantage - mean) * alive).square().sum() / (count - 1)).sqrt()
            advantage = (advantage - mean) / (deviation + 1e-8)
        for _ in range(epochs):
            log = self.actor(games.tokens).log_softmax(dim=-1)
            chosen = torch.where(games.keep, log[..., 1], log[..., 0])
            ratio = (chosen - games.log_prob).exp()
            gain = torch.min(ratio * advantage, ratio.clamp(1 - s.clip, 1 + s.clip) * advantage)
            value = self.critic(joined)
            near = old + (value - old).clamp(-s.value_clip, s.value_clip)
            error = torch.max((value - target).square(), (near - target).square())
            entropy = -(log.exp() * log).sum(dim=-1)
            loss = (alive * (s.vf_coef * error - gain - s.ent_coef * entropy)).sum() / count
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.parameters, s.max_grad_norm)
            self.optimizer.step()


@torch.no_grad()
def masked_play(
    game: TokenGame, actor: TokenActor, images: Tensor, labels: Tensor, generator: torch.Generator
) -> DenseGames:
    """Games in which nobody is removed: the pruned are hidden as keys of attention, and the actor looks at them too.

    Sites must lie after whole blocks, and the model must have a class token.
    """
    backbone = game.backbone
    prefix, sites = backbone.num_prefix, {site.block: site for site in game.sites}
    assert prefix
    assert not any(site.inside for site in game.sites)
    x = backbone.embed(images).x.view(len(images), -1, backbone.embed_dim)
    alive = torch.ones(len(images), backbone.num_patches, dtype=torch.bool)
    mask: Tensor | None = None
    bounds = [*(site.half for site in game.sites), 2 * backbone.depth]
    rows: list[dict[str, Tensor]] = []
    steps: list[Step] = []
    for number in range(1, backbone.depth + 1):
        x = cast(Any, backbone.block(number))(x, attn_mask=mask)
        if number in sites:
            tokens, cls = x[:, prefix:], x[:, 0]
            log = actor(tokens).log_softmax(dim=-1)
            wants = torch.rand(alive.shape, generator=generator) < log[..., 1].exp()
            keep = alive & wants
            chosen = torch.where(wants, log[..., 1], log[..., 0])
            share = (bounds[len(steps) + 1] - bounds[len(steps)]) / bounds[-1]
            steps.append(Step(site=sites[number], acted=alive, kept=keep, share=share))
            rows.append({"tokens": tokens, "cls": cls, "keep": keep, "log_prob": chosen, "alive": alive})
            alive = keep
            there = torch.cat([alive.new_ones(len(alive), prefix), alive], dim=1)
            mask = torch.zeros(there.shape).masked_fill(~there, float("-inf"))[:, None, None]
    model: Any = backbone.model
    logits = model.forward_head(model.norm(x[:, :prefix]))
    assert game.reward is not None
    reward = torch.stack([game.reward.immediate(step) for step in steps])
    reward = reward + game.reward.deferred(steps, game.reward.score(logits, labels))
    table = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    terminated = table["alive"] & ~table["keep"]
    terminated[-1] = table["alive"][-1]
    return DenseGames(reward=reward * table["alive"], terminated=terminated, **table)
