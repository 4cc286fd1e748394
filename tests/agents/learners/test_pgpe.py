"""Parameter-exploring policy gradients: the disturbances, the estimated gradient, and that it raises the return."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from games import NAME, OwnLabels
from helpers import toy
from merging import random_merging
from vitprune_env.agents import PGPE, MergePolicy, PairActor, PGPEConfig, Processes, Trajectory
from vitprune_env.agents.learners.pgpe import ParameterExplorer, disturbances
from vitprune_env.envs.actions import KeepActions
from vitprune_env.errors import SettingsError
from vitprune_env.game.rewards import PaperReward, SharedOutcome, TeamOutcome
from vitprune_env.game.rollout import play
from vitprune_env.game.token_game import TokenGame


def test_disturbances_are_opposite_in_pairs_and_standard_normal() -> None:
    noise = disturbances(3, torch.arange(4000), 4, 6)
    assert noise.shape == (4000, 4, 6)
    assert torch.equal(noise[0::2], -noise[1::2])
    half = noise[0::2].double().flatten()  # 48000 numbers
    moments = [float((half**power).mean()) for power in (1, 2, 3, 4)]
    assert moments == pytest.approx([0, 1, 0, 3], abs=0.15)
    assert float((half.abs() < 1).double().mean()) == pytest.approx(0.6827, abs=0.01)
    assert abs(float(torch.corrcoef(torch.stack([noise[::2, 0, 0], noise[::2, 1, 3]]))[0, 1])) < 0.08


def test_disturbances_are_a_function_of_seed_and_game() -> None:
    noise = disturbances(3, torch.arange(20), 2, 3)
    assert torch.equal(disturbances(3, torch.tensor([7, 16, 1]), 2, 3), noise[[7, 16, 1]])
    assert not torch.equal(disturbances(4, torch.arange(20), 2, 3), noise)


def test_a_game_is_disturbed_the_same_alone_or_in_a_batch() -> None:
    backbone, data = toy(NAME), OwnLabels(6)
    policy = random_merging(backbone)
    game = TokenGame.for_policy(backbone, policy)
    explorer = ParameterExplorer(policy.actor, torch.Generator().manual_seed(3), 2.0)
    explorer.next_game = 10
    together = play(game, explorer, data.images).keep
    assert explorer.noise is not None
    noise = explorer.noise
    for number in (4, 0):
        explorer.next_game = 10 + number
        assert torch.equal(play(game, explorer, data.images[number : number + 1]).keep[:, 0], together[:, number])
        disturbed = policy.starting_actor()
        with torch.no_grad():
            disturbed.weight.add_(noise[number, :, :-1])
            disturbed.bias.add_(noise[number, :, -1])
        deployed = MergePolicy(disturbed, sites=policy.sites)
        assert torch.equal(play(game, deployed, data.images[number : number + 1]).keep[:, 0], together[:, number])


def pgpe(actor: PairActor, played: Tensor, returns: Tensor, **settings: Any) -> PGPE:
    """The algorithm with disturbed games at hand, whose returns `[B]` are paid in two equal parts."""
    config = PGPEConfig(adam_eps=1e-8, **settings)
    start = MergePolicy(actor)
    algorithm = config.build(48, 25, 10, KeepActions(), torch.Generator().manual_seed(0), start)
    reward = torch.zeros(2, len(returns), 3)
    reward[0, :, 1] = reward[1, :, 2] = returns / 2
    nothing = torch.zeros(0)
    algorithm._games = Trajectory(
        nothing, nothing, nothing, nothing, nothing, reward, reward > 9, reward > 9, noise=played
    )
    return algorithm


def test_the_gradient_of_two_games_by_hand() -> None:
    """Returns 5 and 1 for e and -e: (5 - 1) / 2 * e / 0.5 ** 2, and its opposite is what Adam gets."""
    noise = torch.zeros(2, 1, 6)
    noise[0, 0, 2], noise[0, 0, 5] = 0.5, -0.25
    noise[1] = -noise[0]
    algorithm = pgpe(PairActor(1, 48, 5), noise, torch.tensor([5.0, 1.0]), noise=0.5)
    assert algorithm._estimated().tolist() == [-3.0]
    actor = cast(PairActor, algorithm.actor)
    weight, bias = actor.weight.grad, actor.bias.grad
    assert weight is not None
    assert bias is not None
    assert weight.tolist() == [[0, 0, -4.0, 0, 0]]
    assert bias.tolist() == [2.0]


def test_the_gradient_of_a_linear_return_is_its_slope() -> None:
    generator = torch.Generator().manual_seed(0)
    slope = torch.randn(3, 7, generator=generator)
    noise = 0.25 * disturbances(1, torch.arange(12_000), 3, 7)
    returns = 100.0 + (noise * slope).sum(dim=(1, 2))  # what all images have in common cancels
    algorithm = pgpe(PairActor(3, 48, 6), noise, returns + 3 * noise.square().sum(dim=(1, 2)))
    algorithm._estimated()
    actor = cast(PairActor, algorithm.actor)
    weight, bias = actor.weight.grad, actor.bias.grad
    assert weight is not None
    assert bias is not None
    torch.testing.assert_close(-weight, slope[:, :-1], atol=0.25, rtol=0)
    torch.testing.assert_close(-bias, slope[:, -1], atol=0.25, rtol=0)


@dataclass(frozen=True)
class Part(Processes):
    """One of two processes that play ten games, as far as counting games goes."""

    def span(self, count: int) -> tuple[int, int]:
        """Where its games begin does not matter here."""
        return 0, 10


def test_two_processes_add_up_to_one() -> None:
    """Also where the two games of an image are played by different ones."""
    noise, returns = disturbances(1, torch.arange(10), 1, 6), torch.arange(10.0) ** 2
    ranges = slice(10), slice(3), slice(3, 10)
    whole, one, two = (pgpe(PairActor(1, 48, 5), noise[rows], returns[rows]) for rows in ranges)
    one.processes = two.processes = Part()
    assert float(one._estimated() + two._estimated()) == pytest.approx(float(whole._estimated()))
    for mine, yours, sums in zip(one.actor.parameters(), two.actor.parameters(), whole.actor.parameters(), strict=True):
        assert mine.grad is not None
        assert yours.grad is not None
        torch.testing.assert_close(mine.grad + yours.grad, sums.grad)


def test_a_step_goes_uphill() -> None:
    slope = torch.tensor([[1.0, -2.0, 0.5, -0.1, 3.0, -1.0]])
    noise = disturbances(1, torch.arange(4000), 1, 6) * 0.25
    algorithm = pgpe(PairActor(1, 48, 5), noise, (noise * slope).sum(dim=(1, 2)), lr=0.1)
    actor = cast(PairActor, algorithm.actor)
    before = torch.cat([actor.weight, actor.bias[:, None]], dim=1).detach().clone()
    stats = algorithm._update_with_batch(None, 0, 1)  # pyright: ignore[reportArgumentType]
    after = torch.cat([actor.weight, actor.bias[:, None]], dim=1).detach()
    assert torch.equal((after - before).sign(), slope.sign())
    assert stats.gradient_steps == 1
    assert stats.grad_norm == pytest.approx(float(slope.norm()), rel=0.1)


def test_what_does_not_fit_is_refused_by_name() -> None:
    config = PGPEConfig()
    for start in (None, random_merging(toy(NAME)).actor):
        with pytest.raises(SettingsError, match=r"start: expected a MergePolicy, .* for PGPE, got"):
            config.check_start(start)
    for reward in (SharedOutcome(), PaperReward()):
        with pytest.raises(SettingsError, match=r"reward: expected one for a team, with a price, .* for PGPE, got"):
            config.check_reward(reward)
    config.check_reward(replace(TeamOutcome(), price=0.2))
    config.check_reward(config.default_reward())
    with pytest.raises(ValueError, match=r"noise: expected above 0, got 0\.0"):
        PGPEConfig(noise=0.0)


@pytest.mark.parametrize(("name", "value"), [("epochs", 2), ("minibatch", 64), ("minibatch", None)])
def test_settings_that_would_do_nothing_are_refused(name: str, value: int | None) -> None:
    with pytest.raises(ValueError, match=rf"{name}: expected .* \(PGPE takes one step with all games"):
        PGPEConfig(**{name: value})
