"""Which estimators of credit have the gradient of the expected outcome, by adding up all action vectors."""

from __future__ import annotations

from functools import cache
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from credit_estimators import by_attribution, by_flip, mean_field, without_others
from helpers import Fixed, keeps_to_decisions, make_model
from vitprune_env.agents.networks import TokenActor
from vitprune_env.engine.backbone import Backbone
from vitprune_env.engine.tokens import TokenState, start_state
from vitprune_env.game.credit import attribution
from vitprune_env.game.rewards import probability
from vitprune_env.game.rollout import play
from vitprune_env.game.token_game import TokenGame

AGENTS, LABEL = 4, 3


class Every:
    """A game of four tokens and two sites, played once with every vector of actions: 3^4 ways to leave or stay."""

    def __init__(self) -> None:
        backbone = Backbone(make_model("deit_tiny_patch16_224", img_size=32, depth=3)).double()
        actor = TokenActor(backbone.embed_dim, (8,)).double()
        nn.init.normal_(actor.layers[-1].weight, std=1.0, generator=torch.Generator().manual_seed(2))
        self.backbone, self.actor, self.game = backbone, actor, TokenGame(backbone, (1, 2))
        generator = torch.Generator().manual_seed(1)
        image = 2 * torch.randn(1, 3, 32, 32, generator=generator, dtype=torch.float64)
        stays = torch.tensor(list(product((0, 1, 2), repeat=AGENTS)))  # sites that each token survives
        self.count = len(stays)
        self.keep = torch.stack([stays >= 1, stays >= 2])
        one = self.game.prepare(image)
        self.start = self.copies(one, self.count)
        self.labels = torch.full((self.count,), LABEL)
        decisions = keeps_to_decisions(list(self.keep))
        episode = play(self.game, Fixed(decisions), self.start, self.labels, record=True)
        self.score = probability(episode.outcome.logits, self.labels)
        self.steps = self.game.steps
        self.alive = episode.alive
        logits = torch.stack([obs.scatter(actor.keep_logit(obs.tokens)) for obs in episode.observations])
        self.log_prob = torch.where(self.keep, logits.sigmoid().log(), (-logits).sigmoid().log()) * self.alive
        self.surprise = ((self.keep.double() - logits.sigmoid()) * self.alive).detach()
        self.chance = self.log_prob.sum(dim=(0, 2)).exp().detach()  # of every vector of actions

    @staticmethod
    def copies(one: TokenState, count: int) -> TokenState:
        x = one.x.view(1, -1, one.x.shape[1]).expand(count, -1, -1)
        return start_state(x.contiguous(), one.num_prefix, one.half)

    def gradient(self, advantage: Tensor) -> Tensor:
        """Of the actor, expected over all plays, `[P]`."""
        total = (self.chance[None, :, None] * advantage * self.log_prob).sum()
        gradients = torch.autograd.grad(total, list(self.actor.parameters()), retain_graph=True)
        return torch.cat([gradient.flatten() for gradient in gradients])

    def noise(self, advantage: Tensor) -> float:
        """Variance of the advantage over all plays, mean over the tokens at the first site."""
        mean = (self.chance[:, None] * advantage[0]).sum(dim=0)
        return float((self.chance[:, None] * (advantage[0] - mean).square()).sum(dim=0).mean())

    def coefficients(self, informed: bool) -> Tensor:
        """At average play, given the decisions at earlier sites if `informed`."""
        arguments = self.backbone, self.start, self.game.sites, self.actor, self.labels, probability
        first = mean_field(*arguments)
        return torch.stack([first[0], mean_field(*arguments, [self.keep[0]])[1]]) if informed else first


@cache
def every() -> Every:
    return Every()


@cache
def plain() -> tuple[Tensor, Tensor]:
    advantage = every().score.detach()[None, :, None].expand(2, -1, AGENTS)
    return advantage, every().gradient(advantage)


def test_all_plays_are_there_and_the_plain_gradient_is_that_of_the_expected_outcome() -> None:
    assert float(every().chance.sum()) == pytest.approx(1, abs=1e-6)
    expected = (every().log_prob.sum(dim=(0, 2)).exp() * every().score.detach()).sum()
    gradients = torch.autograd.grad(expected, list(every().actor.parameters()), retain_graph=True)
    torch.testing.assert_close(plain()[1], torch.cat([g.flatten() for g in gradients]))
    assert plain()[1].norm() > 1e-3


@pytest.mark.parametrize("informed", [False, True])
def test_derivatives_at_average_play_are_an_unbiased_control_variate(informed: bool) -> None:
    advantage = without_others(every().score.detach(), every().coefficients(informed), every().surprise)
    torch.testing.assert_close(every().gradient(advantage), plain()[1], atol=1e-8, rtol=1e-6)
    if informed:
        assert every().noise(advantage) < 0.9 * every().noise(plain()[0])


def test_derivatives_where_the_game_was_played_are_biased() -> None:
    credit = attribution(every().backbone, every().start, every().steps, every().labels, probability)
    for advantage in (
        without_others(every().score.detach(), credit, every().surprise),
        by_attribution(credit, every().surprise),
    ):
        assert (every().gradient(advantage) - plain()[1]).norm() > 0.02 * plain()[1].norm()


def test_one_flip_of_a_random_agent_is_unbiased() -> None:
    """At the last site, where an agent's choice ends its game: the flip is one of the plays that are there."""
    row = {tuple(keep.flatten().tolist()): index for index, keep in enumerate(every().keep.transpose(0, 1))}
    total = torch.zeros_like(plain()[1])
    for agent in range(AGENTS):
        flipped = torch.zeros_like(every().alive)
        flipped[1, :, agent] = every().alive[1, :, agent]
        flat = (every().keep ^ flipped).transpose(0, 1)
        other = every().score.detach()[[row[tuple(keep.flatten().tolist())] for keep in flat]]
        weight = torch.full((every().count,), float(AGENTS), dtype=torch.float64)
        advantage = by_flip(every().score.detach(), other, flipped, every().surprise, weight)
        total += every().gradient(advantage) / AGENTS
    last = plain()[0].clone()
    last[0] = 0
    torch.testing.assert_close(total, every().gradient(last), atol=1e-8, rtol=1e-6)
