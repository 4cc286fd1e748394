"""The update: equality with tianshou's stock PPO (law 9), learning, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Discrete
from tianshou.algorithm import PPO
from tianshou.algorithm.modelfree.reinforce import DiscreteActorPolicy
from tianshou.algorithm.optim import AdamOptimizerFactory
from tianshou.data import Batch, ReplayBuffer
from tianshou.utils.torch_utils import policy_within_training_step
from torch import Tensor, nn

from games import OwnLabels, Teacher, explored, toy_game
from vitprune_env.agents.learners.buffer import GameBuffer, Trajectory, context_width
from vitprune_env.agents.learners.exploration import ExploringPolicy
from vitprune_env.agents.learners.learner import LinearDecay
from vitprune_env.agents.learners.mappo import MAPPO, MAPPOStats
from vitprune_env.agents.learners.value_norm import ValueNorm
from vitprune_env.agents.networks import TokenActor, TokenCritic
from vitprune_env.agents.policies import TokenPolicy
from vitprune_env.agents.senses import needed, see
from vitprune_env.errors import NumericalError
from vitprune_env.game.rollout import play
from vitprune_env.types import Episode, Observation

DIM = 48


SENSES = ("neighbours", "crowd", "class_attention")


def networks(context: int = 0, senses: tuple[str, ...] = ()) -> tuple[TokenActor, TokenCritic]:
    critic = TokenCritic(DIM, (32, 16), context=context, senses=senses)
    if critic.context is not None:
        nn.init.normal_(critic.context.weight, std=0.2, generator=torch.Generator().manual_seed(4))
    return TokenActor(DIM, (16,), senses=senses), critic


def update(algorithm: Any, buffer: ReplayBuffer, batch_size: int | None = 64, repeat: int = 2) -> Any:
    with policy_within_training_step(algorithm.policy):
        return algorithm.update(buffer, batch_size, repeat)


def buffer_of(rows: Trajectory) -> GameBuffer:
    buffer = GameBuffer()
    buffer.store(rows)
    return buffer


# Law 9


class StockActor(nn.Module):
    def __init__(self, actor: TokenActor) -> None:
        super().__init__()
        self.actor = actor

    def forward(self, obs: Any, state: Any = None, info: Any = None) -> tuple[Tensor, Any]:
        return self.actor(torch.as_tensor(obs)[:, : self.actor.width]), state


class StockCritic(nn.Module):
    def __init__(self, critic: TokenCritic) -> None:
        super().__init__()
        self.critic = critic

    def forward(self, obs: Any) -> Tensor:
        obs = torch.as_tensor(obs)
        width = self.critic.width
        return self.critic(obs[:, :width], obs[:, width:], torch.arange(len(obs)))[:, None]


def context_of(obs: Observation) -> Tensor:
    """What a critic is told of an image beside the class token, worked out image by image, `[B, DIM + 2]`."""
    lines = []
    for alive, tokens in zip(obs.alive, obs.dense(), strict=True):
        mean = tokens[alive].mean(dim=0) if alive.any() else torch.zeros(DIM)
        mean = (mean - mean.mean()) / (mean.var(unbiased=False) + 1e-5).sqrt()
        lines.append(torch.cat([mean, alive.float().mean()[None], torch.tensor([obs.step / (obs.num_steps - 1)])]))
    return torch.stack(lines)


def stock_buffer(episode: Episode, told: bool = False, senses: tuple[str, ...] = ()) -> ReplayBuffer:
    """The episode's lanes, one `add` per agent-step, in tianshou's own buffer."""
    assert episode.reward is not None
    steps, batch, agents = episode.alive.shape
    of_image = [torch.cat([o.cls, context_of(o)], dim=1) if told else o.cls for o in episode.observations]
    seen = [
        torch.cat([see(o, senses).dense(), image[:, None].expand(-1, agents, -1)], dim=2).numpy()
        for o, image in zip(episode.observations, of_image, strict=True)
    ]
    buffer = ReplayBuffer(size=int(episode.alive.sum()))
    for image in range(batch):
        for agent in range(agents):
            for step in range(steps):
                if episode.alive[step, image, agent]:
                    done = step == steps - 1 or not bool(episode.keep[step, image, agent])
                    row = Batch(
                        obs=seen[step][image, agent],
                        act=int(episode.keep[step, image, agent]),
                        rew=float(episode.reward[step, image, agent]),
                        terminated=done,
                        truncated=False,
                        obs_next=seen[step if done else step + 1][image, agent],
                        info={},
                    )
                    buffer.add(row)  # pyright: ignore[reportArgumentType]
    return buffer


VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # ours, stock
    "default": ({"value_clip": None}, {}),
    "value_clip": ({"value_clip": 0.2}, {"value_clip": True}),
    "narrow": ({"value_clip": 0.05, "clip": 0.05}, {"value_clip": True, "eps_clip": 0.05}),
    "dual_clip": ({"value_clip": None, "dual_clip": 1.2}, {"dual_clip": 1.2}),
    "raw_advantages": ({"value_clip": None, "advantage_normalization": False}, {"advantage_normalization": False}),
    "recompute": ({"value_clip": None, "recompute_advantage": True}, {"recompute_advantage": True}),
    "discounted": ({"value_clip": None, "gamma": 0.7, "gae_lambda": 0.5}, {"gamma": 0.7, "gae_lambda": 0.5}),
    "entropy": ({"value_clip": None, "ent_coef": 0.1, "vf_coef": 1.0}, {"ent_coef": 0.1, "vf_coef": 1.0}),
    "unbounded": ({"value_clip": None, "max_grad_norm": None}, {"max_grad_norm": None}),
}
FURTHER = [name for name in VARIANTS if name not in ("default", "value_clip", "discounted")]


@pytest.mark.parametrize(
    ("variant", "told", "senses"),
    [
        *((variant, False, ()) for variant in ("default", "value_clip", "discounted")),
        *(pytest.param(variant, False, (), marks=pytest.mark.slow) for variant in FURTHER),
        ("default", True, ()),
        ("default", False, SENSES),
    ],
)
def test_update_equals_stock_ppo(
    variant: str, told: bool, senses: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = VARIANTS[variant]
    actor, critic = networks(context_width(DIM) if told else 0, senses)
    initial = copy.deepcopy(actor), copy.deepcopy(critic)
    optim = {"lr": 3e-3, "eps": 1e-5}
    mappo = MAPPO(
        actor=actor,
        critic=critic,
        optim=AdamOptimizerFactory(**optim),
        generator=torch.Generator().manual_seed(9),
        **ours,
    )
    twin_actor, twin_critic = copy.deepcopy(initial)
    stock = PPO(
        policy=DiscreteActorPolicy(actor=StockActor(twin_actor), action_space=Discrete(2)),  # pyright: ignore
        critic=StockCritic(twin_critic),
        optim=AdamOptimizerFactory(**optim),
        **{"max_grad_norm": 0.5, "gamma": 1.0, "gae_lambda": 0.95, "ent_coef": 0.0, **theirs},
    )
    shuffle = torch.Generator().manual_seed(9)
    monkeypatch.setattr(np.random, "permutation", lambda n: torch.randperm(n, generator=shuffle).numpy())
    for seed in range(2):
        episode, rows = explored(toy_game(needed(senses)), actor, seed)
        mine = update(mappo, buffer_of(rows))
        other = update(stock, stock_buffer(episode, told, senses))
        assert mine.gradient_steps == other.gradient_steps > 4
        assert mine.loss.mean == pytest.approx(other.loss.mean, abs=1e-6)
        for net, twin, start in ((actor, twin_actor, initial[0]), (critic, twin_critic, initial[1])):
            one, two, first = (nn.utils.parameters_to_vector(module.parameters()) for module in (net, twin, start))
            assert torch.allclose(one, two, atol=1e-6, rtol=0)
            assert (one - first).abs().mean() > 1e-3


@pytest.mark.parametrize(("length", "size"), [(10, 4), (8, 4), (3, 4), (9, 4), (5, None), (4, 1)])
def test_minibatches_are_split_as_tianshou_splits(length: int, size: int | None) -> None:
    mappo = MAPPO(actor=networks()[0], critic=networks()[1])
    rows = list(mappo._minibatches(length, size))
    theirs = [len(part) for part in Batch(x=np.arange(length)).split(size or -1, merge_last=True)]
    assert [len(part) for part in rows] == theirs
    assert torch.cat(rows).sort().values.tolist() == list(range(length))


# Extras


def test_dead_agents_do_not_matter() -> None:
    """What a table holds where nobody acted changes nothing."""
    _, rows = explored(toy_game(), TokenActor(DIM), seed=0)
    results = []
    for junk in (0.0, 1e3):
        mappo = MAPPO(actor=networks()[0], critic=networks()[1])
        noisy = rows.reward + junk * ~rows.alive
        update(mappo, buffer_of(Trajectory(**{**vars(rows), "reward": noisy})))
        results.append(torch.cat([p.flatten() for p in mappo.actor.parameters()]))
    assert torch.equal(results[0], results[1])


def test_first_epoch_starts_at_ratio_one() -> None:
    actor, critic = networks()
    _, rows = explored(toy_game(), actor, seed=0)
    stats = update(MAPPO(actor=actor, critic=critic), buffer_of(rows), batch_size=None, repeat=1)
    assert isinstance(stats, MAPPOStats)
    assert stats.approx_kl == pytest.approx(0.0, abs=1e-6)
    assert stats.clip_frac == 0.0
    assert stats.gradient_steps == 1


def test_value_normalisation_matches_running_moments() -> None:
    norm = ValueNorm(decay=0.9)
    assert norm.normalize(torch.tensor([3.0])).item() == 3.0
    norm.update(torch.tensor([1.0, 3.0]))
    assert norm.normalize(torch.tensor([1.0, 3.0])).tolist() == pytest.approx([-1.0, 1.0], abs=1e-5)
    norm.update(torch.tensor([5.0, 5.0]))
    # weights .09 and .1 of the means 2, 5 and the squares 5, 25
    mean, square = (0.09 * 2 + 0.1 * 5) / 0.19, (0.09 * 5 + 0.1 * 25) / 0.19
    expected = (4.0 - mean) / (square - mean**2) ** 0.5
    assert norm.normalize(torch.tensor([4.0])).item() == pytest.approx(expected, abs=1e-4)
    values = torch.randn(5)
    assert torch.allclose(norm.denormalize(norm.normalize(values)), values, atol=1e-6)


def test_value_normalisation_makes_small_rewards_like_large_ones() -> None:
    """Where the reference clamps the variance at 1e-2, rewards of a thousandth would be lost."""
    norm = ValueNorm()
    norm.update(torch.tensor([0.005, 0.016]))
    assert norm.normalize(torch.tensor([0.005, 0.016])).tolist() == pytest.approx([-1.0, 1.0], abs=1e-2)


def test_value_normalisation_leaves_advantages_in_units_of_reward() -> None:
    """A critic that says the same in other units changes no advantage; its targets are in its own units."""
    _, rows = explored(toy_game(), TokenActor(DIM), seed=0)
    plain, scaled = networks()[1], networks()[1]
    one = MAPPO(actor=networks()[0], critic=plain)
    two = MAPPO(actor=networks()[0], critic=scaled, value_norm=True)
    assert two.value_norm is not None
    two.value_norm.update(torch.tensor([2.0, 6.0]))  # mean 4, deviation 2
    last: Any = scaled.layers[-1]
    with torch.no_grad():  # v -> (v - 4) / 2
        last.weight.div_(2)
        last.bias.sub_(4).div_(2)
    results: list[Any] = []
    for mappo in (one, two):
        buffer = buffer_of(rows)
        results.append(mappo._preprocess_batch(*buffer.sample(0)[:1], buffer, np.arange(len(rows))))
    assert torch.allclose(results[0].adv, results[1].adv, atol=1e-4)
    back = two.value_norm.denormalize(results[1].returns)
    assert torch.allclose(back, results[0].returns, atol=1e-4)
    assert not torch.allclose(results[1].returns, results[0].returns, atol=0.1)


def test_teacher_is_understood() -> None:
    """Sixteen updates suffice to keep what pays and prune what costs."""
    game = toy_game()
    data = OwnLabels(12)
    quiet = 0.1 * data.images  # tokens are then told apart by their position
    left = torch.arange(25) % 5 < 2
    game.reward = Teacher(left)  # pyright: ignore[reportAttributeAccessIssue]
    actor, critic = TokenActor(DIM, (32,)), TokenCritic(DIM, (32,))
    mappo = MAPPO(actor=actor, critic=critic, optim=AdamOptimizerFactory(lr=5e-3), huber_delta=10.0, value_norm=True)
    for seed in range(16):
        explorer = ExploringPolicy(actor, torch.Generator().manual_seed(seed))
        episode = play(game, explorer, quiet, data.labels, record=True)
        rows = Trajectory.of(episode, explorer.actions, explorer.log_probs)
        update(mappo, buffer_of(rows), batch_size=128, repeat=3)
    keep = play(game, TokenPolicy(actor), quiet).keep
    assert keep[-1][:, left].float().mean() > 0.95
    assert keep[0][:, ~left].float().mean() < 0.05


def test_updates_leave_the_global_random_streams_alone() -> None:
    actor, critic = networks()
    _, rows = explored(toy_game(), actor, seed=0)
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002, the stream that stock PPO draws from
    before = torch.get_rng_state(), np.random.get_state()[1]  # noqa: NPY002
    update(MAPPO(actor=actor, critic=critic), buffer_of(rows))
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002


def test_learning_rate_falls_to_its_end_and_no_further() -> None:
    optimizer = torch.optim.Adam(networks()[0].parameters(), lr=1.0)
    scheduler = LinearDecay(updates=5, final=0.05).create_scheduler(optimizer)
    rates = []
    for _ in range(7):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([1.0, 0.7625, 0.525, 0.2875, 0.05, 0.05, 0.05])


def test_what_is_refused() -> None:
    actor, critic = networks()
    with pytest.raises(ValueError, match="return_scaling: expected False"):
        MAPPO(actor=actor, critic=critic, return_scaling=True)
    with pytest.raises(ValueError, match="dual_clip"):
        MAPPO(actor=actor, critic=critic, dual_clip=0.5)
    _, rows = explored(toy_game(), actor, seed=0)
    with torch.no_grad():
        next(critic.parameters()).fill_(float("nan"))
    with pytest.raises(NumericalError, match="loss: expected finite numbers, got NaN"):
        update(MAPPO(actor=actor, critic=critic), buffer_of(rows))
