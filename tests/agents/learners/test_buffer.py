"""From games to flat agent-steps: buffer and collector."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from games import OwnLabels, explored, toy_game
from vitprune_env.agents.learners.buffer import GameBuffer, Trajectory
from vitprune_env.agents.learners.exploration import ExploringPolicy
from vitprune_env.agents.learners.mappo import MAPPO
from vitprune_env.agents.networks import TokenActor, TokenCritic
from vitprune_env.agents.runs.collector import GameCollector
from vitprune_env.errors import NumericalError
from vitprune_env.game.rollout import play

DIM = 48


def test_rows_are_the_live_agent_steps_agent_by_agent() -> None:
    episode, rows = explored(toy_game(), TokenActor(DIM), seed=0)
    assert len(rows) == int(episode.alive.sum()) < episode.alive.numel()
    assert episode.reward is not None
    reward, terminated = rows.flat(episode.reward), rows.flat(episode.terminated)
    features = [obs.dense() for obs in episode.observations]
    row = 0
    steps, batch, agents = episode.alive.shape
    for image in range(batch):
        for agent in range(agents):
            for step in range(steps):
                if not episode.alive[step, image, agent]:
                    continue
                assert torch.equal(rows.tokens[row], features[step][image, agent])
                assert torch.equal(rows.cls[rows.image[row]], episode.observations[step].cls[image])
                assert rows.action[row] == episode.keep[step, image, agent]
                assert reward[row] == episode.reward[step, image, agent]
                assert terminated[row] == (step == steps - 1 or not episode.keep[step, image, agent])
                row += 1
    assert row == len(rows)


def test_dense_undoes_flat() -> None:
    episode, rows = explored(toy_game(), TokenActor(DIM), seed=1)
    table = torch.randn(episode.alive.shape)
    assert torch.equal(rows.dense(rows.flat(table)), table * episode.alive)


def test_log_probabilities_belong_to_the_actions() -> None:
    actor = TokenActor(DIM)
    _, rows = explored(toy_game(), actor, seed=2)
    chosen = actor(rows.tokens).log_softmax(dim=1).gather(1, rows.action[:, None]).squeeze(1)
    assert torch.allclose(rows.log_prob, chosen, atol=1e-6)


def test_buffer_gives_tianshou_all_rows_and_no_other_number() -> None:
    buffer = GameBuffer()
    assert len(buffer) == 0
    with pytest.raises(RuntimeError, match="nothing was collected"):
        buffer.sample(0)
    _, rows = explored(toy_game(), TokenActor(DIM), seed=0)
    buffer.store(rows)
    batch, indices = buffer.sample(0)
    assert len(batch) == len(buffer) == len(rows)
    assert np.array_equal(indices, np.arange(len(rows)))
    assert isinstance(batch.rew, np.ndarray)
    assert batch.rew.sum() == pytest.approx(float(rows.reward[rows.alive].sum()), rel=1e-5)
    assert not buffer.hasnull()
    assert not len(buffer.unfinished_index())
    with pytest.raises(ValueError, match="expected 0"):
        buffer.sample(64)
    buffer.reset()
    assert len(buffer) == 0


def test_games_without_labels_or_with_bad_rewards_are_refused() -> None:
    game, policy = toy_game(), ExploringPolicy(TokenActor(DIM), torch.Generator())
    unpaid = play(game, policy, OwnLabels(2).images, record=True)
    with pytest.raises(ValueError, match="labels and record"):
        Trajectory.of(unpaid, policy.actions, policy.log_probs)
    episode, _ = explored(game, TokenActor(DIM), seed=0)
    assert episode.reward is not None
    spoilt = dataclasses.replace(episode, reward=episode.reward * float("nan"))
    with pytest.raises(NumericalError, match="reward"):
        Trajectory.of(spoilt, [], [])


def test_collector_plays_one_batch_and_reports_it() -> None:
    game, actor, data = toy_game(), TokenActor(DIM), OwnLabels(8)
    algorithm = MAPPO(actor=actor, critic=TokenCritic(DIM, (16,)))
    drawn = []

    def draw(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        drawn.append(count)
        return data.batch(torch.arange(count))

    collector = GameCollector(algorithm, ExploringPolicy(actor, torch.Generator().manual_seed(0)), game, draw)
    stats = collector.collect(n_episode=8)
    outcome = game.outcome()
    assert drawn == [8]
    assert (stats.n_collected_episodes, stats.n_collected_steps) == (8, 24)
    assert outcome.correct is not None
    assert stats.accuracy == pytest.approx(outcome.correct.float().mean().item())
    assert stats.macs == pytest.approx(outcome.macs.mean().item())
    assert 0 < stats.policy_macs < stats.macs
    assert list(stats.keep) == ["1", "2", "3"]
    assert list(stats.keep.values()) == pytest.approx((outcome.n_kept.double().mean(0) / 25).tolist())
    assert outcome.reward is not None
    assert stats.returns == pytest.approx(outcome.reward.sum(0).mean(1).numpy())
    assert stats.collect_speed > 0
    assert len(collector.buffer) == int(25 * 8 + outcome.n_kept[:, :2].sum())
    with pytest.raises(ValueError, match="n_episode"):
        collector.collect(n_step=100)
    collector.reset()
    assert len(collector.buffer) == 0
