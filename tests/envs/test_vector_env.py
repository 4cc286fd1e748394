"""The batched environment: the same game as the PettingZoo one, and where its images come from."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from helpers import random_images, toy
from vitprune_env.envs.parallel import parallel_env
from vitprune_env.envs.vector import DEFAULT_NUM_ENVS, TokenVectorEnv
from vitprune_env.game.rewards import PaperReward, RewardFn, SharedOutcome, log_probability
from vitprune_env.game.token_game import TokenGame

NAME = "deit_tiny_patch16_224"
REWARDS: tuple[RewardFn, ...] = (SharedOutcome(outcome=log_probability), PaperReward(outcome=log_probability))


def numbered(size: int = 10) -> TensorDataset:
    """Images whose first pixel is their number."""
    images = random_images(toy(NAME), size)
    images[:, 0, 0, 0] = torch.arange(size)
    return TensorDataset(images, torch.arange(size) % 7)


class Spy(TokenGame):
    """A game that remembers which images it was given."""

    seen: list[list[int]]

    def reset(self, images: Tensor, labels: Tensor | None = None) -> Any:
        self.seen = [*getattr(self, "seen", []), images[:, 0, 0, 0].long().tolist()]
        assert labels is not None
        assert (images[:, 0, 0, 0].long() % 7 == labels).all()
        return super().reset(images, labels)


def drawn(data: Any, resets: int, **options: Any) -> list[list[int]]:
    """The numbers of the images of each batch."""
    game = Spy(toy(NAME))
    venv = TokenVectorEnv(game, data, **options)
    for _ in range(resets):
        venv.reset()
    return game.seen


@given(
    name=st.sampled_from([NAME, "vit_medium_patch16_gap_240"]),
    reward=st.sampled_from(REWARDS),
    seed=st.integers(0, 99),
    kind=st.sampled_from([torch.bool, torch.int64, torch.uint8]),
)
def test_plays_the_game_of_the_pettingzoo_environment(
    name: str, reward: RewardFn, seed: int, kind: torch.dtype
) -> None:
    backbone, generator = toy(name), torch.Generator().manual_seed(seed)
    dataset = TensorDataset(random_images(backbone, 6), torch.arange(6))
    indices = [4, 0, 4, 3]
    venv = TokenVectorEnv(TokenGame(backbone, reward=reward), cast(Any, dataset), num_envs=4, seed=0)
    observations, infos = venv.reset(options={"indices": indices})
    singles = [parallel_env(backbone, cast(Any, dataset), reward=reward) for _ in indices]
    rows = [single.reset(options={"index": index})[0] for single, index in zip(singles, indices, strict=True)]
    for step in range(venv.num_steps):
        for image, row in enumerate(rows):
            np.testing.assert_allclose(observations[image], np.stack([*row.values()]), atol=1e-5)
        actions = torch.rand(4, backbone.num_patches, generator=generator) < 0.6
        observations, rewards, terminations, truncations, infos = venv.step(actions.to(kind))
        for image, single in enumerate(singles):
            choices = dict(zip(single.agents, actions[image].int().tolist(), strict=True))
            rows[image], paid, terminated, truncated, facts = single.step(choices)
            np.testing.assert_allclose(rewards[image], list(paid.values()), atol=1e-5)
            assert terminations[image].tolist() == list(terminated.values())
            assert truncations[image].tolist() == list(truncated.values())
            assert infos["alive"][image].tolist() == [info["alive"] for info in facts.values()]
        assert terminations.all() == (step == venv.num_steps - 1)
    assert not observations.any()
    for image, single in enumerate(singles):
        outcome = single.outcome()
        assert torch.equal(infos["n_kept"][image], outcome.n_kept[0])
        assert infos["macs"][image] == outcome.macs[0]
        assert outcome.correct is not None
        assert infos["correct"][image] == outcome.correct[0]
        np.testing.assert_allclose(infos["logits"][image], outcome.logits[0], atol=1e-4)


def test_shapes_spaces_and_names() -> None:
    backbone = toy(NAME)
    venv = TokenVectorEnv(TokenGame(backbone), cast(Any, numbered()), num_envs=3, seed=0)
    n, d = backbone.num_patches, backbone.embed_dim
    observations, infos = venv.reset()
    assert observations.shape == venv.observation_space.shape == (3, n, d)
    assert venv.single_observation_space.shape == (n, d)
    assert venv.action_space.shape == (3, n)
    assert venv.single_action_space.shape == (n,)
    assert venv.observation_space.contains(observations.numpy())
    assert infos["alive"].shape == (3, n)
    assert infos["alive"].all()
    assert venv.observation().alive.shape == (3, n)
    for last in (False, False, True):
        observations, rewards, terminations, truncations, infos = venv.step(venv.action_space.sample())
        assert observations.shape == (3, n, d)
        assert rewards.shape == terminations.shape == truncations.shape == infos["alive"].shape == (3, n)
        assert set(infos) == {"alive", "correct", "macs", "n_kept", "logits"} if last else {"alive"}
    assert infos["logits"].shape == (3, 7)
    assert infos["n_kept"].shape == (3, 3)
    assert infos["macs"].shape == infos["correct"].shape == (3,)
    assert torch.equal(venv.outcome().logits, infos["logits"])
    assert venv.metadata["autoreset_mode"].value == "Disabled"
    with pytest.raises(RuntimeError, match="call reset"):
        venv.step(torch.ones(3, n, dtype=torch.bool))
    venv.reset()
    venv.close()


def test_actions_of_dead_agents_are_ignored() -> None:
    backbone = toy(NAME)
    venv = TokenVectorEnv(TokenGame(backbone), cast(Any, numbered()), num_envs=2, seed=0)
    venv.reset()
    keep = torch.ones(2, backbone.num_patches, dtype=torch.bool)
    keep[1, 4] = False
    observations, *_ = venv.step(keep)
    assert not observations[1, 4].any()
    observations, *_, infos = venv.step(torch.ones_like(keep))
    assert torch.equal(infos["alive"], keep)
    assert not observations[1, 4].any()


class WithBatch(Dataset[Any]):
    """A dataset that draws many images at once, and only so."""

    def __init__(self, size: int = 10) -> None:
        self.source = numbered(size)

    def __len__(self) -> int:
        return len(self.source)

    def batch(self, indices: list[int]) -> Any:
        return self.source[indices]


class Stream(IterableDataset[Any]):
    """Batches that come one after the other."""

    def __iter__(self) -> Iterator[Any]:
        images, labels = numbered().tensors
        yield from zip(images.split(4), labels.split(4), strict=True)


@pytest.mark.parametrize("make", [numbered, WithBatch])
def test_a_dataset_is_gone_through_in_random_order_epoch_by_epoch(make: Any) -> None:
    batches = drawn(make(), resets=5, num_envs=4, seed=0)
    flat = [number for batch in batches for number in batch]
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10))
    assert flat[:10] != list(range(10))
    assert flat[:10] != flat[10:]


def test_a_dataset_may_be_smaller_than_a_batch() -> None:
    assert sorted(drawn(numbered(3), resets=1, num_envs=6, seed=0)[0]) == [0, 0, 1, 1, 2, 2]


def test_num_envs_by_default() -> None:
    assert len(drawn(numbered(), resets=1)[0]) == DEFAULT_NUM_ENVS
    assert len(drawn(DataLoader(numbered(), batch_size=5), resets=1)[0]) == 5


@pytest.mark.parametrize("num_envs", [1, 3, 4, 7, 12])
@pytest.mark.parametrize("kind", ["loader", "list", "iterable dataset"])
def test_batches_come_in_their_order_and_nothing_is_skipped(kind: str, num_envs: int) -> None:
    loader = DataLoader(numbered(), batch_size=4)
    data: Any = {"loader": loader, "list": list(loader), "iterable dataset": Stream()}[kind]
    flat = [number for batch in drawn(data, resets=5, num_envs=num_envs) for number in batch]
    assert flat == [i % 10 for i in range(5 * num_envs)]


def sources() -> dict[str, Any]:
    shared = torch.Generator().manual_seed(99)
    return {
        "dataset": numbered(),
        "loader": DataLoader(numbered(), batch_size=4, shuffle=True),
        "loader with its own generator": DataLoader(numbered(), batch_size=4, shuffle=True, generator=shared),
    }


@pytest.mark.parametrize("kind", sources())
def test_same_seed_same_images(kind: str) -> None:
    data = sources()[kind]
    first, again = (drawn(data, resets=6, num_envs=4, seed=1) for _ in range(2))
    assert first == again
    assert len({tuple(batch) for batch in first}) > 1


@pytest.mark.parametrize("kind", ["dataset", "loader"])
def test_copies_of_a_fresh_environment_draw_other_images(kind: str) -> None:
    def drawn_by(venv: TokenVectorEnv) -> list[list[int]]:
        for _ in range(6):
            venv.reset()
        return cast(Spy, venv.game).seen

    def twins(seed: int | None) -> tuple[TokenVectorEnv, TokenVectorEnv]:
        venv = TokenVectorEnv(Spy(toy(NAME)), sources()[kind], num_envs=4, seed=seed)
        return venv, copy.deepcopy(venv)

    fresh, copied = map(drawn_by, twins(None))
    assert fresh != copied
    fresh, copied = map(drawn_by, twins(0))
    assert fresh == copied


@pytest.mark.parametrize("kind", sources())
def test_reset_with_a_seed_begins_anew(kind: str) -> None:
    game = Spy(toy(NAME))
    venv = TokenVectorEnv(game, sources()[kind], num_envs=3, seed=0)
    for seed in (5, None, None, 5, None, None, 6, None, None):
        venv.reset(seed=seed)
    first, again, other = game.seen[:3], game.seen[3:6], game.seen[6:]
    assert first == again
    assert first != other


@pytest.mark.parametrize("kind", sources())
def test_the_global_random_state_is_left_alone(kind: str) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    drawn(sources()[kind], resets=4, num_envs=4)
    assert torch.equal(before, torch.get_rng_state())


def test_random_transforms_follow_the_seed() -> None:
    class Noisy(Dataset[Any]):
        def __len__(self) -> int:
            return 6

        def __getitem__(self, index: int) -> Any:
            return torch.randn(3, 64, 64), index

    def first_batch(seed: int) -> Tensor:
        venv = TokenVectorEnv(TokenGame(toy(NAME)), DataLoader(Noisy(), batch_size=2), seed=seed)
        return venv.reset()[0]

    assert torch.equal(first_batch(0), first_batch(0))
    assert not torch.equal(first_batch(0), first_batch(1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_plays_on_a_gpu() -> None:
    backbone = copy.deepcopy(toy(NAME)).to("cuda")
    venv = TokenVectorEnv(TokenGame(backbone), cast(Any, numbered()), num_envs=4, seed=0)
    observations, infos = venv.reset()
    for _ in range(venv.num_steps):
        observations, rewards, *_, infos = venv.step(venv.action_space.sample())
        assert observations.device.type == rewards.device.type == infos["alive"].device.type == "cuda"
    single = parallel_env(backbone, cast(Any, numbered()), on_prune="terminate", render_mode="rgb_array")
    single.reset(seed=0)
    while single.agents:
        single.step({agent: int(single.action_space(agent).sample()) for agent in single.agents})
        assert single.state_space.contains(single.state())
    assert isinstance(single.render(), np.ndarray)


def test_bad_actions_are_refused() -> None:
    n = toy(NAME).num_patches
    venv = TokenVectorEnv(TokenGame(toy(NAME)), cast(Any, numbered()), num_envs=2, seed=0)
    venv.reset()
    with pytest.raises(ValueError, match=r"actions: expected bool or integers of shape \[B, N\] = \(2, 16\), got"):
        venv.step(torch.ones(2, n - 1, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"got torch\.float32"):
        venv.step(torch.ones(2, n))
    for wrong in (2, -1):
        with pytest.raises(ValueError, match=rf"actions: expected 0 \(prune\) or 1 \(keep\), got {wrong}$"):
            venv.step(torch.full((2, n), wrong))
    assert not venv.game.steps


def test_bad_data_are_refused() -> None:
    game = TokenGame(toy(NAME))
    empty: list[Any] = []
    with pytest.raises(ValueError, match=r"data: .* empty dataset"):
        TokenVectorEnv(game, cast(Any, numbered(0)))
    with pytest.raises(ValueError, match=r"data: .* empty dataset"):
        TokenVectorEnv(game, empty)
    with pytest.raises(ValueError, match=r"data: .* empty dataset"):
        TokenVectorEnv(game, empty, num_envs=2).reset()
    with pytest.raises(TypeError, match=r"data: expected a dataset or an iterable of .*, got None"):
        TokenVectorEnv(game, cast(Any, None))
    with pytest.raises(TypeError, match=r"game: expected a TokenGame, .* got Backbone"):
        TokenVectorEnv(cast(Any, toy(NAME)), cast(Any, numbered()))
    with pytest.raises(ValueError, match="num_envs: expected at least 1, got 0"):
        TokenVectorEnv(game, cast(Any, numbered()), num_envs=0)
    venv = TokenVectorEnv(game, cast(Any, numbered()), num_envs=2)
    with pytest.raises(ValueError, match=r"options\['indices'\]: expected 2 items"):
        venv.reset(options={"indices": [0, 1, 2]})
    with pytest.raises(ValueError, match="index: expected 0 to 9, got 10"):
        venv.reset(options={"indices": [0, 10]})
    loader = TokenVectorEnv(game, DataLoader(numbered(), batch_size=2))
    with pytest.raises(ValueError, match=r"options\['indices'\]"):
        loader.reset(options={"indices": [0, 1]})
    once = TokenVectorEnv(game, iter([(random_images(toy(NAME), 2), torch.tensor([0, 1]))]))
    once.reset()
    with pytest.raises(ValueError, match="data: expected at least one batch"):
        once.reset()


def test_misspelt_options_are_refused() -> None:
    venv = TokenVectorEnv(TokenGame(toy(NAME)), cast(Any, numbered()), num_envs=2)
    for options, said in (({"indicess": [0, 1]}, "'indices', got 'indicess'"), ({"index": [0, 1]}, "got 'index'")):
        with pytest.raises(ValueError, match=f"options: expected .*{said}"):
            venv.reset(options=options)
    with pytest.raises(ValueError, match="options: expected 'index', got 'indx'"):
        parallel_env(toy(NAME), cast(Any, numbered())).reset(options={"indx": 3})
    with pytest.raises(TypeError, match="options: expected a dict"):
        venv.reset(options=cast(Any, [1]))
    for indices in (5, torch.tensor([True, False]), [0.0, 1.0]):
        with pytest.raises((TypeError, ValueError), match=r"^(index|options\['indices'\]): expected"):
            venv.reset(options={"indices": indices})
    with pytest.raises(TypeError, match="num_envs: expected a whole number"):
        TokenVectorEnv(TokenGame(toy(NAME)), cast(Any, numbered()), num_envs=cast(Any, 2.5))
