"""The PettingZoo environment: its API, its two modes, and that it plays the game of TokenGame (law 5)."""

from __future__ import annotations

import copy
import importlib
import pickle
import random
import warnings
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import pettingzoo
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pettingzoo.test import api_test, parallel_api_test, parallel_seed_test
from pettingzoo.test.state_test import state_test
from torch.utils.data import TensorDataset

from helpers import random_images, toy
from vitprune_env.baselines import EViT, RandomDrop, TopK
from vitprune_env.errors import DecisionError, EvidenceError
from vitprune_env.game import TokenGame
from vitprune_env.parallel_env import ENV_ID, PRUNE_MODES, TokenPruningEnv, env, parallel_env, raw_env, register_envs
from vitprune_env.policy import BasePolicy
from vitprune_env.reward import PaperReward, RewardFn, SharedOutcome, log_probability
from vitprune_env.rollout import play
from vitprune_env.types import Decision, Observation

# the package exports the function under the module's name
module = importlib.import_module("vitprune_env.parallel_env")

CLASS_TOKEN, REGISTERS, AVERAGE = (
    "deit_tiny_patch16_224",
    "vit_small_patch14_reg4_dinov2",
    "vit_medium_patch16_gap_240",
)
BACKBONES = (CLASS_TOKEN, REGISTERS, AVERAGE)
REWARDS: tuple[RewardFn, ...] = (SharedOutcome(outcome=log_probability), PaperReward(outcome=log_probability))


def images_for(name: str, size: int = 12) -> TensorDataset:
    backbone = toy(name)
    labels = torch.randint(backbone.num_classes, (size,), generator=torch.Generator().manual_seed(1))
    return TensorDataset(random_images(backbone, size), labels)


def make_env(name: str = CLASS_TOKEN, **options: Any) -> TokenPruningEnv:
    return parallel_env(toy(name), cast(Any, images_for(name)), **options)


def sample(environment: TokenPruningEnv, rng: np.random.Generator, rate: float = 0.6) -> dict[str, Any]:
    return {agent: int(rng.random() < rate) for agent in environment.agents}


def rollout(environment: TokenPruningEnv, actions_seed: int, rate: float = 0.6) -> Iterator[tuple[Any, ...]]:
    """Play the episode that has begun to its end with random actions."""
    rng = np.random.default_rng(actions_seed)
    while environment.agents:
        acted, actions = list(environment.agents), sample(environment, rng, rate)
        yield acted, actions, environment.step(actions)


def total(environment: TokenPruningEnv, actions_seed: int, rate: float = 0.6) -> dict[str, float]:
    returns = dict.fromkeys(environment.possible_agents, 0.0)
    for _, _, (_, rewards, _, _, _) in rollout(environment, actions_seed, rate):
        for agent, reward in rewards.items():
            returns[agent] += reward
    return returns


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


@pytest.mark.parametrize("on_prune", PRUNE_MODES)
@pytest.mark.parametrize("name", BACKBONES)
def test_state_holds_prefix_tokens_and_flags(name: str, on_prune: str) -> None:
    environment, backbone = make_env(name, on_prune=on_prune), toy(name)
    environment.reset(seed=0)
    state = environment.state()
    for _, _, (*_, infos) in rollout(environment, 1):
        state = environment.state()
        assert environment.state_space.contains(state)
        table = state.reshape(backbone.num_prefix + backbone.num_patches, backbone.embed_dim + 1)
        prefix, patches = np.split(table, [backbone.num_prefix])
        assert (prefix[:, -1] == 1).all()
        alive = {agent for agent, info in infos.items() if info["alive"]}
        assert {agent for agent, row in zip(environment.possible_agents, patches, strict=True) if row[-1]} == alive
        assert not patches[patches[:, -1] == 0].any()
        if environment.agents:
            np.testing.assert_array_equal(patches[:, :-1], environment.observation().dense()[0])
            if backbone.has_class_token:
                np.testing.assert_array_equal(prefix[0, :-1], environment.observation().cls[0])
    assert state.any() or not backbone.num_prefix


def test_pettingzoo_state_test() -> None:
    options: dict[str, Any] = {"backbone": toy(CLASS_TOKEN), "dataset": images_for(CLASS_TOKEN)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="Environment's (minimum|maximum) state space value is -?infinity")
        state_test(env(**options), parallel_env(**options))


def test_spaces_are_the_same_objects_and_observations_lie_in_them() -> None:
    environment = make_env()
    observations, infos = environment.reset(seed=0)
    assert list(observations) == list(infos) == environment.possible_agents
    assert environment.possible_agents[0] == "token_0"
    for agent, row in observations.items():
        assert environment.observation_space(agent) is environment.observation_space(agent)
        assert environment.action_space(agent) is environment.action_space(agent)
        assert environment.observation_space(agent).contains(row)
    seeds = [environment.action_space(agent).seed(0) for agent in ("token_0", "token_1")]
    assert len(seeds) == 2
    assert environment.action_space("token_0") is not environment.action_space("token_1")


def test_observations_are_read_only_views_of_one_array() -> None:
    environment = make_env()
    observations, _ = environment.reset(seed=0)
    assert observations["token_0"].base is observations["token_1"].base
    with pytest.raises(ValueError, match="read-only"):
        observations["token_0"][0] = 1


def test_numpy_and_bool_actions_count() -> None:
    def play_once(kind: Any) -> list[float]:
        environment = make_env()
        environment.reset(seed=0)
        return list(environment.step({agent: kind(i % 2) for i, agent in enumerate(environment.agents)})[1].values())

    assert play_once(np.int64) == play_once(bool) == play_once(int) == play_once(np.int32)


def test_the_end_and_the_beginning() -> None:
    environment = make_env()
    assert environment.agents == []
    assert environment.step({}) == ({}, {}, {}, {}, {})
    for call in (environment.state, environment.render, environment.observation, environment.outcome):
        with pytest.raises(RuntimeError, match=r"no game|not ended"):
            call()
    environment.reset(seed=0)
    with pytest.raises(RuntimeError, match="not ended yet"):
        environment.outcome()
    total(environment, 0)
    assert environment.outcome().logits.shape == (1, 7)
    assert environment.actions_from(RandomDrop(0.5)) == {}


@pytest.mark.parametrize("on_prune", PRUNE_MODES)
@pytest.mark.parametrize(
    "policy", [RandomDrop(0.6, seed=3), TopK(0.6), EViT(0.6, fuse=False)], ids=lambda p: type(p).__name__
)
def test_a_policy_plays_the_same_through_pettingzoo(policy: Any, on_prune: str) -> None:
    environment = make_env(needs=policy.needs, on_prune=on_prune)
    environment.reset(options={"index": 3})
    theirs = copy.deepcopy(policy)
    while environment.agents:
        environment.step(environment.actions_from(policy))
    game = TokenGame(toy(CLASS_TOKEN), needs=policy.needs)
    outcome = play(game, theirs, *images_for(CLASS_TOKEN)[3:4]).outcome
    assert torch.equal(environment.outcome().alive, outcome.alive)
    assert torch.equal(environment.outcome().n_kept, outcome.n_kept)
    assert torch.equal(environment.outcome().logits, outcome.logits)


def test_a_policy_is_reset_once_per_episode() -> None:
    calls = []

    class Counting(BasePolicy):
        def reset(self, batch_size: int, num_agents: int) -> None:
            calls.append((batch_size, num_agents))

        def decide(self, obs: Observation) -> Decision:
            return Decision(keep=obs.alive)

    environment = make_env()
    for episode in range(2):
        environment.reset(seed=episode)
        while environment.agents:
            environment.step(environment.actions_from(Counting()))
    assert calls == [(1, 16), (1, 16)]


def test_policies_that_do_not_fit_are_refused_readably() -> None:
    class Shapeless(BasePolicy):
        def decide(self, obs: Observation) -> Decision:
            return Decision(keep=obs.alive[0])

    environment = make_env(needs=frozenset({"cls_attention"}))
    environment.reset(seed=0)
    with pytest.raises(ValueError, match=r"EViT also decides merge_into, weight; play .* vitprune_env\.play"):
        environment.actions_from(EViT(0.6))
    with pytest.raises(DecisionError, match="keep: expected shape"):
        environment.actions_from(Shapeless())
    plain = make_env()
    plain.reset(seed=0)
    with pytest.raises(EvidenceError, match="cls_attention"):
        plain.actions_from(TopK(0.5))


def test_bad_actions_are_refused_by_name() -> None:
    environment = make_env()
    environment.reset(seed=0)
    good: dict[str, Any] = dict.fromkeys(environment.agents, 1)
    with pytest.raises(ValueError, match="token_5 is missing"):
        environment.step({agent: 1 for agent in good if agent != "token_5"})
    with pytest.raises(ValueError, match="patch_5 is not in the game"):
        environment.step(good | {"patch_5": 1})
    for bad in (2, -1, 0.5, None, "keep"):
        with pytest.raises(ValueError, match=r"expected 0 .* or 1 .* for token_7"):
            environment.step(good | {"token_7": bad})
    environment.step(good)  # nothing has happened so far
    assert len(environment.game.steps) == 1


def test_terminated_agents_may_not_act() -> None:
    environment = make_env(on_prune="terminate")
    environment.reset(seed=0)
    actions = dict.fromkeys(environment.agents, 1)
    environment.step(actions | {"token_2": 0})
    with pytest.raises(ValueError, match="token_2 is not in the game, or not any more"):
        environment.step(actions)


def test_bad_arguments_are_refused() -> None:
    backbone = toy(CLASS_TOKEN)
    with pytest.raises(ValueError, match=r"on_prune: expected one of .*, got 'leave'"):
        make_env(on_prune="leave")
    with pytest.raises(ValueError, match=r"render_mode: expected None or one of .*, got 'video'"):
        make_env(render_mode="video")
    with pytest.raises(ValueError, match=r"dataset: .* empty dataset"):
        parallel_env(backbone, cast(Any, []))
    with pytest.raises(ValueError, match="index: expected 0 to 11, got 12"):
        make_env().reset(options={"index": 12})
    with pytest.raises(ValueError, match="index: expected 0 to 11, got -1"):
        make_env().reset(options={"index": -1})


@pytest.mark.parametrize(
    ("item", "error", "message"),
    [
        ((torch.zeros(3, 32, 32), 0), ValueError, r"images: expected shape \[B, 3, 64, 64\], got \[1, 3, 32, 32\]"),
        ((torch.zeros(1, 64, 64), 0), ValueError, r"images: expected shape"),
        ((torch.zeros(3, 64, 64, dtype=torch.uint8), 0), TypeError, "floating-point"),
        ((torch.zeros(3, 64, 64), 7), ValueError, "labels: expected 0 to 6, got 7"),
        ((np.zeros((3, 64, 64)), 0), TypeError, "dataset: expected items"),
        (torch.zeros(3, 64, 64), TypeError, "dataset: expected items"),
    ],
)
def test_images_that_do_not_fit_are_refused(item: Any, error: type[Exception], message: str) -> None:
    environment = parallel_env(toy(CLASS_TOKEN), cast(Any, [item]))
    with pytest.raises(error, match=message):
        environment.reset()
    assert environment.agents == []


def test_registered_with_pettingzoo_once() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        register_envs()
        register_envs()
        options: dict[str, Any] = {"backbone": toy(CLASS_TOKEN), "dataset": images_for(CLASS_TOKEN)}
        made = pettingzoo.make("parallel", ENV_ID, on_prune="terminate", **options)
        turns = pettingzoo.make("aec", ENV_ID, **options)
    assert isinstance(made, TokenPruningEnv)
    assert made.on_prune == "terminate"
    assert isinstance(turns, pettingzoo.AECEnv)
    assert str(made) == str(turns) == "token_pruning_v0"


def test_device_moves_the_backbone_and_sites_are_passed_on() -> None:
    environment = make_env(sites=("2.attn", 3), device="cpu")
    assert [site.label for site in environment.game.sites] == ["2.attn", "3"]


def test_built_in_environment_as_in_its_docstring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BUILT_IN_IMAGES", 8)
    example = (TokenPruningEnv.__doc__ or "").split("Example:")[1].split("Version")[0]
    lines = [line.strip()[4:] for line in example.splitlines() if line.strip()]
    assert len(lines) == 6
    scope = vars(module).copy()
    exec("\n".join(lines), scope)
    assert scope["macs"] > 0
    assert scope["env"].game.backbone.name == "vit_digits"
