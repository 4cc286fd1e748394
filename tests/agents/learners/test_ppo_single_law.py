"""What single-agent PPO must equal: tianshou's stock PPO on joint actions, and MAPPO where there is one token."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from gymnasium.spaces import MultiBinary
from tianshou.algorithm import PPO
from tianshou.algorithm.modelfree.reinforce import ProbabilisticActorPolicy
from tianshou.algorithm.optim import AdamOptimizerFactory
from tianshou.data import Batch, ReplayBuffer
from torch import Tensor, nn
from torch.distributions import Bernoulli, Independent

from games import NAME, explored
from helpers import make_model, random_images, toy
from teams import DIM, buffer_of, networks, team_game, update
from vitprune_env.agents import MAPPO, TokenActor, TokenCritic
from vitprune_env.agents.learners.buffer import Trajectory
from vitprune_env.agents.learners.exploration import ExploringPolicy
from vitprune_env.agents.learners.ppo_single import ImageCritic, PPOSingle
from vitprune_env.engine.backbone import Backbone
from vitprune_env.game.rewards import SharedOutcome, TeamOutcome, log_probability
from vitprune_env.game.rollout import play
from vitprune_env.game.token_game import TokenGame
from vitprune_env.types import Episode

DEAD = -40.0  # log-odds at which a token is pruned for certain, without a say


# The law of MAPPO (9), for joint actions: an update equals tianshou's stock PPO on the same image-steps


class StockActor(nn.Module):
    """Rows `[N * D tokens, N alive, D class token]` to log-odds `[rows, N]`."""

    def __init__(self, actor: TokenActor, agents: int) -> None:
        super().__init__()
        self.actor, self.agents = actor, agents

    def forward(self, obs: Any, state: Any = None, info: Any = None) -> tuple[Tensor, Any]:
        obs = torch.as_tensor(obs)
        tokens, alive = obs[:, : self.agents * DIM], obs[:, self.agents * DIM : -DIM]
        log_odds = self.actor.keep_logit(tokens.reshape(-1, DIM)).view(-1, self.agents)
        return torch.where(alive > 0, log_odds, DEAD), state


class StockCritic(nn.Module):
    def __init__(self, critic: ImageCritic, agents: int) -> None:
        super().__init__()
        self.critic, self.agents = critic, agents

    def forward(self, obs: Any) -> Tensor:
        obs = torch.as_tensor(obs)
        tokens, alive = obs[:, : self.agents * DIM].view(len(obs), -1, DIM), obs[:, self.agents * DIM : -DIM]
        mean = tokens.sum(dim=1) / alive.sum(dim=1, keepdim=True).clamp(min=1)
        return self.critic(mean, obs[:, -DIM:], alive.mean(dim=1))[:, None]


def stock_buffer(episode: Episode) -> ReplayBuffer:
    """One lane per image, one `add` per joint action."""
    assert episode.reward is not None
    steps, batch, _ = episode.alive.shape
    parts = [(o.dense().flatten(1), o.alive.float(), o.cls) for o in episode.observations]
    seen = [torch.cat(part, dim=1).numpy() for part in parts]
    buffer = ReplayBuffer(size=steps * batch)
    for image in range(batch):
        for step in range(steps):
            last = step == steps - 1
            row = Batch(
                obs=seen[step][image],
                act=episode.keep[step, image].float().numpy(),
                rew=float(episode.reward[step, image].sum()),
                terminated=last,
                truncated=False,
                obs_next=seen[step if last else step + 1][image],
                info={},
            )
            buffer.add(row)  # pyright: ignore[reportArgumentType]
    return buffer


VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # ours, stock
    "default": ({"value_clip": None}, {}),
    "value_clip": ({"value_clip": 0.2}, {"value_clip": True}),
    "dual_clip": ({"value_clip": None, "dual_clip": 1.2}, {"dual_clip": 1.2}),
    "raw_advantages": ({"value_clip": None, "advantage_normalization": False}, {"advantage_normalization": False}),
    "recompute": ({"value_clip": None, "recompute_advantage": True}, {"recompute_advantage": True}),
    "discounted": ({"value_clip": None, "gamma": 0.7, "gae_lambda": 0.5}, {"gamma": 0.7, "gae_lambda": 0.5}),
    "entropy": ({"value_clip": None, "ent_coef": 0.1, "vf_coef": 1.0}, {"ent_coef": 0.1, "vf_coef": 1.0}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_update_equals_stock_ppo(variant: str) -> None:
    ours, theirs = VARIANTS[variant]
    actor, critic = networks()
    twin_actor, twin_critic, start = copy.deepcopy(actor), copy.deepcopy(critic), copy.deepcopy(actor)
    optim = {"lr": 3e-3, "eps": 1e-5}
    single = PPOSingle(actor=actor, critic=critic, optim=AdamOptimizerFactory(**optim), **ours)
    agents = toy(NAME).num_patches
    stock = PPO(
        policy=ProbabilisticActorPolicy(
            actor=StockActor(twin_actor, agents),  # pyright: ignore[reportArgumentType]
            dist_fn=lambda log_odds: Independent(Bernoulli(logits=log_odds), 1),  # pyright: ignore[reportArgumentType]
            action_space=MultiBinary(agents),
            action_scaling=False,
        ),
        critic=StockCritic(twin_critic, agents),
        optim=AdamOptimizerFactory(**optim),
        **{"max_grad_norm": 0.5, "gamma": 1.0, "gae_lambda": 0.95, "ent_coef": 0.0, **theirs},
    )
    for seed in range(3):
        episode, rows = explored(team_game(), actor, seed)
        mine = update(single, buffer_of(rows), repeat=2)
        other = update(stock, stock_buffer(episode), repeat=2)
        assert mine.gradient_steps == other.gradient_steps == 2
        assert mine.loss.mean == pytest.approx(other.loss.mean, abs=2e-5)
        for net, twin in ((actor, twin_actor), (critic, twin_critic)):
            one, two = (nn.utils.parameters_to_vector(module.parameters()) for module in (net, twin))
            assert torch.allclose(one, two, atol=2e-5, rtol=0)
    moved = nn.utils.parameters_to_vector(actor.parameters()) - nn.utils.parameters_to_vector(start.parameters())
    assert moved.abs().mean() > 1e-3


def test_with_one_token_and_one_step_it_is_mappo() -> None:
    """There is nobody to share ratio, credit or value with, so both make the same updates."""
    backbone = Backbone(make_model(NAME, img_size=8), name="one token")
    assert backbone.num_patches == 1
    images, labels = random_images(backbone, 24), torch.arange(24) % backbone.num_classes
    actors, critics = [TokenActor(DIM, (16,)) for _ in range(2)], (ImageCritic(DIM, (32,)), TokenCritic(DIM, (32,)))
    critics[0].left.requires_grad_(False)  # all that it has beyond MAPPO's critic
    algorithms = (
        PPOSingle(actor=actors[0], critic=critics[0], ent_coef=0.1),
        MAPPO(actor=actors[1], critic=critics[1], ent_coef=0.1),
    )
    rewards = (TeamOutcome(0.3, log_probability), SharedOutcome(0.3, log_probability))
    for seed in range(4):
        for actor, algorithm, reward in zip(actors, algorithms, rewards, strict=True):
            explorer = ExploringPolicy(actor, torch.Generator().manual_seed(seed))
            episode = play(TokenGame(backbone, (2,), reward=reward), explorer, images, labels, record=True)
            rows = Trajectory.of(episode, explorer.actions, explorer.log_probs)
            update(algorithm, buffer_of(rows), batch_size=6, repeat=2)
        for one, other in ((actors[0], actors[1]), (critics[0].mean, critics[1])):
            a, b = (nn.utils.parameters_to_vector(module.parameters()) for module in (one, other))
            assert torch.allclose(a, b, atol=1e-6, rtol=0)
    moved = nn.utils.parameters_to_vector(critics[1].parameters())
    assert not torch.allclose(moved, nn.utils.parameters_to_vector(TokenCritic(DIM, (32,)).parameters()), atol=1e-3)
