"""The PettingZoo environment: its API, its two modes, and that it plays the game of TokenGame (law 5)."""

from __future__ import annotations

import copy
import pickle
import random
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pettingzoo.test import api_test, parallel_api_test, parallel_seed_test

from envs import AVERAGE, BACKBONES, CLASS_TOKEN, REGISTERS, REWARDS, images_for, make_env, rollout, total
from helpers import toy
from vitprune_env.envs.parallel import PRUNE_MODES, TokenPruningEnv, env, raw_env
from vitprune_env.game.rewards import PaperReward, RewardFn, SharedOutcome, log_probability
from vitprune_env.game.token_game import TokenGame
from vitprune_env.types import Decision, Observation


@pytest.mark.parametrize("on_prune", PRUNE_MODES)
@pytest.mark.parametrize("name", BACKBONES)
def test_parallel_api_without_warnings(name: str, on_prune: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parallel_api_test(make_env(name, on_prune=on_prune), num_cycles=12)


@pytest.mark.parametrize("on_prune", PRUNE_MODES)
def test_turn_by_turn_api(on_prune: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Features are unbounded, and zeros are what absent agents observe: both are meant.
        warnings.filterwarnings("ignore", message="Agent's (minimum|maximum) observation space value is -?infinity")
        warnings.filterwarnings("ignore", message="Observation numpy array is all zeros")
        for make in (env, raw_env):
            api_test(make(backbone=toy(CLASS_TOKEN), dataset=images_for(CLASS_TOKEN), on_prune=on_prune), num_cycles=12)


@pytest.mark.parametrize("on_prune", PRUNE_MODES)
def test_pettingzoo_seed_test(on_prune: str) -> None:
    parallel_seed_test(lambda: make_env(on_prune=on_prune), num_cycles=5)


@pytest.mark.parametrize("on_prune", PRUNE_MODES)
def test_same_seed_plays_the_same_episodes_and_another_seed_others(on_prune: str) -> None:
    def play_four(seed: int) -> list[Any]:
        environment, log = make_env(on_prune=on_prune), []
        for episode in range(4):
            log.append(environment.reset(seed=seed if episode == 0 else None))
            log += [step for _, _, step in rollout(environment, actions_seed=episode)]
        return log

    assert pickle.dumps(play_four(3)) == pickle.dumps(play_four(3))
    assert pickle.dumps(play_four(3)) != pickle.dumps(play_four(4))


def test_reset_without_seed_goes_on_with_the_stream() -> None:
    def first_rows(environment: TokenPruningEnv, episodes: int) -> list[bytes]:
        return [environment.reset()[0]["token_0"].tobytes() for _ in range(episodes)]

    environment = make_env()
    environment.reset(seed=5)
    images = first_rows(environment, 6)
    assert len(set(images)) > 1
    environment.reset(seed=5)
    assert first_rows(environment, 6) == images


def images_drawn(environment: Any, episodes: int = 6) -> list[bytes]:
    return [environment.reset()[0]["token_0"].tobytes() for _ in range(episodes)]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda environment: pickle.loads(pickle.dumps(environment))])
def test_copies_of_a_fresh_environment_draw_other_images(copied: Any) -> None:
    """SuperSuit copies the environment that it is given, and resets the copies without a seed."""
    environment = make_env()
    twins = [copied(environment) for _ in range(2)]
    first, second = map(images_drawn, twins)
    assert first != second
    for twin in twins:
        twin.reset(seed=3)
    first, second = map(images_drawn, twins)
    assert first == second


def test_four_copies_of_supersuit_play_four_images() -> None:
    supersuit = pytest.importorskip("supersuit")
    games = supersuit.concat_vec_envs_v1(supersuit.pettingzoo_env_to_vec_env_v1(make_env()), 4)
    agents = games.num_envs // 4
    drawn = [games.reset()[0].reshape(4, agents, -1) for _ in range(6)]
    assert len({np.stack([batch[i] for batch in drawn]).tobytes() for i in range(4)}) == 4


def test_global_random_states_are_left_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state(), copy.deepcopy(np.random.get_state()), random.getstate()  # noqa: NPY002 - the global one
    environment = make_env()
    environment.reset(seed=1)
    total(environment, 1)
    environment.reset()
    after = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002 - the global one
    assert torch.equal(before[0], after[0])
    assert pickle.dumps(before[1:]) == pickle.dumps(after[1:])


@given(
    name=st.sampled_from(BACKBONES),
    reward=st.sampled_from(REWARDS),
    index=st.integers(0, 11),
    seed=st.integers(0, 99),
    rate=st.sampled_from([0.0, 0.3, 0.7, 1.0]),
)
def test_law_5_noop_plays_the_game(name: str, reward: RewardFn, index: int, seed: int, rate: float) -> None:
    environment = make_env(name, reward=reward)
    game = TokenGame(toy(name), reward=reward)
    images, labels = images_for(name)[index : index + 1]
    obs, alive = game.reset(images, labels), torch.ones(1, game.num_agents, dtype=torch.bool)
    observations, infos = environment.reset(options={"index": index})
    returns = np.zeros(game.num_agents)
    steps = 0
    for acted, actions, step in [*rollout(environment, seed, rate)]:
        assert acted == environment.possible_agents
        np.testing.assert_array_equal(np.stack([*observations.values()]), obs.dense()[0])
        assert [info["alive"] for info in infos.values()] == alive[0].tolist()
        keep = torch.tensor([[bool(actions[agent]) for agent in acted]]) & alive
        following, paid, _, _, info = game.step(Decision(keep=keep))
        observations, rewards, terminations, truncations, infos = step
        assert paid is not None
        assert list(rewards.values()) == paid[0].tolist()
        assert set(terminations.values()) == {following is None}
        assert set(truncations.values()) == {False}
        returns += np.array([*rewards.values()])
        alive, steps = info["alive"], steps + 1
        obs = obs if following is None else following
    assert steps == game.num_steps
    assert not np.stack([*observations.values()]).any()
    outcome, ours = game.outcome(), environment.outcome()
    assert outcome.reward is not None
    np.testing.assert_allclose(returns, outcome.reward.sum(dim=0)[0], atol=1e-6)
    torch.testing.assert_close(ours.logits, outcome.logits, rtol=0, atol=0)
    torch.testing.assert_close(ours.macs, outcome.macs, rtol=0, atol=0)


def test_noop_pruned_agents_observe_zeros_and_cannot_come_back() -> None:
    environment = make_env()
    environment.reset(seed=0)
    actions = dict.fromkeys(environment.agents, 1) | {"token_3": 0}
    observations, _, terminations, _, infos = environment.step(actions)
    assert not observations["token_3"].any()
    assert observations["token_4"].any()
    assert infos["token_3"] == {"alive": False}
    assert infos["token_4"] == {"alive": True}
    assert not any(terminations.values())
    observations, _, _, _, infos = environment.step(dict.fromkeys(environment.agents, 1))
    assert not observations["token_3"].any()
    assert infos["token_3"] == {"alive": False}


def test_terminate_agents_leave_at_once_and_are_never_paid_again() -> None:
    environment = make_env(on_prune="terminate")
    for episode in range(6):
        environment.reset(seed=episode)
        gone: set[str] = set()
        for acted, actions, (observations, rewards, terminations, truncations, infos) in rollout(environment, episode):
            assert not gone & set(acted)
            for part in (observations, rewards, terminations, truncations, infos):
                assert list(part) == acted
            is_last = not environment.agents
            assert terminations == {agent: is_last or not actions[agent] for agent in acted}
            assert not any(truncations.values())
            assert infos == {agent: {"alive": bool(actions[agent])} for agent in acted}
            assert not any(observations[agent].any() for agent in acted if terminations[agent])
            gone |= {agent for agent in acted if terminations[agent]}
            assert environment.agents == [agent for agent in acted if agent not in gone]


@pytest.mark.parametrize("name", BACKBONES)
def test_terminate_survivors_observe_what_the_game_shows_them(name: str) -> None:
    environment = make_env(name, on_prune="terminate")
    environment.reset(seed=2)
    for _, _, (observations, *_) in rollout(environment, 0):
        if environment.agents:
            dense = environment.observation().dense()[0].numpy()
            for agent in environment.agents:
                np.testing.assert_array_equal(observations[agent], dense[int(agent.removeprefix("token_"))])


def counterfactual_score(index: int, keeps: list[torch.Tensor], reward: RewardFn) -> float:
    """Score of a pass with these decisions and no pruning after them, by a game of its own."""
    game = TokenGame(toy(CLASS_TOKEN), reward=reward)
    images, labels = images_for(CLASS_TOKEN)[index : index + 1]
    obs: Observation | None = game.reset(images, labels)
    alive = torch.ones(1, game.num_agents, dtype=torch.bool)
    while obs is not None:
        alive = alive & keeps[obs.step] if obs.step < len(keeps) else alive
        obs = game.step(Decision(keep=alive))[0]
    return float(reward.score(game.outcome().logits, labels))


def test_terminate_pays_shared_outcome_by_hand() -> None:
    reward = SharedOutcome(price=0.8, outcome=log_probability)
    environment = make_env(on_prune="terminate", reward=reward)
    environment.reset(options={"index": 4})
    n = len(environment.agents)
    first, second = torch.ones(1, n, dtype=torch.bool), torch.ones(1, n, dtype=torch.bool)
    first[0, :5], second[0, :9] = False, False
    returns = dict.fromkeys(environment.agents, 0.0)
    for keep in (first, second, torch.ones(1, n, dtype=torch.bool)):
        actions = {agent: int(keep[0, int(agent.removeprefix("token_"))]) for agent in environment.agents}
        for agent, paid in environment.step(actions)[1].items():
            returns[agent] += paid
    early, late = counterfactual_score(4, [first], reward), counterfactual_score(4, [first, second], reward)
    assert abs(early - late) > 1e-4  # otherwise this test could not tell them apart
    real = float(log_probability(environment.outcome().logits, images_for(CLASS_TOKEN)[4:5][1]))
    assert real == pytest.approx(late, abs=1e-6)
    # Sites after blocks 1, 2, 3 of 4: a token that stays buys 2 of 8 half-blocks at each of them.
    assert returns["token_0"] == pytest.approx(early, abs=1e-5)
    assert returns["token_7"] == pytest.approx(late - 0.8 / 4, abs=1e-5)
    assert returns["token_12"] == pytest.approx(real - 3 * 0.8 / 4, abs=1e-5)


def test_terminate_pays_paper_reward_by_hand() -> None:
    reward = PaperReward(keep_cost=1.0, outcome_bonus=0.5, outcome=log_probability)
    environment = make_env(on_prune="terminate", reward=reward)
    environment.reset(options={"index": 4})
    n = len(environment.agents)
    first, second = torch.ones(1, n, dtype=torch.bool), torch.ones(1, n, dtype=torch.bool)
    first[0, :5], second[0, :9] = False, False
    environment.step({agent: int(first[0, i]) for i, agent in enumerate(environment.agents)})
    rewards = environment.step({f"token_{i}": int(second[0, i]) for i in range(5, n)})[1]
    late = counterfactual_score(4, [first, second], reward)
    # It was one of n - 5 at the first site: gamma * N / n_1, paid when it leaves; the cost of staying was paid before.
    assert rewards["token_7"] == pytest.approx(0.5 * late * n / (n - 5), abs=1e-5)
    assert rewards["token_12"] == pytest.approx(-1.0, abs=1e-6)


@pytest.mark.parametrize("name", [CLASS_TOKEN, REGISTERS])
def test_terminate_ends_early_when_everybody_left(name: str) -> None:
    environment = make_env(name, on_prune="terminate", reward=SharedOutcome(outcome=log_probability))
    environment.reset(options={"index": 0})
    acted = environment.agents
    _, rewards, terminations, _, _ = environment.step(dict.fromkeys(acted, 0))
    assert environment.agents == []
    assert all(terminations.values())
    assert environment.outcome().n_kept.tolist() == [[0, 0, 0]]
    real = log_probability(environment.outcome().logits, images_for(name)[0:1][1])
    assert list(rewards.values()) == pytest.approx([float(real)] * len(acted), abs=1e-5)
    assert environment.step({}) == ({}, {}, {}, {}, {})


@pytest.mark.parametrize("on_prune", PRUNE_MODES)
def test_average_pooling_keeps_its_strongest_token(on_prune: str) -> None:
    environment = make_env(AVERAGE, on_prune=on_prune)
    environment.reset(seed=0)
    for _ in range(3):
        infos = environment.step(dict.fromkeys(environment.agents, 0))[4]
        assert sum(info["alive"] for info in infos.values()) == 1
    assert environment.agents == []
