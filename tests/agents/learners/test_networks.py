"""Actor, critic and the learnt policy."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from games import keep_entropy, keep_log_prob
from helpers import random_images, toy
from vitprune_env.agents.learners.buffer import context_width
from vitprune_env.agents.learners.exploration import ExploringPolicy
from vitprune_env.agents.learners.mappo import MAPPOConfig
from vitprune_env.agents.learners.ppo_single import ImageCritic, PPOSingleConfig
from vitprune_env.agents.networks import (
    LightNetworks,
    PaperNetworks,
    TokenActor,
    TokenCritic,
    light_sizes,
    paper_sizes,
)
from vitprune_env.agents.policies import TokenPolicy
from vitprune_env.game.rollout import play
from vitprune_env.game.token_game import TokenGame

DIM = 12


def rows(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, DIM, generator=torch.Generator().manual_seed(seed))


def loud_actor(embed_dim: int) -> TokenActor:
    """An actor whose decisions vary between tokens, which a fresh one's hardly do."""
    actor = TokenActor(embed_dim, (16,), keep_bias=0.0)
    with torch.no_grad():
        for parameter in actor.layers[-1].parameters():
            parameter.mul_(300)
    return actor


def test_sizes_of_the_paper_are_those_printed_for_deit() -> None:
    small, base = 384, 768
    assert (small, *paper_sizes(small)) == (384, 1536, 256, 64)
    assert (2 * base, *paper_sizes(base)) == (1536, 3072, 256, 64)
    assert light_sizes(48) == (24,)


def test_actor_starts_as_nearly_the_same_coin_for_all_tokens() -> None:
    logit = TokenActor(DIM, (64, 32)).keep_logit(100 * rows(50))
    assert logit.mean().item() == pytest.approx(1.0, abs=0.02)
    assert 0 < logit.std().item() < 0.05


def test_actor_sees_direction_not_length() -> None:
    actor = TokenActor(DIM, (64,))
    assert torch.allclose(actor(rows(5)), actor(7 * rows(5)), atol=1e-4)


def test_hidden_layers_are_orthogonal_and_the_last_is_small() -> None:
    actor = TokenActor(DIM, (DIM,))
    first, last = (parameter for parameter in actor.layers.parameters() if parameter.dim() == 2)
    assert torch.allclose(first @ first.T, 2 * torch.eye(DIM), atol=1e-5)
    assert torch.allclose(last @ last.T, 1e-4 * torch.eye(2), atol=1e-8)


def test_critic_is_the_network_on_the_concatenation() -> None:
    critic = TokenCritic(DIM, (32, 16))
    tokens, cls, image = rows(40), rows(4, seed=1), torch.arange(40) % 4
    weight = torch.cat([critic.token.weight, critic.image.weight], dim=1)
    joined = torch.cat([critic.norm_token(tokens), critic.norm_image(cls)[image]], dim=1)
    expected = critic.layers(torch.relu(joined @ weight.T + critic.token.bias)).squeeze(1)
    assert torch.allclose(critic(tokens, cls, image), expected, atol=1e-5)
    assert torch.allclose(weight.T @ weight, 2 * torch.eye(2 * DIM), atol=1e-4)


def test_critic_with_context_starts_as_the_one_without() -> None:
    plain, told = TokenCritic(DIM, (32,)), TokenCritic(DIM, (32,), context=3)
    tokens, cls, context, image = rows(6), rows(2, seed=1), torch.randn(2, 3), torch.arange(6) % 2
    images = torch.cat([cls, context], dim=1)
    assert torch.equal(told(tokens, images, image), plain(tokens, cls, image))
    assert told.context is not None
    with torch.no_grad():
        told.context.weight[:, 2] = 1.0
    first = plain.token(plain.norm_token(tokens)) + plain.image(plain.norm_image(cls))[image] + context[image, 2:]
    assert torch.allclose(told(tokens, images, image), plain.layers(torch.relu(first)).squeeze(1), atol=1e-6)


def test_a_learner_starts_with_a_critic_that_values_everything_at_0() -> None:
    generator = torch.Generator().manual_seed(0)
    for config in (MAPPOConfig(), PPOSingleConfig(), MAPPOConfig(networks=PaperNetworks())):
        critic = config.critic(DIM, 2, generator)
        inner = critic.mean if isinstance(critic, ImageCritic) else critic
        assert isinstance(inner, TokenCritic)
        assert inner.context is None
        assert not any(parameter.any() for parameter in inner.layers[-1].parameters())
    told = MAPPOConfig(networks=LightNetworks(critic_context=True)).critic(DIM, 2, generator)
    assert isinstance(told, TokenCritic)
    assert told.context is not None
    assert told.context.in_features == context_width(DIM)


def test_critic_depends_on_the_class_token() -> None:
    critic = TokenCritic(DIM)
    image = torch.zeros(3, dtype=torch.int64)
    assert not torch.allclose(critic(rows(3), rows(1, 1), image), critic(rows(3), rows(1, 2), image))


def test_initial_weights_come_from_the_generator_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one, same = (TokenActor(DIM, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    other = TokenActor(DIM, generator=torch.Generator().manual_seed(6))
    TokenCritic(DIM)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(one(rows(4)), same(rows(4)))
    assert not torch.equal(one(rows(4)), other(rows(4)))


def test_log_probability_and_entropy_of_a_coin() -> None:
    logit = torch.tensor([1.0, 1.0, 4.0]).log()  # the odds
    keep = torch.tensor([True, False, False])
    assert keep_log_prob(logit, keep).exp().tolist() == pytest.approx([0.5, 0.5, 0.2])
    assert keep_entropy(logit).tolist() == pytest.approx([0.693147, 0.693147, 0.500402], abs=1e-5)


@pytest.mark.parametrize("hidden", [(), (5,), (7, 3)])
def test_policy_macs_equal_the_flop_counter(hidden: tuple[int, ...]) -> None:
    backbone = toy("vit_tiny_patch16_224")
    policy = TokenPolicy(TokenActor(backbone.embed_dim, hidden))
    obs = TokenGame(backbone).reset(random_images(backbone, 4))
    with FlopCounterMode(display=False) as counter:
        decision = policy.decide(obs)
    assert decision.macs is not None
    assert decision.macs.sum().item() == counter.get_total_flops() / 2
    assert decision.macs.tolist() == [25 * policy.actor.macs_per_token] * 4


def test_a_whole_ragged_game_costs_what_the_flop_counter_says() -> None:
    backbone = toy("vit_tiny_patch16_224")
    policy = TokenPolicy(loud_actor(backbone.embed_dim))
    game, images = TokenGame(backbone), random_images(backbone, 6)
    with FlopCounterMode(display=False) as counter:
        outcome = play(game, policy, images).outcome
    assert outcome.n_kept[:, 0].unique().numel() > 2
    assert outcome.macs.sum().item() == counter.get_total_flops() / 2
    seen = outcome.n_kept[:, :-1].sum(dim=1) + backbone.num_patches
    assert outcome.policy_macs.tolist() == (seen * policy.actor.macs_per_token).tolist()


def test_greedy_policy_keeps_what_lies_above_its_threshold() -> None:
    backbone = toy("vit_tiny_patch16_224")
    obs = TokenGame(backbone).reset(random_images(backbone, 3))
    actor = loud_actor(backbone.embed_dim)
    logit = obs.scatter(actor.keep_logit(obs.tokens))
    for threshold in (-1.0, 0.0, 0.5):
        keep = TokenPolicy(actor, threshold).decide(obs).keep
        assert torch.equal(keep, logit > threshold)
        assert 0 < keep.float().mean() < 1


def test_exploration_follows_the_probabilities_and_its_generator() -> None:
    backbone = toy("vit_tiny_patch16_224")
    game, images = TokenGame(backbone), random_images(backbone, 40)
    actor = TokenActor(backbone.embed_dim, keep_bias=1.0)

    def explore(seed: int) -> tuple[torch.Tensor, ExploringPolicy]:
        policy = ExploringPolicy(actor, torch.Generator().manual_seed(seed))
        return play(game, policy, images).keep, policy

    keep, policy = explore(0)
    assert keep[0].float().mean().item() == pytest.approx(0.731, abs=0.03)
    assert torch.equal(keep, explore(0)[0])
    assert not torch.equal(keep, explore(1)[0])
    assert [len(actions) for actions in policy.actions] == [1000, int(keep[0].sum()), int(keep[1].sum())]
    obs = game.reset(images)
    expected = keep_log_prob(actor.keep_logit(obs.tokens), policy.actions[0].bool())
    assert torch.allclose(policy.log_probs[0], expected)


def test_a_policy_wants_the_sites_it_was_trained_at() -> None:
    backbone = toy("vit_tiny_patch16_224")
    policy = TokenPolicy(TokenActor(backbone.embed_dim), sites=(1, "3.attn"))
    game = TokenGame.for_policy(backbone, policy)
    assert [site.label for site in game.sites] == ["1", "3.attn"]
    assert TokenGame.for_policy(backbone, TokenPolicy(policy.actor)).sites == backbone.default_sites
