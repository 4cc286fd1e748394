"""The batched single-agent environment: Gymnasium's vector interface, and that each row is the game of one."""

from __future__ import annotations

import warnings
from typing import Any, cast

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from gymnasium.wrappers.vector import RecordEpisodeStatistics

from envs import BACKBONES, CLASS_TOKEN, images_for
from helpers import toy
from stay_drop_wait import StayDropWait
from vitprune_env.envs.gym import SingleAgentEnv
from vitprune_env.envs.gym_vector import SingleAgentVectorEnv
from vitprune_env.envs.parallel import TokenPruningEnv
from vitprune_env.envs.registration import ENV_ID
from vitprune_env.envs.vector import TokenVectorEnv
from vitprune_env.game.token_game import TokenGame


def make(name: str = CLASS_TOKEN, num_envs: int = 3, **options: Any) -> SingleAgentVectorEnv:
    return SingleAgentVectorEnv(num_envs, toy(name), cast(Any, images_for(name)), **options)


def drawn(envs: SingleAgentVectorEnv, seed: int, rate: float = 0.6) -> np.ndarray:
    return (np.random.default_rng(seed).random((envs.num_envs, envs.tokens.game.num_agents)) < rate).astype(np.int8)


def test_make_vec_gives_the_batched_game() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = gymnasium.make_vec(ENV_ID, num_envs=4, backbone=toy(CLASS_TOKEN), dataset=images_for(CLASS_TOKEN))
    assert isinstance(made, SingleAgentVectorEnv)
    assert isinstance(made, VectorEnv)
    assert made.num_envs == made.tokens.num_envs == 4
    assert made.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    single = SingleAgentEnv(toy(CLASS_TOKEN), cast(Any, images_for(CLASS_TOKEN)))
    assert made.single_observation_space == single.observation_space
    assert made.single_action_space == single.action_space
    assert made.observation_space == batch_space(single.observation_space, 4)
    assert made.action_space == batch_space(single.action_space, 4)


@pytest.mark.parametrize("action_space", ["keep", "merge", StayDropWait()], ids=["keep", "merge", "wait"])
@pytest.mark.parametrize("name", BACKBONES)
def test_each_row_is_the_game_of_one(name: str, action_space: Any) -> None:
    envs = make(name, action_space=action_space)
    indices = [5, 0, 7]
    observations, infos = envs.reset(options={"indices": indices})
    envs.action_space.seed(0)
    rows = [SingleAgentEnv(toy(name), cast(Any, images_for(name)), action_space=action_space) for _ in indices]
    for row, index, observation in zip(rows, indices, observations, strict=True):
        np.testing.assert_allclose(observation, row.reset(options={"index": index})[0], atol=1e-5)
    for step in range(3):
        actions = envs.action_space.sample()
        observations, rewards, terminations, truncations, infos = envs.step(actions)
        assert envs.observation_space.contains(observations)
        assert rewards.shape == (3,)
        assert terminations.dtype == truncations.dtype == np.bool_
        assert terminations.tolist() == [step == 2] * 3
        assert not truncations.any()
        for index, row in enumerate(rows):
            observation, reward, terminated, _, info = row.step(actions[index])
            np.testing.assert_allclose(observations[index], observation, atol=1e-5)
            assert rewards[index] == pytest.approx(reward, abs=1e-5)
            assert terminations[index] == terminated
            assert {key for key in infos if not key.startswith("_")} == set(info)
            for key, value in info.items():
                assert infos[f"_{key}"][index]
                np.testing.assert_allclose(infos[key][index], value)


def test_the_step_after_the_end_begins_new_games() -> None:
    envs = RecordEpisodeStatistics(make())
    _, infos = envs.reset(seed=0)
    paid = np.zeros(3)
    for step in range(3):
        _, rewards, _, _, infos = envs.step(drawn(make(), step))
        paid += rewards
    np.testing.assert_allclose(infos["episode"]["r"], paid)
    assert infos["episode"]["l"].tolist() == [3, 3, 3]
    observations, rewards, terminations, _, infos = envs.step(drawn(make(), 9, rate=0.0))
    assert infos["alive"].all()
    assert not rewards.any()
    assert not terminations.any()
    assert set(infos) == {"alive", "_alive"}
    assert observations.any(axis=1).all()
    assert not envs.step(drawn(make(), 0))[2].any()


def test_same_seed_same_episodes() -> None:
    def play(envs: SingleAgentVectorEnv, seed: int | None) -> list[bytes]:
        seen = [envs.reset(seed=seed)[0].tobytes()]
        return seen + [envs.step(drawn(envs, step))[0].tobytes() for step in range(8)]

    envs = make()
    assert play(envs, 3) == play(make(), 3) == play(envs, 3)
    assert play(envs, 3) != play(envs, 4)
    assert play(make(), None) != play(make(), None)
    assert envs.np_random is envs.tokens.np_random


def test_mistakes_are_refused() -> None:
    envs = make()
    with pytest.raises(RuntimeError, match="call reset"):
        envs.step(drawn(envs, 0))
    envs.reset(seed=0)
    with pytest.raises(ValueError, match=r"actions: expected .* shape \[B, N\] = \(3, 16\)"):
        envs.step(np.ones((3, 4), dtype=np.int8))
    with pytest.raises(ValueError, match="num_envs: expected at least 1, got 0"):
        make(num_envs=0)
    with pytest.raises(ValueError, match="dataset: expected images"):
        SingleAgentVectorEnv(2, toy(CLASS_TOKEN))


@pytest.mark.parametrize("action_space", ["keep", StayDropWait()], ids=["keep", "wait"])
@pytest.mark.parametrize("name", BACKBONES)
def test_the_state_of_the_batch_is_that_of_the_pettingzoo_environment(name: str, action_space: Any) -> None:
    data = cast(Any, images_for(name))
    venv = TokenVectorEnv(TokenGame(toy(name)), data, num_envs=3, action_space=action_space)
    with pytest.raises(RuntimeError, match="call reset"):
        venv.state()
    venv.reset(options={"indices": [2, 9, 4]})
    singles = [TokenPruningEnv(TokenGame(toy(name)), data, action_space=action_space) for _ in range(3)]
    for environment, index in zip(singles, (2, 9, 4), strict=True):
        environment.reset(options={"index": index})
    generator = torch.Generator().manual_seed(0)
    for step in range(4):
        for row, environment in zip(venv.state(), singles, strict=True):
            assert environment.state_space.contains(row.numpy())
            np.testing.assert_allclose(row, environment.state(), atol=1e-5)
        if step < 3:
            actions = torch.randint(venv.actions.count(25), (3, venv.game.num_agents), generator=generator)
            venv.step(actions)
            for environment, row in zip(singles, actions.tolist(), strict=True):
                environment.step(dict(zip(environment.agents, row, strict=True)))
