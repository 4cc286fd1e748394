"""Single-agent PPO: one ratio, one advantage and one value per image and step, by hand and against stock PPO."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from tianshou.algorithm.optim import AdamOptimizerFactory
from torch import Tensor, nn
from torch.distributions import Bernoulli, Independent

import runs
from games import NAME, OwnLabels, Teacher, explored, keep_entropy, keep_log_prob, toy_game
from helpers import toy
from teams import DIM, buffer_of, networks, team_game, update
from vitprune_env.agents import PPOSingleConfig, TokenActor, TokenPolicy, train
from vitprune_env.agents.learners.buffer import Trajectory
from vitprune_env.agents.learners.exploration import ExploringPolicy
from vitprune_env.agents.learners.ppo_single import ImageCritic, PPOSingle, joint_sum
from vitprune_env.errors import NumericalError
from vitprune_env.game.rewards import PaperReward, SharedOutcome
from vitprune_env.game.rollout import play


def prepared(algorithm: PPOSingle, rows: Trajectory) -> Any:
    """The joint decisions as an update sees them."""
    buffer = buffer_of(rows)
    algorithm._preprocess_batch(*buffer.sample(0)[:1], buffer, np.arange(len(rows)))
    return algorithm._joint


# By hand


def by_hand() -> Trajectory:
    """Two images, three steps, two tokens; one token of the second image is pruned at the first step."""
    alive = torch.ones(3, 2, 2, dtype=torch.bool)
    alive[1:, 1, 0] = False
    reward = torch.tensor([[[1.0, 0.5], [0.0, 1.0]], [[1.0, 1.0], [9.0, -7.0]], [[2.0, 1.0], [0.5, 3.5]]])
    image = torch.tensor([0, 2, 4, 0, 2, 4, 1, 1, 3, 5])  # agent by agent: rows t * B + b
    action = torch.tensor([1, 1, 0, 0, 0, 1, 0, 1, 1, 0])
    tokens = torch.arange(10.0)[:, None] + torch.arange(float(DIM))
    classes = torch.arange(6.0)[:, None].expand(6, DIM)
    return Trajectory(tokens, classes, image, action, torch.full((10,), 0.5).log(), reward, alive, alive)


class Constant(ImageCritic):
    """Values known beforehand."""

    def __init__(self, values: Sequence[float]) -> None:
        super().__init__(DIM)
        self.values = torch.tensor(values)

    def forward(self, mean: Tensor, cls: Tensor, left: Tensor) -> Tensor:
        return self.values[: len(mean)] + 0 * self.left


def test_advantages_by_hand() -> None:
    critic = Constant([0.5, 1.0, 2.0, 1.0, 0.0, 3.0])  # image 0, steps 0 to 2; then image 1
    algorithm = PPOSingle(actor=TokenActor(DIM), critic=critic, gamma=0.5, gae_lambda=0.8)
    lanes = prepared(algorithm, by_hand())
    # Joint rewards: image 0: 1.5, 2, 3; image 1: 1, 2, 4. Errors of image 0: 1.5 + .5 * 1 - .5 = 1.5; 2 + .5 * 2 - 1
    # = 2; 3 - 2 = 1; of image 1: 1 + 0 - 1 = 0; 2 + .5 * 3 - 0 = 3.5; 4 - 3 = 1. Decay .4.
    expected = [1.5 + 0.4 * 2.4, 2 + 0.4, 1.0, 0.4 * 3.9, 3.5 + 0.4, 1.0]
    assert lanes.advantage.tolist() == pytest.approx(expected)
    returns = [advantage + value for advantage, value in zip(expected, critic.values.tolist(), strict=True)]
    assert lanes.target.tolist() == pytest.approx(returns)
    assert lanes.seen.left.tolist() == [1.0, 1.0, 1.0, 1.0, 0.5, 0.5]
    # Image 0 at the first step holds rows 0 and 3, image 1 at the second only row 8.
    assert lanes.seen.mean[0, 0] == 1.5
    assert lanes.seen.mean[4, 0] == 8.0
    assert lanes.seen.row.tolist() == [0, 1, 2, 0, 1, 2, 3, 3, 4, 5]
    assert lanes.seen.cls[:, 0].tolist() == [0, 2, 4, 1, 3, 5]


class Fixed(TokenActor):
    """Says what it is told, whatever it sees; tells tokens apart by their first feature."""

    def __init__(self, log_odds: Tensor) -> None:
        super().__init__(DIM)
        self.log_odds = nn.Parameter(log_odds)

    def forward(self, tokens: Tensor) -> Tensor:
        odds = self.log_odds[tokens[:, 0].long()]
        return torch.stack([torch.zeros_like(odds), odds], dim=1)


def test_joint_ratio_and_loss_by_hand() -> None:
    rows = by_hand()
    now = torch.tensor([0.6, 0.55, 0.5, 0.45, 0.5, 0.52, 0.5, 0.7, 0.3, 0.5])  # probability of keeping; 0.5 when drawn
    algorithm = PPOSingle(actor=Fixed(now.logit()), critic=Constant([0.0] * 6))
    lanes, advantage = prepared(algorithm, rows), torch.tensor([1.0, -1.0, 1.0, 2.0, 3.0, -2.0])
    _, log = algorithm._joint_loss(rows, lanes, torch.arange(6), advantage)
    # Ratio of an action: its probability now over 0.5, multiplied over the tokens of an image and step.
    ratios = [0.6 * 0.55 * 4, 0.55 * 0.5 * 4, 0.5 * 0.52 * 4, 0.5 * 0.7 * 4, 0.3 * 2, 0.5 * 2]
    assert ratios == pytest.approx([1.32, 1.1, 1.04, 1.4, 0.6, 1.0])
    # Clipped to 0.8 .. 1.2 where that is worse for the agent: the first and the fourth.
    gains = [1.2, -1.1, 1.04, 2 * 1.2, 3 * 0.6, -2.0]
    assert float(log[1]) == pytest.approx(-sum(gains) / 6, abs=1e-5)
    entropy = -(now * now.log() + (1 - now) * (1 - now).log())
    assert float(log[3]) == pytest.approx(float(entropy.sum()) / 6, abs=1e-5)
    kl = sum(ratio - 1 - np.log(ratio) for ratio in ratios) / 6
    assert float(log[4]) == pytest.approx(kl, abs=1e-5)
    assert float(log[5]) == pytest.approx(3 / 6)
    few = torch.tensor([1, 3, 5])
    _, some = algorithm._joint_loss(rows, lanes, few, advantage[few])
    assert float(some[1]) == pytest.approx(-(gains[1] + gains[3] + gains[5]) / 3, abs=1e-5)


def test_joint_sum_by_hand() -> None:
    values, row = torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([2, 0, 2, 0])
    assert joint_sum(values, row, 4).tolist() == [10.0, 0.0, 5.0, 0.0]


@pytest.mark.parametrize("chunk", [None, 60])
def test_first_gradient_is_the_joint_score_times_the_advantage(chunk: int | None) -> None:
    """At ratio 1 the gradient is the mean over joint decisions of A times that of sum_i log pi(a_i)."""
    actor, critic = networks()
    _, rows = explored(team_game(), actor, seed=0)
    algorithm = PPOSingle(actor=actor, critic=critic, vf_coef=0.0, update_chunk=chunk)
    lanes = prepared(algorithm, rows)
    total = len(lanes.advantage)
    log = algorithm._gradient(lanes, rows.cls, torch.arange(total), lanes.advantage, total)
    mine = [cast(Tensor, parameter.grad).clone() for parameter in actor.parameters()]
    assert float(log[4]) == pytest.approx(0.0, abs=1e-6)
    objective = torch.zeros(())
    for decision in range(total):
        of = lanes.seen.row == decision
        score = keep_log_prob(actor.keep_logit(rows.tokens[of]), rows.action[of].bool()).sum()
        objective = objective + lanes.advantage[decision] * score
    theirs = torch.autograd.grad(-objective / total, list(actor.parameters()))
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)
        assert other.abs().max() > 1e-4


def test_half_precision_learns_nearly_the_same() -> None:
    results = []
    for precision in ("fp32", "bf16"):
        actor, critic = networks()
        _, rows = explored(team_game(), actor, seed=0)
        stats = update(PPOSingle(actor=actor, critic=critic, precision=precision), buffer_of(rows))
        results.append((stats.loss.mean, stats.grad_norm))
        assert all(parameter.dtype == torch.float32 for parameter in actor.parameters())
    assert results[1] == pytest.approx(results[0], rel=0.05)
    assert results[1] != results[0]


# Learning


def test_teacher_is_understood() -> None:
    """Told only the sum over its tokens, it finds out which of them pay."""
    game, data = toy_game(), OwnLabels(12)
    quiet = 0.1 * data.images.repeat(8, 1, 1, 1)  # tokens are then told apart by their position
    left = torch.arange(25) % 5 < 2
    game.reward = Teacher(left)  # pyright: ignore[reportAttributeAccessIssue]
    actor, critic = TokenActor(DIM, (32,)), ImageCritic(DIM, (32,))
    single = PPOSingle(
        actor=actor, critic=critic, optim=AdamOptimizerFactory(lr=5e-3), value_norm=True, huber_delta=10.0
    )
    for seed in range(40):
        explorer = ExploringPolicy(actor, torch.Generator().manual_seed(seed))
        episode = play(game, explorer, quiet, data.labels.repeat(8), record=True)
        update(single, buffer_of(Trajectory.of(episode, explorer.actions, explorer.log_probs)), 1024, 2)
    keep = play(game, TokenPolicy(actor), quiet).keep
    assert keep[-1][:, left].float().mean() > 0.9
    assert keep[0][:, ~left].float().mean() < 0.1


def test_minibatches_are_whole_images_and_as_many_as_mappos() -> None:
    single = PPOSingle(actor=networks()[0], critic=networks()[1])
    _, rows = explored(team_game(), networks()[0], seed=0)
    assert prepared(single, rows).advantage.shape == (18,)
    groups = list(single._minibatches(18, len(rows) // 4))
    assert [len(group) for group in groups] == [5, 5, 4, 4]
    assert torch.cat(groups).sort().values.tolist() == list(range(18))
    assert [len(group) for group in single._minibatches(18, 1)] == [2] * 9
    assert [len(group) for group in single._minibatches(18, None)] == [18]
    assert update(single, buffer_of(rows), batch_size=50, repeat=2).gradient_steps == 2 * (len(rows) // 50)


def test_images_without_tokens_count_but_move_nothing() -> None:
    actor, critic = networks()
    with torch.no_grad():
        actor.last.bias.copy_(torch.tensor([0.0, -60.0]))  # everybody leaves at the first step
    _, rows = explored(team_game(), actor, seed=0)
    assert not rows.alive[1:].any()
    stats = update(PPOSingle(actor=actor, critic=critic), buffer_of(rows))
    assert np.isfinite(stats.loss.mean)
    assert stats.clip_frac == 0


TINY = replace(runs.TINY, learner=PPOSingleConfig(minibatch=256, networks=runs.TINY.learner.networks))


def test_a_run_meets_its_budget_and_resumes(tmp_path: Path) -> None:
    data, backbone = OwnLabels(64), toy(NAME)
    result = train(backbone, data, **TINY.arguments, output=tmp_path / "whole", progress=False)
    assert isinstance(result.critic, ImageCritic)
    assert 0.95 * result.target_macs < result.train_macs <= result.target_macs
    assert {"approx_kl", "clip_frac", "explained_variance", "ent_loss"} <= set(result.history[0])
    interrupted = 0

    class Power(Exception):  # noqa: N818
        pass

    class Cut(OwnLabels):
        def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
            nonlocal interrupted
            interrupted += 1
            if interrupted == 4:
                raise Power
            return super().batch(indices)

    drawn = runs.but(TINY, cache_images=0).arguments
    whole = train(backbone, data, **drawn, progress=False)
    with pytest.raises(Power):
        train(backbone, Cut(64), **drawn, output=tmp_path / "cut", progress=False)
    resumed = train(backbone, data, **drawn, output=tmp_path / "cut", progress=False, resume=True)
    for one, other in ((whole.policy.actor, resumed.policy.actor), (whole.critic, resumed.critic)):
        a, b = (nn.utils.parameters_to_vector(module.parameters()) for module in (one, other))
        assert torch.equal(a, b)
    assert whole.policy.threshold == resumed.policy.threshold


def test_what_is_refused() -> None:
    actor, critic = networks()
    with pytest.raises(ValueError, match="dual_clip"):
        PPOSingle(actor=actor, critic=critic, dual_clip=0.5)
    for reward in (PaperReward(), SharedOutcome()):
        with pytest.raises(ValueError, match=rf"reward: expected one for a team.*got {type(reward).__name__}"):
            train(toy(NAME), OwnLabels(8), learner=PPOSingleConfig(), reward=reward, progress=False)
    _, rows = explored(team_game(), actor, seed=0)
    with torch.no_grad():
        critic.left.fill_(float("nan"))
    with pytest.raises(NumericalError, match="loss: expected finite numbers, got NaN"):
        update(PPOSingle(actor=actor, critic=critic), buffer_of(rows))


def test_entropy_of_a_joint_action_is_the_sum() -> None:
    log_odds = torch.tensor([0.3, -1.0, 2.0])
    joint = Independent(Bernoulli(logits=log_odds), 1).entropy()
    assert float(joint_sum(keep_entropy(log_odds), torch.zeros(3, dtype=torch.int64), 1)) == pytest.approx(float(joint))
