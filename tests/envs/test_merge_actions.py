"""The merge game in PettingZoo and batched: their APIs, law 5, masks, and what merging does to the features."""

from __future__ import annotations

import pickle
import warnings
from typing import Any, cast

import numpy as np
import pettingzoo
import pytest
import torch
from gymnasium.spaces import Discrete, MultiBinary, MultiDiscrete
from hypothesis import given
from hypothesis import strategies as st
from pettingzoo.test import api_test, parallel_api_test, parallel_seed_test, render_test

from envs import AVERAGE, BACKBONES, CLASS_TOKEN, REWARDS, draw_arrows, images_for, make_env, merge_env
from helpers import toy
from vitprune_env.envs.actions import KeepActions, MergeActions, action_kind
from vitprune_env.envs.parallel import PRUNE_MODES, env, parallel_env
from vitprune_env.envs.registration import ENV_ID
from vitprune_env.envs.vector import TokenVectorEnv
from vitprune_env.game.rewards import RewardFn
from vitprune_env.game.token_game import TokenGame

every_mode = pytest.mark.parametrize("on_prune", PRUNE_MODES)


@every_mode
@pytest.mark.parametrize("name", BACKBONES)
def test_parallel_api_without_warnings(name: str, on_prune: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parallel_api_test(merge_env(name, on_prune=on_prune), num_cycles=12)


@every_mode
def test_turn_by_turn_seed_and_render_tests(on_prune: str) -> None:
    options: dict[str, Any] = {"on_prune": on_prune, "action_space": "merge"}
    options |= {"backbone": toy(CLASS_TOKEN), "dataset": images_for(CLASS_TOKEN)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="Agent's (minimum|maximum) observation space value is -?infinity")
        warnings.filterwarnings("ignore", message="Observation numpy array is all zeros")
        warnings.filterwarnings("ignore", message="render_mode 'human' shows nothing")
        api_test(env(**options), num_cycles=12)
        parallel_seed_test(lambda: parallel_env(**options), num_cycles=5)
        render_test(lambda render_mode: cast(Any, env(render_mode=render_mode, **options)))
    made = pettingzoo.make("parallel", ENV_ID, **options)
    assert made.action_space("token_3") == Discrete(17)


@every_mode
def test_same_seed_plays_the_same_episodes(on_prune: str) -> None:
    def play_two(seed: int) -> bytes:
        environment, log = merge_env(on_prune=on_prune), []
        for episode in range(2):
            log.append(environment.reset(seed=seed if episode == 0 else None))
            while environment.agents:
                choices = draw_arrows(16, episode)[0].tolist()
                log.append(environment.step({a: choices[int(a.removeprefix("token_"))] for a in environment.agents}))
        return pickle.dumps(log)

    assert play_two(3) == play_two(3) != play_two(4)


@given(
    name=st.sampled_from(BACKBONES),
    reward=st.sampled_from(REWARDS),
    index=st.integers(0, 11),
    seed=st.integers(0, 99),
    stay=st.sampled_from([0.0, 0.5, 0.9]),
)
def test_law_5_both_environments_play_the_game(name: str, reward: RewardFn, index: int, seed: int, stay: float) -> None:
    environment, game = merge_env(name, reward=reward), TokenGame(toy(name), reward=reward)
    venv = TokenVectorEnv(TokenGame(toy(name), reward=reward), cast(Any, images_for(name)), 1, action_space="merge")
    images, labels = images_for(name)[index : index + 1]
    obs = game.reset(images, labels)
    observations, infos = environment.reset(options={"index": index})
    rows, facts = venv.reset(options={"indices": [index]})
    returns = np.zeros(game.num_agents)
    for step in range(game.num_steps):
        dense = obs.dense()[0]
        np.testing.assert_array_equal(np.stack([*observations.values()]), dense)
        assert torch.equal(rows[0], dense)
        mask = np.stack([info["action_mask"] for info in infos.values()])
        assert mask.dtype == np.int8
        assert np.array_equal(mask, facts["action_mask"][0])
        alive = obs.alive[0].numpy()
        expected = np.where(alive[:, None], np.array([1, *alive]), np.array([1] + [0] * len(alive)))
        assert np.array_equal(mask, expected)
        actions = draw_arrows(game.num_agents, seed + step, stay=stay)
        following, paid, _, _, info = game.step(MergeActions().decision(actions, obs))
        assert paid is not None
        observations, rewards, _, _, infos = environment.step(
            dict(zip(environment.agents, actions[0].tolist(), strict=True))
        )
        rows, theirs, _, _, facts = venv.step(actions)
        assert list(rewards.values()) == paid[0].tolist() == theirs[0].tolist()
        assert [i["alive"] for i in infos.values()] == info["alive"][0].tolist() == facts["alive"][0].tolist()
        returns += np.array([*rewards.values()])
        obs = obs if following is None else following
    outcome = game.outcome()
    assert outcome.reward is not None
    np.testing.assert_allclose(returns, outcome.reward.sum(dim=0)[0], atol=1e-6)
    assert torch.equal(environment.outcome().source, outcome.source)
    assert torch.equal(environment.outcome().logits, outcome.logits)
    assert torch.equal(facts["logits"], outcome.logits)


def test_a_merged_token_is_the_mean_of_its_patches() -> None:
    environment = merge_env(sites=("1", "1.attn")[:1])
    environment.reset(options={"index": 0})
    before = environment.state().reshape(-1, 49)[1:, :-1]
    actions = {agent: 1 + i for i, agent in enumerate(environment.agents)}
    _, _, _, _, infos = environment.step(actions | {"token_2": 6, "token_5": 8, "token_9": 8, "token_4": 0})
    after = environment.state().reshape(-1, 49)[1:]
    np.testing.assert_allclose(after[7, :-1], before[[2, 5, 7, 9]].mean(axis=0), atol=1e-5)
    assert [i for i, info in enumerate(infos.values()) if not info["alive"]] == [2, 4, 5, 9]
    assert environment.outcome().source[0, [2, 4, 5, 7, 9]].tolist() == [7, -1, 7, 7, 7]


def test_sizes_count_in_the_next_mean() -> None:
    environment = merge_env(sites=(1, 2))
    environment.reset(options={"index": 0})
    stay = {agent: 1 + i for i, agent in enumerate(environment.agents)}
    environment.step(stay | {"token_0": 2, "token_2": 2})  # token 1 is three patches now
    before = environment.state().reshape(-1, 49)[1:, :-1]
    environment.step(stay | {"token_3": 2, "token_0": 5})  # actions of dead tokens are ignored
    after = environment.state().reshape(-1, 49)[1:, :-1]
    np.testing.assert_allclose(after[1], (3 * before[1] + before[3]) / 4, atol=1e-5)
    assert environment.outcome().size[0, 1] == 4


@every_mode
def test_average_pooling_keeps_its_strongest_token(on_prune: str) -> None:
    environment = merge_env(AVERAGE, on_prune=on_prune)
    environment.reset(seed=0)
    infos = environment.step(dict.fromkeys(environment.agents, 0))[4]
    assert sum(info["alive"] for info in infos.values()) == 1


# Spaces and errors


def test_spaces() -> None:
    backbone = toy(CLASS_TOKEN)
    environment = merge_env()
    environment.reset(seed=0)
    assert all(environment.action_space(agent) == Discrete(17) for agent in environment.agents)
    venv = TokenVectorEnv(TokenGame(backbone), cast(Any, images_for(CLASS_TOKEN)), 3, action_space="merge")
    assert venv.single_action_space == MultiDiscrete([17] * 16)
    assert venv.action_space == MultiDiscrete(np.full((3, 16), 17))
    _, infos = venv.reset(seed=0)
    assert infos["action_mask"].shape == (3, 16, 17)
    for _ in range(venv.num_steps):
        venv.step(venv.action_space.sample())
    assert KeepActions().joint_space(16, 3) == MultiBinary([3, 16])


def test_bad_actions_and_names_are_refused() -> None:
    environment = merge_env()
    environment.reset(seed=0)
    good: dict[str, Any] = dict.fromkeys(environment.agents, 1)
    for bad in (17, -1, 0.5, None, "stay", float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"expected 0 \(drop\) or 1 \+ j .*, 1 to 16, got .* for token_7"):
            environment.step(good | {"token_7": bad})
    venv = TokenVectorEnv(TokenGame(toy(CLASS_TOKEN)), cast(Any, images_for(CLASS_TOKEN)), 1, action_space="merge")
    venv.reset(seed=0)
    for wrong in (torch.full((1, 16), 17), torch.full((1, 16), -1)):
        with pytest.raises(ValueError, match=r"expected 0 \(drop\) or 1 \+ j"):
            venv.step(wrong)
    with pytest.raises(ValueError, match=r"expected integers of shape .* got torch\.bool"):
        venv.step(torch.ones(1, 16, dtype=torch.bool))
    for make in (make_env, lambda **o: TokenVectorEnv(venv.game, cast(Any, images_for(CLASS_TOKEN)), **o)):
        with pytest.raises(ValueError, match=r"action_space: expected one of \('keep', 'merge', .*\), got 'fuse'"):
            make(action_space="fuse")
    assert action_kind("keep").mask(torch.ones(1, 4, dtype=torch.bool)) is None
