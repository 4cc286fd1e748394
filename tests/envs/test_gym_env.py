"""The single-agent environment: Gymnasium's own checks, that it is the game of the others, and what it pays."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any, cast

import gymnasium
import numpy as np
import pettingzoo
import pytest
import torch
from gymnasium.spaces import Box, MultiBinary, MultiDiscrete
from gymnasium.utils.env_checker import check_env
from hypothesis import given
from hypothesis import strategies as st

from envs import AVERAGE, BACKBONES, CLASS_TOKEN, REWARDS, draw_arrows, images_for, make_env, merge_env
from helpers import toy
from vitprune_env.baselines import EViT, RandomDrop, TopK
from vitprune_env.envs import parallel
from vitprune_env.envs.gym import SingleAgentEnv
from vitprune_env.envs.registration import ENV_ID, register_envs
from vitprune_env.game.rewards import RewardFn, SharedOutcome, TeamOutcome, log_probability
from vitprune_env.game.rollout import play
from vitprune_env.game.token_game import TokenGame
from vitprune_env.types import Decision


def make(name: str = CLASS_TOKEN, **options: Any) -> SingleAgentEnv:
    return SingleAgentEnv(toy(name), cast(Any, images_for(name)), **options)


def episode(environment: SingleAgentEnv, seed: int) -> list[Any]:
    """The steps of the episode that has begun, with random actions."""
    rng, steps = np.random.default_rng(seed), []
    while not steps or not steps[-1][2]:
        steps.append(environment.step((rng.random(environment.action_space.shape) < 0.6).astype(np.int8)))
    return steps


@pytest.mark.parametrize("options", [{}, {"action_space": "merge"}], ids=["keep", "merge"])
@pytest.mark.parametrize("name", BACKBONES)
def test_gymnasium_check_env(name: str, options: dict[str, Any]) -> None:
    environment = gymnasium.make(ENV_ID, backbone=toy(name), dataset=images_for(name), render_mode="ansi", **options)
    assert isinstance(environment.unwrapped, SingleAgentEnv)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Features are unbounded; there is no display to open a window on.
        warnings.filterwarnings("ignore", message=r".*A Box observation space (minimum|maximum) value is -?infinity")
        warnings.filterwarnings("ignore", message="render_mode 'human' shows nothing")
        check_env(environment.unwrapped)


def test_registered_once_under_the_same_name_as_in_pettingzoo() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        register_envs()
        register_envs()
    spec = gymnasium.spec("vitprune/TokenPruning-v0")
    assert spec.id == ENV_ID
    assert ENV_ID in pettingzoo.parallel_registry
    assert spec.entry_point == "vitprune_env.envs.gym:SingleAgentEnv"


def test_plays_in_gymnasiums_vector_environments() -> None:
    venv = gymnasium.make_vec(
        ENV_ID, num_envs=2, vectorization_mode="sync", backbone=toy(CLASS_TOKEN), dataset=images_for(CLASS_TOKEN)
    )
    observations, infos = venv.reset(seed=0)
    assert observations.shape == (2, 17 * 49)
    assert infos["alive"].shape == (2, 16)
    assert not np.array_equal(observations[0], observations[1])
    for _ in range(5):
        _, rewards, *_ = venv.step(venv.action_space.sample())
        assert rewards.shape == (2,)


@given(
    name=st.sampled_from(BACKBONES),
    reward=st.sampled_from([*REWARDS, TeamOutcome(outcome=log_probability)]),
    index=st.integers(0, 11),
    seed=st.integers(0, 99),
    merging=st.booleans(),
)
def test_law_5_it_is_the_game_of_pettingzoo(name: str, reward: RewardFn, index: int, seed: int, merging: bool) -> None:
    space = "merge" if merging else "keep"
    environment = make(name, reward=reward, action_space=space)
    other = (merge_env if merging else make_env)(name, reward=reward)
    observation, info = environment.reset(options={"index": index})
    other.reset(options={"index": index})
    total, n = 0.0, toy(name).num_patches
    for step in range(environment.tokens.game.num_steps):
        np.testing.assert_array_equal(observation, other.state())
        assert environment.observation_space.contains(observation)
        actions = draw_arrows(n, seed + step)[0] if merging else draw_arrows(n, seed + step)[0] % 2
        _, rewards, terminations, _, infos = other.step(dict(zip(other.agents, actions.tolist(), strict=True)))
        observation, paid, terminated, truncated, info = environment.step(actions.numpy())
        assert paid == pytest.approx(sum(rewards.values()), abs=1e-5)
        assert {terminated} == set(terminations.values())
        assert not truncated
        assert info["alive"].tolist() == [i["alive"] for i in infos.values()]
        assert ("action_mask" in info) == merging
        total += paid
    outcome = environment.outcome()
    assert outcome.reward is not None
    assert total == pytest.approx(float(outcome.reward.sum()), abs=1e-5)
    assert torch.equal(outcome.logits, other.outcome().logits)
    assert info["macs"] == float(outcome.macs)
    assert info["correct"] == bool(outcome.correct)
    assert info["n_kept"].tolist() == outcome.n_kept[0].tolist()


def test_pays_the_outcome_once_and_every_kept_token() -> None:
    environment = make(reward=TeamOutcome(price=0.8, outcome=log_probability))
    _, info = environment.reset(options={"index": 4})
    keep = np.ones(16, dtype=np.int8)
    paid = []
    for gone in (5, 9, 9):
        keep[:gone] = 0
        paid.append(environment.step(keep)[1])
    score = float(log_probability(environment.outcome().logits, images_for(CLASS_TOKEN)[4:5][1]))
    assert abs(score) > 0.1
    # Sites after blocks 1, 2, 3 of 4: a token that stays buys 2 of 8 half-blocks at each of them.
    assert paid == pytest.approx([-0.2 * 11, -0.2 * 7, -0.2 * 7 + score], abs=1e-5)
    assert info["alive"].all()


@given(seed=st.integers(0, 99), price=st.floats(0.0, 0.5))
def test_the_teams_objective_is_that_of_the_agents(seed: int, price: float) -> None:
    """The team's return is the outcome minus all charges; an agent's is the outcome minus its own charges."""
    images, labels = images_for(CLASS_TOKEN)[:6]
    keeps = torch.rand(3, 6, 16, generator=torch.Generator().manual_seed(seed)) < 0.7
    tables = []
    for kind in (TeamOutcome, SharedOutcome):
        game = TokenGame(toy(CLASS_TOKEN), reward=kind(price=price, outcome=log_probability))
        obs, alive = game.reset(images, labels), torch.ones(6, 16, dtype=torch.bool)
        for keep in keeps:
            alive = alive & keep
            game.step(Decision(keep=alive))
        reward = game.outcome().reward
        assert reward is not None
        assert obs.batch_size == 6
        tables.append(reward)
    team, agents = tables[0].sum(dim=(0, 2)), tables[1].sum(dim=0)
    score = log_probability(game.outcome().logits, labels)
    charges = score[:, None] - agents
    torch.testing.assert_close(team, score - charges.sum(dim=1), atol=1e-4, rtol=0)


def test_same_seed_same_episodes() -> None:
    def play_three(seed: int) -> bytes:
        environment, log = make(), []
        for number in range(3):
            log.append(environment.reset(seed=seed if number == 0 else None))
            log += episode(environment, number)
        return pickle.dumps(log)

    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert play_three(3) == play_three(3) != play_three(4)
    assert torch.equal(before, torch.get_rng_state())


def test_copies_of_a_fresh_environment_draw_other_images() -> None:
    environment = make()
    twins = environment, copy.deepcopy(environment)
    first, second = ([twin.reset()[0].tobytes() for _ in range(6)] for twin in twins)
    assert first != second


def test_reset_without_seed_goes_on_with_the_stream() -> None:
    environment = make()

    def images() -> list[bytes]:
        return [environment.reset()[0].tobytes() for _ in range(6)]

    environment.reset(seed=5)
    first = images()
    assert len(set(first)) > 1
    environment.reset(seed=5)
    assert images() == first


@pytest.mark.parametrize(
    "policy", [RandomDrop(0.6, seed=3), TopK(0.6), EViT(0.6, fuse=False)], ids=lambda p: type(p).__name__
)
def test_a_policy_plays_the_same(policy: Any) -> None:
    environment = make(needs=policy.needs)
    environment.reset(options={"index": 3})
    for _ in range(3):
        action = environment.action_from(policy)
        assert environment.action_space.contains(action)
        environment.step(action)
    game = TokenGame(toy(CLASS_TOKEN), needs=policy.needs)
    outcome = play(game, policy, *images_for(CLASS_TOKEN)[3:4]).outcome
    if not isinstance(policy, RandomDrop):  # whose stream goes on
        assert torch.equal(environment.outcome().logits, outcome.logits)
    assert torch.equal(environment.outcome().n_kept, outcome.n_kept)


def test_render_modes_show_what_pettingzoo_shows() -> None:
    for mode in ("ansi", "rgb_array"):
        environment, other = make(render_mode=mode), make_env(render_mode=mode)
        environment.reset(options={"index": 2})
        other.reset(options={"index": 2})
        keep = np.arange(16) % 3 > 0
        environment.step(keep)
        other.step(dict(zip(other.agents, keep.tolist(), strict=True)))
        assert np.array_equal(np.asarray(environment.render()), np.asarray(other.render()))
        environment.close()


def test_spaces() -> None:
    environment = make()
    assert isinstance(environment.observation_space, Box)
    assert environment.observation_space.shape == (17 * 49,)
    assert environment.action_space == MultiBinary(16)
    assert make(action_space="merge").action_space == MultiDiscrete([17] * 16)


def test_average_pooling_keeps_its_strongest_token() -> None:
    environment = make(AVERAGE)
    environment.reset(seed=0)
    info = environment.step(np.zeros(toy(AVERAGE).num_patches, dtype=np.int8))[4]
    assert info["alive"].sum() == 1


def test_mistakes_are_refused_readably() -> None:
    environment = make()
    keep: np.ndarray = np.ones(16, dtype=np.int8)
    with pytest.raises(RuntimeError, match=r"step: no game is being played; call reset\(\)"):
        environment.step(keep)
    with pytest.raises(RuntimeError, match="render: no game has begun"):
        environment.render()
    with pytest.raises(RuntimeError, match="action_from: no game is being played"):
        environment.action_from(RandomDrop(0.5))
    environment.reset(seed=0)
    for wrong in (keep[:5], keep[None], 1):
        with pytest.raises(ValueError, match=r"action: expected one per token, shape \[N\] = \(16,\), got"):
            environment.step(cast(Any, wrong))
    for bad in (2, -1, 0.5):
        with pytest.raises(ValueError, match=r"expected 0 \(prune\) or 1 \(keep\), got .* for token_3"):
            environment.step(np.array([1.0, 1, 1, bad, *[1] * 12]))
    episode(environment, 0)
    with pytest.raises(RuntimeError, match="call reset"):
        environment.step(keep)
    with pytest.raises(ValueError, match=r"render_mode: expected None or one of"):
        make(render_mode="video")
    with pytest.raises(ValueError, match=r"dataset: .* empty dataset"):
        SingleAgentEnv(toy(CLASS_TOKEN), cast(Any, []))
    with pytest.raises(ValueError, match="index: expected 0 to 11, got 12"):
        environment.reset(options={"index": 12})


def test_built_in_environment_as_in_its_docstring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "BUILT_IN_IMAGES", 8)
    example = (SingleAgentEnv.__doc__ or "").split("Example:")[1].split("Version")[0]
    lines = [line.strip()[4:] for line in example.splitlines() if line.strip()]
    assert len(lines) == 6
    scope: dict[str, Any] = {"gymnasium": gymnasium}
    exec("\n".join(lines), scope)
    assert scope["macs"] > 0
    assert scope["env"].unwrapped.tokens.game.backbone.name == "vit_digits"
