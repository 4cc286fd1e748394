"""What an actor sees beside its token: by hand on a small grid, counted, saved, and the same in training and after."""

from __future__ import annotations

from dataclasses import replace
from math import log
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from games import NAME, OwnLabels
from helpers import everyday, random_images, toy
from ragged import check_batch_independence
from runs import TINY, but
from vitprune_env import PrunedViT, TokenGame, check_policy, evaluate
from vitprune_env.agents import (
    MAPPO,
    AdaptivePolicy,
    BudgetRange,
    ExploringPolicy,
    LightNetworks,
    PPOSingleConfig,
    TokenActor,
    TokenPolicy,
    load_policy,
    save_policy,
    train,
)
from vitprune_env.agents.senses import SENSES, Sense, needed, neighbour_table, register_sense, see, seen_width
from vitprune_env.cli.flags.training import NetworkFlags
from vitprune_env.engine.cost import mlp_macs
from vitprune_env.errors import SettingsError
from vitprune_env.game.rollout import play
from vitprune_env.types import Observation, Site

DATA = OwnLabels(48)
ALL = tuple(SENSES)
SOME = ("neighbours", "class_attention")


def on_grid(alive: Tensor, tokens: Tensor, rows: int, **changes: Any) -> Observation:
    """Alive tokens `[B, N]` of a grid with so many rows; tokens `[B, N, D]`."""
    batch, count = alive.shape
    columns = count // rows
    place = torch.arange(count)
    image, token = alive.nonzero().T
    return Observation(
        tokens=tokens[alive],
        image=image,
        token=token,
        offsets=torch.cat([torch.zeros(1, dtype=torch.int64), alive.sum(dim=1).cumsum(0)]),
        cls=torch.ones(batch, tokens.shape[2]),
        alive=alive,
        size=alive.float(),
        order=torch.zeros(batch, count, dtype=torch.int64),
        position=torch.stack([place // columns / max(1, rows - 1), place % columns / (columns - 1)], dim=1),
        **{"site": Site.parse("1.attn"), "step": 0, "num_steps": 2, "depth": 4, **changes},
    )


def standard(*values: float) -> Tensor:
    """The values with mean 0 and variance 1, worked out one by one."""
    mean = sum(values) / len(values)
    spread = (sum((value - mean) ** 2 for value in values) / len(values) + 1e-5) ** 0.5
    return torch.tensor([(value - mean) / spread for value in values])


def columns(obs: Observation, name: str) -> Tensor:
    """What one sense adds."""
    return SENSES[name].see(obs)


def test_neighbours_in_a_grid() -> None:
    place = torch.tensor([[row / 1, column / 3] for row in range(2) for column in range(4)])
    number, exists = neighbour_table(place)
    found = [set(one[there].tolist()) for one, there in zip(number, exists, strict=True)]
    assert found == [
        {1, 4, 5}, {0, 2, 4, 5, 6}, {1, 3, 5, 6, 7}, {2, 6, 7},
        {0, 1, 5}, {0, 1, 2, 4, 6}, {1, 2, 3, 5, 7}, {2, 3, 6},
    ]  # fmt: skip
    number, exists = neighbour_table(torch.tensor([[0.0, 0.0], [0.0, 0.5], [0.0, 1.0]]))  # a single row
    assert [set(one[there].tolist()) for one, there in zip(number, exists, strict=True)] == [{1}, {0, 2}, {1}]


def test_columns_by_hand() -> None:
    """A grid of 3 x 3 of which the corners 0 and 8, the edge 1 and the middle 4 are alive; another with one token."""
    alive = torch.zeros(2, 9, dtype=torch.bool)
    alive[0, [0, 1, 4, 8]] = True
    alive[1, 6] = True
    tokens = torch.full((2, 9, 3), 99.0)  # the dead must not count
    tokens[0, [0, 1, 4, 8]] = torch.tensor([[1.0, 0, 0], [0, 2, 0], [0, 0, 4], [5, 5, 8]])
    attention = torch.tensor([0.1, 0.2, 0.4, 0.1, 0.7])
    obs = on_grid(alive, tokens, 3, evidence={"cls_attention": attention})
    around = columns(obs, "neighbours")
    assert torch.allclose(around[0], standard(0, 1, 2), atol=1e-6)  # 1 and 4
    assert torch.allclose(around[2], standard(2, 7 / 3, 8 / 3), atol=1e-6)  # 0, 1 and 8
    assert torch.allclose(around[3], standard(0, 0, 4), atol=1e-6)  # 4
    assert around[4].tolist() == [0, 0, 0]  # alone
    assert torch.allclose(columns(obs, "crowd")[:, 0], torch.tensor([2, 2, 3, 1, 0]) / 4 - 1)
    relative = [log(share / 0.2) for share in (0.1, 0.2, 0.4, 0.1)]
    assert torch.allclose(columns(obs, "class_attention")[:, 0], torch.tensor([*relative, 0.0]), atol=1e-6)
    assert torch.allclose(columns(obs, "alive")[:, 0], 2 * torch.tensor([4, 4, 4, 4, 1]) / 9 - 1)
    assert torch.allclose(columns(obs, "site"), torch.full((5, 1), 1 / 4 - 1))  # one of eight halves
    assert columns(obs, "position").tolist() == [[-1, -1], [-1, 0], [0, 0], [1, 1], [1, -1]]
    assert torch.allclose(columns(obs, "class_token"), torch.zeros(5, 3), atol=1e-6)  # all ones
    merged = replace(obs, size=4 * obs.size)
    assert columns(merged, "size")[:, 0].tolist() == [2.0] * 5


def test_no_part_drowns_another() -> None:
    tokens = torch.randn(2, 9, 6, generator=torch.Generator().manual_seed(0))
    obs = on_grid(torch.ones(2, 9, dtype=torch.bool), tokens, 3, evidence={"cls_attention": torch.full((18,), 1 / 9)})
    seen = see(obs, ALL).tokens
    assert seen.shape == (18, seen_width(ALL, 6))
    large = see(replace(obs, tokens=1000 * obs.tokens + 7), ALL).tokens
    assert torch.allclose(seen, large, atol=1e-3)
    assert 0.1 < float(seen[:, :6].square().mean()) < 2
    assert see(obs, ()) is obs


def sensing(senses: tuple[str, ...] = SOME, seed: int = 0, **settings: Any) -> TokenPolicy:
    """A policy whose untrained actor keeps about half of the tokens."""
    actor = TokenActor(48, (8,), generator=torch.Generator().manual_seed(seed), senses=senses)
    torch.nn.init.normal_(actor.last.weight, generator=torch.Generator().manual_seed(seed))
    torch.nn.init.zeros_(actor.last.bias)
    return TokenPolicy(actor, **settings)


@pytest.mark.parametrize("name", ALL)
def test_every_sense_changes_what_is_decided(name: str) -> None:
    """Its columns reach the actor; but for `size`, which is 1 as long as nothing merges."""
    policy, game = sensing((name,)), TokenGame(toy(NAME), (1, 2, 3), needs=needed((name,)))
    before = play(game, policy, DATA.images[:6]).keep
    with torch.no_grad():
        first: Any = policy.actor.layers[0]
        first.weight[:, 48:] = 0
    assert torch.equal(before, play(game, policy, DATA.images[:6]).keep) == (name == "size")


def test_decisions_do_not_depend_on_the_batch() -> None:
    policy = sensing(ALL)
    check_policy(policy, toy(NAME), random_images(toy(NAME), 4))
    check_batch_independence(policy, seed=1, name=NAME)


def test_every_mac_is_counted() -> None:
    """Evidence: D for every row; neighbours: 8 D; the actor: its matrices, the first of which is 2 D + 1 wide."""
    policy, backbone = sensing(), toy(NAME)
    game = TokenGame.for_policy(backbone, policy, sites=("1",))
    outcome = play(game, policy, DATA.images[:4]).outcome
    tokens = backbone.num_patches
    mine = tokens * (8 * 48 + (2 * 48 + 1) * 8 + 8 * 2)
    assert outcome.policy_macs.tolist() == [mine + (tokens + 1) * 48] * 4
    assert policy.actor.macs_per_token == 8 * 48 + mlp_macs((97, 8, 2))


def test_deployed_play_sees_what_training_saw() -> None:
    policy = sensing(ALL)
    explorer = ExploringPolicy(policy.actor, torch.Generator().manual_seed(3))
    assert explorer.needs == policy.needs == {"cls_attention"}
    game = TokenGame(toy(NAME), (1, 2, 3), needs=policy.needs)
    assert torch.equal(play(game, policy.sampling(3), DATA.images).keep, play(game, explorer, DATA.images).keep)


@pytest.mark.parametrize("kind", everyday(["mappo", "ppo_single", "adaptive"], "mappo"))
def test_trained_saved_and_deployed(kind: str, tmp_path: Path) -> None:
    config = but(TINY, senses=SOME, updates=2)
    if kind == "ppo_single":
        config = replace(config, learner=PPOSingleConfig(minibatch=256, networks=config.learner.networks))
    if kind == "adaptive":
        config = replace(config, budget=BudgetRange(0.45, 0.8, anneal_from=0.7))
    backbone = toy(NAME)
    result = train(backbone, DATA, **config.arguments, progress=False, output=tmp_path)
    loaded = load_policy(tmp_path / "policy.safetensors")
    assert isinstance(loaded, AdaptivePolicy if kind == "adaptive" else TokenPolicy)
    assert loaded.senses == SOME
    assert loaded.needs == {"cls_attention"}
    assert loaded.width == backbone.embed_dim
    game = TokenGame.for_policy(backbone, loaded)
    batch = DATA.batch(torch.arange(48))
    assert evaluate(game, loaded, [batch]).macs == pytest.approx(result.train_macs)
    assert result.train_macs <= result.target_macs * (1.05 if kind == "adaptive" else 1)
    logits = play(game, result.policy, batch[0]).outcome.logits
    assert torch.allclose(PrunedViT(backbone, loaded).eval()(batch[0]), logits, atol=1e-5)


def test_training_resumes_to_the_same_bits(tmp_path: Path) -> None:
    config = but(TINY, senses=SOME)
    whole = train(toy(NAME), DATA, **config.arguments, progress=False)
    update, calls = MAPPO.update, []

    def failing(self: MAPPO, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:  # checkpoints are those of updates 2, 4 and 6
            raise RuntimeError("the machine went down")
        return update(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MAPPO, "update", failing)
        with pytest.raises(RuntimeError, match="went down"):
            train(toy(NAME), DATA, **config.arguments, progress=False, output=tmp_path)
    again = train(toy(NAME), DATA, **config.arguments, progress=False, output=tmp_path, resume=True)
    for one, two in zip(whole.policy.actor.parameters(), again.policy.actor.parameters(), strict=True):
        assert torch.equal(one, two)
    assert whole.policy.threshold == again.policy.threshold


def test_a_start_brings_its_senses() -> None:
    """The critic sees what the actor sees, whatever the settings say."""
    config = but(TINY, updates=1)
    start = sensing(sites=("1", "2", "3"))
    result = train(toy(NAME), DATA, **config.arguments, progress=False, start=start)
    assert result.policy.senses == SOME
    assert getattr(result.critic, "width", None) == 97


def test_a_sense_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitprune_env.agents.senses.SENSES", dict(SENSES))
    mine = Sense("depth", lambda obs: torch.full((len(obs.token), 1), float(obs.depth)), 1)
    register_sense(mine)
    again = load_policy(save_policy(sensing(("depth",)), tmp_path / "policy.safetensors"))
    assert isinstance(again, TokenPolicy)
    assert again.senses == ("depth",)
    with pytest.raises(SettingsError, match="name: expected one that is not taken, got 'depth'"):
        register_sense(replace(mine, columns=2))


@pytest.mark.parametrize("names", [("smell",), ("alive", "alive")])
def test_unknown_senses_are_refused(names: tuple[str, ...]) -> None:
    with pytest.raises(
        SettingsError, match=r"senses: expected different ones of neighbours, .*, got (smell|alive, al)"
    ):
        LightNetworks(senses=names)


def test_the_flag_names_them() -> None:
    assert NetworkFlags(senses=SOME).made().senses == SOME
