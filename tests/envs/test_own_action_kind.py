"""An action kind of a user's own (`stay_drop_wait`) in every environment, and what waiting means there."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from typing import Any, cast

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Discrete, MultiDiscrete
from gymnasium.utils.env_checker import check_env
from hypothesis import given
from hypothesis import strategies as st
from pettingzoo.test import api_test, parallel_api_test, parallel_seed_test
from torch import Tensor

from envs import AVERAGE, BACKBONES, CLASS_TOKEN, REWARDS, images_for, make_env
from helpers import toy
from stay_drop_wait import StayDropWait
from vitprune_env.baselines import EvoViT, RandomDrop, TopK
from vitprune_env.envs.actions import KeepActions, MergeActions
from vitprune_env.envs.gym import SingleAgentEnv
from vitprune_env.envs.parallel import PRUNE_MODES, TokenPruningEnv, env
from vitprune_env.envs.registration import ENV_ID
from vitprune_env.envs.vector import TokenVectorEnv
from vitprune_env.game.rewards import RewardFn, SharedOutcome, log_probability
from vitprune_env.game.rollout import play
from vitprune_env.game.token_game import TokenGame
from vitprune_env.policy import BasePolicy
from vitprune_env.types import Decision, Observation

DROP, STAY, WAIT = 0, 1, 2
KIND = StayDropWait()
every_mode = pytest.mark.parametrize("on_prune", PRUNE_MODES)


def wait_env(name: str = CLASS_TOKEN, **options: Any) -> TokenPruningEnv:
    return make_env(name, action_space=KIND, **options)


def vector_env(name: str, num_envs: int = 1, **options: Any) -> TokenVectorEnv:
    return TokenVectorEnv(TokenGame(toy(name), **options), cast(Any, images_for(name)), num_envs, action_space=KIND)


@every_mode
@pytest.mark.parametrize("name", BACKBONES)
def test_pettingzoo_apis(name: str, on_prune: str) -> None:
    options: dict[str, Any] = {"backbone": toy(name), "dataset": images_for(name), "action_space": KIND}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="Agent's (minimum|maximum) observation space value is -?infinity")
        warnings.filterwarnings("ignore", message="Observation numpy array is all zeros")
        parallel_api_test(wait_env(name, on_prune=on_prune), num_cycles=12)
        parallel_seed_test(lambda: wait_env(name, on_prune=on_prune), num_cycles=5)
        api_test(env(on_prune=on_prune, **options), num_cycles=12)


def test_gymnasium_api() -> None:
    made = gymnasium.make(ENV_ID, backbone=toy(CLASS_TOKEN), dataset=images_for(CLASS_TOKEN), action_space=KIND)
    assert made.action_space == MultiDiscrete([3] * 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=r".*A Box observation space (minimum|maximum) value is -?infinity")
        warnings.filterwarnings("ignore", message="render_mode 'human' shows nothing")
        check_env(made.unwrapped)


def test_spaces_and_errors_come_from_the_kind() -> None:
    environment = wait_env()
    environment.reset(seed=0)
    assert environment.action_space("token_3") == Discrete(3)
    with pytest.raises(ValueError, match=r"expected 0 \(drop\), 1 \(stay\) or 2 \(wait\), got 3 for token_7"):
        environment.step(dict.fromkeys(environment.agents, STAY) | {"token_7": 3})
    venv = vector_env(CLASS_TOKEN)
    venv.reset(seed=0)
    with pytest.raises(ValueError, match=r"expected 0 \(drop\), 1 \(stay\) or 2 \(wait\), got 3"):
        venv.step(torch.tensor([[3, *[1] * 15]]))
    with pytest.raises(ValueError, match=r"expected integers of shape .* got torch\.bool"):
        venv.step(torch.ones(1, 16, dtype=torch.bool))
    for wrong in (None, 3, StayDropWait):
        with pytest.raises(TypeError, match=r"action_space: expected an ActionKind object or one of \('keep', 'm"):
            make_env(action_space=wrong)


def played(name: str, actions: list[list[int]], reward: RewardFn, index: int) -> TokenGame:
    """A game in which waiting is decided by hand."""
    game = TokenGame(toy(name), reward=reward)
    images, labels = images_for(name)[index : index + 1]
    obs: Observation | None = game.reset(images, labels)
    for row in actions:
        assert obs is not None
        chosen, present = torch.tensor([row]), game.state.present
        obs = game.step(Decision(keep=(chosen > 0) & present, park=(chosen == WAIT) & present))[0]
    return game


@given(
    name=st.sampled_from(BACKBONES),
    reward=st.sampled_from(REWARDS),
    index=st.integers(0, 11),
    seed=st.integers(0, 2**31),
)
def test_law_5_all_environments_play_the_game(name: str, reward: RewardFn, index: int, seed: int) -> None:
    agents = toy(name).num_patches
    generator = torch.Generator().manual_seed(seed)
    actions = torch.randint(3, (3, agents), generator=generator).tolist()
    outcome = played(name, actions, reward, index).outcome()
    environment = wait_env(name, reward=reward)
    single = SingleAgentEnv(toy(name), cast(Any, images_for(name)), reward=reward, action_space=KIND)
    venv = vector_env(name, reward=reward)
    observations, infos = environment.reset(options={"index": index})
    single.reset(options={"index": index})
    dense, _ = venv.reset(options={"indices": [index]})
    returns = np.zeros(agents)
    for row in actions:
        np.testing.assert_array_equal(np.stack([*observations.values()]), dense[0])
        observations, rewards, _, _, infos = environment.step(dict(zip(environment.agents, row, strict=True)))
        dense, paid, _, _, facts = venv.step(torch.tensor([row]))
        state, total, *_, info = single.step(np.array(row))
        np.testing.assert_array_equal(state, environment.state())
        assert list(rewards.values()) == paid[0].tolist()
        assert total == pytest.approx(sum(rewards.values()), abs=1e-5)
        for name_of_fact in ("alive", "parked"):
            told = [info.get(name_of_fact) for info in infos.values()]
            if name_of_fact in facts:
                assert told == facts[name_of_fact][0].tolist() == info[name_of_fact].tolist()
            else:
                assert set(told) == {None}
        returns += np.array([*rewards.values()])
    assert outcome.reward is not None
    np.testing.assert_allclose(returns, outcome.reward.sum(dim=0)[0], atol=1e-6)
    for ours in (environment.outcome(), venv.outcome(), single.outcome()):
        assert torch.equal(ours.logits, outcome.logits)
        assert torch.equal(ours.macs, outcome.macs)
        assert torch.equal(ours.alive, outcome.alive)


@every_mode
def test_waiting_tokens_stay_listed_and_observe_the_feature_they_wait_with(on_prune: str) -> None:
    environment = wait_env(on_prune=on_prune)
    first, _ = environment.reset(seed=0)
    stay = dict.fromkeys(environment.agents, STAY)
    observations, _, terminations, _, infos = environment.step(stay | {"token_3": WAIT, "token_5": DROP})
    assert not terminations["token_3"]
    assert terminations["token_5"] == (on_prune == "terminate")
    assert infos["token_3"] == {"alive": True, "parked": True}
    assert infos["token_5"] == {"alive": False, "parked": False}
    assert infos["token_4"] == {"alive": True, "parked": False}
    np.testing.assert_array_equal(observations["token_3"], first["token_3"])
    assert not np.array_equal(observations["token_4"], first["token_4"])
    table = environment.state().reshape(17, 49)[1:]
    np.testing.assert_array_equal(table[3], [*first["token_3"], 1])
    assert not table[5].any()
    # It comes back, and is dropped at the last site.
    observations, _, terminations, _, infos = environment.step(dict.fromkeys(environment.agents, STAY))
    assert infos["token_3"] == {"alive": True}
    assert not np.array_equal(observations["token_3"], first["token_3"])
    assert environment.game.steps[-1].carried[0, 3]
    _, _, terminations, _, _ = environment.step(dict.fromkeys(environment.agents, WAIT) | {"token_3": DROP})
    assert all(terminations.values())
    assert environment.outcome().alive[0].tolist() == [i not in (3, 5) for i in range(16)]


@pytest.mark.parametrize("name", [CLASS_TOKEN, AVERAGE])
def test_leavers_are_settled_with_the_waiting_tokens_of_that_moment(name: str) -> None:
    reward = SharedOutcome(price=0.0, outcome=log_probability)
    environment = wait_env(name, on_prune="terminate", reward=reward)
    environment.reset(options={"index": 4})
    agents = len(environment.agents)
    row = [DROP] * 3 + [WAIT] * 6 + [STAY] * (agents - 9)
    paid = environment.step(dict(zip(environment.agents, row, strict=True)))[1]
    score = float(log_probability(played(name, [row] * 3, reward, 4).outcome().logits, images_for(name)[4:5][1]))
    assert paid["token_1"] == pytest.approx(score, abs=1e-5)
    assert paid["token_4"] == paid["token_12"] == 0


@every_mode
def test_a_game_in_which_all_wait_goes_on(on_prune: str) -> None:
    environment = wait_env(on_prune=on_prune)
    environment.reset(seed=0)
    for _ in range(3):
        assert len(environment.agents) == 16
        environment.step(dict.fromkeys(environment.agents, WAIT))
    assert environment.agents == []
    assert environment.outcome().alive.all()
    assert not environment.outcome().n_kept.any()


@every_mode
@pytest.mark.parametrize("name", [CLASS_TOKEN, "deit_small_distilled_patch16_224"])
@pytest.mark.parametrize("layer_wise", [False, True])
def test_evo_vit_plays_through_actions(name: str, layer_wise: bool, on_prune: str) -> None:
    policy = EvoViT(0.5, layer_wise=layer_wise)
    sites = policy.default_sites(toy(name).depth)
    game = TokenGame(toy(name), sites, needs=policy.needs)
    outcome = play(game, copy.deepcopy(policy), *images_for(name)[3:4]).outcome
    environment = wait_env(name, on_prune=on_prune, sites=sites, needs=policy.needs)
    environment.reset(options={"index": 3})
    while environment.agents:
        environment.step(environment.actions_from(policy))
    venv = vector_env(name, sites=sites, needs=policy.needs)
    venv.reset(options={"indices": [3]})
    for _ in range(venv.num_steps):
        venv.step(venv.actions_from(policy))
    for ours in (environment.outcome(), venv.outcome()):
        assert torch.equal(ours.logits, outcome.logits)
        assert torch.equal(ours.macs, outcome.macs)
        assert torch.equal(ours.n_kept, outcome.n_kept)
        assert ours.alive.all()
    assert (outcome.n_kept < 16).all()


class Random(BasePolicy):
    """Drops, keeps and parks tokens at random."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def reset(self, batch_size: int, num_agents: int) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)

    def decide(self, obs: Observation) -> Decision:
        drawn = torch.rand(obs.alive.shape, generator=self.generator)
        return Decision(keep=(drawn > 0.2) & obs.present, park=(drawn > 0.7) & obs.present)


@every_mode
@given(seed=st.integers(0, 2**31))
def test_any_policy_that_parks_plays_the_same_through_actions(on_prune: str, seed: int) -> None:
    environment = wait_env(on_prune=on_prune)
    environment.reset(options={"index": 2})
    policy = Random(seed)
    while environment.agents:
        actions = environment.actions_from(policy)
        assert list(actions) == environment.agents
        environment.step(actions)
    outcome = play(TokenGame(toy(CLASS_TOKEN)), Random(seed), *images_for(CLASS_TOKEN)[2:3]).outcome
    assert torch.equal(environment.outcome().alive, outcome.alive)
    assert torch.equal(environment.outcome().logits, outcome.logits)


@pytest.mark.parametrize("policy", [RandomDrop(0.6, seed=3), TopK(0.6)], ids=["random", "topk"])
def test_policies_that_only_prune_play_here_too(policy: Any) -> None:
    environment = wait_env(needs=policy.needs)
    environment.reset(options={"index": 3})
    theirs = copy.deepcopy(policy)
    while environment.agents:
        environment.step(environment.actions_from(policy))
    outcome = play(TokenGame(toy(CLASS_TOKEN), needs=policy.needs), theirs, *images_for(CLASS_TOKEN)[3:4]).outcome
    assert torch.equal(environment.outcome().logits, outcome.logits)


def test_a_learner_that_gives_actions_to_the_rows_it_sees_lets_waiting_tokens_come_back() -> None:
    class Rows(BasePolicy):
        def decide(self, obs: Observation) -> Decision:
            actions = KIND.unseen_actions(obs)
            actions[obs.image, obs.token] = WAIT
            return KIND.decision(actions, obs)

    images = images_for(CLASS_TOKEN)[:2][0]
    episode = play(TokenGame(toy(CLASS_TOKEN)), Rows(), images)
    assert episode.parked is not None
    assert episode.parked.flatten(1).all(dim=1).tolist() == [True, False, True]
    assert episode.keep.all()


def test_kinds_that_cannot_express_waiting_or_merging_refuse_it() -> None:
    class Merging(BasePolicy):
        def decide(self, obs: Observation) -> Decision:
            into = torch.arange(obs.num_agents).expand_as(obs.alive).clone()
            into[:, 1] = 0
            return Decision(keep=obs.alive, merge_into=into)

    for kind in ("keep", MergeActions()):
        environment = make_env(action_space=kind)
        environment.reset(seed=0)
        with pytest.raises(ValueError, match=r"Random cannot play .* it also decides park; use vitprune_env\.play"):
            environment.actions_from(Random(0))
    waiting = wait_env()
    waiting.reset(seed=0)
    with pytest.raises(ValueError, match=r"Merging cannot play .* merges 1 tokens"):
        waiting.actions_from(Merging())


class Backwards(KeepActions):
    """What stays, in reversed order."""

    name = "backwards"

    def decision(self, actions: Tensor, obs: Observation) -> Decision:
        return replace(super().decision(actions, obs), order=-obs.order)


class AsItIs(BasePolicy):
    """Keeps all tokens in their order, and says so."""

    def decide(self, obs: Observation) -> Decision:
        return Decision(keep=obs.alive, order=obs.order)


def test_the_order_of_a_policy_is_for_the_step_that_it_was_asked_for() -> None:
    venv = TokenVectorEnv(TokenGame(toy(CLASS_TOKEN)), images_for(CLASS_TOKEN), 1, action_space=Backwards())
    venv.reset(options={"indices": [3]})
    order, keep = venv.observation().order, torch.ones(1, venv.game.num_agents, dtype=torch.int64)
    venv.step(venv.actions_from(AsItIs()))
    assert torch.equal(venv.observation().order, order)
    venv.step(keep)
    assert torch.equal(venv.observation().order, order.flip(1))
    venv.reset(options={"indices": [3]})
    venv.actions_from(AsItIs())
    venv.reset(options={"indices": [3]})  # the game that it was asked for is not played
    venv.step(keep)
    assert torch.equal(venv.observation().order, order.flip(1))
