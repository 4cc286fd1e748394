"""Environments with actions, seeds and options of all kinds: refused, or the game of `TokenGame` goes on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fuzzing import ODD, TIMES, attempt, inputs, odd
from tiny import tiny_backbone, tiny_data
from vitprune_env import Decision, TokenGame, TokenVectorEnv, parallel_env
from vitprune_env.envs.gym import SingleAgentEnv
from vitprune_env.envs.gym_vector import SingleAgentVectorEnv

BACKBONE, DATA = tiny_backbone(), tiny_data()
GAME, N = TokenGame(BACKBONE), BACKBONE.num_patches
CHOICES = st.lists(st.integers(-1, 2), min_size=2 * N, max_size=2 * N)
TWISTS: dict[str, Any] = {
    "none": lambda values: values,
    "bool": torch.Tensor.bool,
    "numpy": torch.Tensor.numpy,
    "float": torch.Tensor.float,
    "flat": torch.flatten,
    "short": lambda values: values[:, 1:],
    "list": torch.Tensor.tolist,
}
indices = st.one_of(st.lists(st.integers(-1, len(DATA)), min_size=2, max_size=2), st.lists(odd, max_size=3), odd)
options = st.one_of(
    st.none(), st.builds(lambda name, value: {name: value}, st.sampled_from(["index", "indices", "indx", "x"]), indices)
)


@TIMES
def test_batched_games(times: int) -> None:
    @inputs(150 * times)
    @given(options, CHOICES, st.sampled_from(list(TWISTS)))
    def check(option: Any, values: list[int], twist: str) -> None:
        venv = TokenVectorEnv(GAME, DATA, num_envs=2, seed=0)
        if attempt(lambda: venv.reset(options=option)) is None:
            venv.reset(options={"indices": [0, 1]})
        elif option and "indices" in option and option["indices"] is not None:
            assert torch.equal(GAME._labels, DATA.tensors[1][torch.tensor(option["indices"])])
        chosen = torch.tensor(values).view(2, N)
        result = attempt(lambda: venv.step(TWISTS[twist](chosen)))
        if result is None:
            return
        kept = chosen.bool() if twist == "bool" else chosen > 0
        assert twist == "bool" or chosen.min() >= 0 >= chosen.max() - 1
        assert torch.equal(result[4]["alive"], kept)

    check()


@TIMES
def test_pettingzoo_games(times: int) -> None:
    env = parallel_env(BACKBONE, DATA)

    @inputs(100 * times)
    @given(options, CHOICES, odd, st.integers(0, 3))
    def check(option: Any, values: list[int], strange: Any, kind: int) -> None:
        if attempt(lambda: env.reset(seed=0, options=option)) is None:
            env.reset(seed=0)
        actions: Any = dict(zip(env.agents, [int(value > 0) for value in values], strict=False))
        if kind == 1:
            actions[env.agents[0]] = strange
        elif kind == 2:
            del actions[env.agents[0]]
        elif kind == 3:
            actions = values if strange is None else {**actions, "nobody": 0}
        result = attempt(lambda: env.step(actions))
        if result is None:
            return
        kept = [info["alive"] for info in result[4].values()]
        expected = [bool(actions[agent]) for agent in env.possible_agents]
        assert kept == expected

    check()


def test_options_of_others_are_left_to_them() -> None:
    """PettingZoo's own test passes one."""
    for env in (TokenVectorEnv(GAME, DATA, num_envs=2, seed=0), parallel_env(BACKBONE, DATA)):
        env.reset(seed=0, options={"options": 1})


def test_actions_are_a_dict() -> None:
    env: Any = parallel_env(BACKBONE, DATA)
    env.reset(seed=0)
    with pytest.raises(TypeError, match=r"^actions: expected a dict with one for each of env\.agents, got list$"):
        env.step([1] * N)


SEEDED = {
    "batched": lambda: TokenVectorEnv(GAME, DATA, num_envs=2),
    "PettingZoo": lambda: parallel_env(BACKBONE, DATA),
    "one agent": lambda: SingleAgentEnv(BACKBONE, DATA),
    "batched for one agent": lambda: SingleAgentVectorEnv(2, BACKBONE, DATA),
}


@pytest.mark.parametrize("kind", SEEDED)
def test_seeds_are_refused_or_the_same_images_come_again(kind: str) -> None:
    env: Any = SEEDED[kind]()
    for seed in ODD:
        first = attempt(lambda seed=seed: env.reset(seed=seed))
        assert (first is not None) == (seed is None or (type(seed) is int and seed >= 0))
        if seed is not None and first is not None:
            again = env.reset(seed=seed)
            assert str(first[0]) == str(again[0])


def test_the_games_are_the_same() -> None:
    venv = TokenVectorEnv(GAME, DATA, num_envs=1, seed=0)
    keep = np.array([[1, 0, 1, 1]])
    venv.reset(options={"indices": [2]})
    venv.step(keep)
    logits = venv.step(keep)[4]["logits"]
    images, labels = DATA.tensors[0][2:3], DATA.tensors[1][2:3]
    GAME.reset(images, labels)
    for _ in range(2):
        GAME.step(Decision(keep=torch.from_numpy(keep).bool()))
    torch.testing.assert_close(GAME.outcome().logits, logits)
