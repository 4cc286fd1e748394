"""Modules that were trained elsewhere, as policies: their cost, their budget, their files."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from games import NAME, OwnLabels
from helpers import toy
from vitprune_env import benchmark, check_policy, load_policy, save_policy
from vitprune_env.agents import ModulePolicy, TokenActor, TokenPolicy, calibrate_threshold, foreign, register_actor
from vitprune_env.envs.exits import DropMergeKeep, KeepOrMerge
from vitprune_env.errors import CheckpointError
from vitprune_env.game.rollout import play
from vitprune_env.game.token_game import TokenGame

DATA = OwnLabels(12)
DIM, AGENTS = 48, toy(NAME).num_patches


def network(outputs: int = 1, seed: int = 0) -> nn.Sequential:
    """What other frameworks make: 48 x 10 + 10 x outputs products, and weights that tell tokens apart."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, 10), nn.Tanh(), nn.Linear(10, outputs))


@pytest.fixture
def own_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreign, "_BUILDERS", {})


@pytest.mark.parametrize("outputs", [1, 2])
def test_its_products_are_counted(outputs: int) -> None:
    policy = ModulePolicy(network(outputs), DIM, sites=(1, 2))
    game = TokenGame.for_policy(toy(NAME), policy)
    outcome = play(game, policy, DATA.images).outcome
    decided = AGENTS + outcome.n_kept[:, 0]  # tokens that decide, at both sites together
    assert decided.unique().numel() > 1
    assert outcome.policy_macs.tolist() == (decided * (48 * 10 + 10 * outputs)).tolist()
    check_policy(policy, toy(NAME), DATA.images)


def test_one_logit_and_two_say_the_same() -> None:
    module = network(2)
    last = cast(nn.Linear, module[3])
    difference = nn.Linear(10, 1)
    with torch.no_grad():
        difference.weight.copy_(last.weight[1] - last.weight[0])
        difference.bias.copy_(last.bias[1] - last.bias[0])
    one = nn.Sequential(*module[:3], difference)
    game = TokenGame(toy(NAME), (1, 2, 3))
    for threshold in (-0.3, 0.0, 0.3):
        kept = [play(game, ModulePolicy(each, DIM, threshold=threshold), DATA.images).keep for each in (one, module)]
        assert torch.equal(*kept)
        assert 0 < kept[0].double().mean() < 1


@pytest.mark.parametrize("kind", [None, KeepOrMerge(), DropMergeKeep()])
def test_it_plays_as_the_same_network_of_this_package(kind: Any) -> None:
    actor = TokenActor(DIM, num_actions=2 if kind is None else kind.count(AGENTS))
    nn.init.normal_(actor.last.weight, generator=torch.Generator().manual_seed(0))
    ours = TokenPolicy(actor, 0.2, (1, 3), actions=kind)
    theirs = ModulePolicy(actor, DIM, threshold=0.2, sites=(1, 3), actions=kind)
    game = TokenGame.for_policy(toy(NAME), ours)
    pairs = [(ours, theirs), (ours.sampling(3), theirs.sampling(3))]
    if ours.num_actions == 2:
        pairs.append((ours.with_schedule((0.5, 0.25)), theirs.with_schedule((0.5, 0.25))))
    for first, second in pairs:
        expected, got = play(game, first, DATA.images), play(game, second, DATA.images)
        assert torch.equal(expected.keep, got.keep)
        assert torch.equal(expected.outcome.macs, got.outcome.macs)


def test_it_is_calibrated_and_stands_in_the_benchmark_at_the_budget() -> None:
    policy = ModulePolicy(network(), DIM)
    game = TokenGame.for_policy(toy(NAME), policy)
    target = 0.6 * game.cost.dense()
    calibrated = calibrate_threshold(game, policy, [DATA.images], target)
    assert isinstance(calibrated, ModulePolicy)
    assert 0.95 * target < float(play(game, calibrated, DATA.images).outcome.macs.mean()) <= target
    images = [(DATA.images, DATA.labels)]
    shared: dict[str, Any] = {"tune": images, "controls": False, "timing": None, "progress": False}
    dense, *rows = benchmark({"mine": policy}, toy(NAME), images, budgets=(0.6,), **shared).rows
    mine = next(row for row in rows if row.name == "mine")
    assert mine.group == "learned"
    assert mine.gmacs / dense.gmacs == pytest.approx(0.6, rel=0.05)
    assert mine.policy_gmacs > 0


class Scores(nn.Module):
    """The product of a matrix and a vector, which torch's counter leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(DIM))

    def forward(self, tokens: Tensor) -> Tensor:
        return (tokens @ self.weight)[:, None]


class ByHand(nn.Module):
    """Products written as a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.matrix = nn.Linear(DIM, 4), nn.Parameter(torch.ones(4, 2))

    def forward(self, tokens: Tensor) -> Tensor:
        return (self.first(tokens)[:, :, None] * self.matrix).sum(dim=1)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.pair, self.unused = nn.Linear(DIM, 4), nn.Bilinear(4, 4, 2), nn.Bilinear(4, 4, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.pair(self.narrow(tokens), self.narrow(tokens))


def test_products_that_cannot_be_counted_are_named() -> None:
    assert ModulePolicy(Scores(), DIM).actor.macs_per_token == DIM
    for module, part in ((Pair(), r"pair \(Bilinear\)"), (ByHand(), r"the module \(ByHand\)")):
        with pytest.raises(ValueError, match=f"macs_per_token: .* no products in {part}"):
            ModulePolicy(module, DIM)
        policy = ModulePolicy(module, DIM, macs_per_token=300, sites=(1,))
        outcome = play(TokenGame.for_policy(toy(NAME), policy), policy, DATA.images).outcome
        assert outcome.policy_macs.tolist() == [AGENTS * 300] * 12


@pytest.mark.usefixtures("own_names")
@pytest.mark.parametrize(
    "settings", [{}, {"macs_per_token": 777, "actions": KeepOrMerge(), "seed": 3, "sites": (1, 2)}]
)
def test_it_is_saved_and_deployed(settings: dict[str, Any], tmp_path: Path) -> None:
    register_actor("tanh_net", network)
    policy = ModulePolicy(network(seed=5), DIM, "tanh_net", threshold=0.1, info={"from": "elsewhere"}, **settings)
    path = save_policy(policy, tmp_path / "policy.safetensors")
    state = torch.get_rng_state()
    again = load_policy(path)
    assert torch.equal(torch.get_rng_state(), state)
    game = TokenGame.for_policy(toy(NAME), policy)
    expected, got = (play(game, each, DATA.images).outcome for each in (policy, again))
    assert torch.equal(expected.logits, got.logits)
    assert torch.equal(expected.macs, got.macs)
    assert (again.threshold, again.info) == (0.1, {"from": "elsewhere"})
    foreign._BUILDERS.clear()
    with pytest.raises(CheckpointError, match=r"register_actor\('tanh_net', <its builder>\) first"):
        load_policy(path)


@pytest.mark.usefixtures("own_names")
def test_a_module_without_a_name_or_of_another_shape_is_not_saved(tmp_path: Path) -> None:
    register_actor("tanh_net", network)
    with pytest.raises(CheckpointError, match=r"register_actor\(name, builder\)"):
        save_policy(ModulePolicy(network(), DIM), tmp_path / "policy.safetensors")
    with pytest.raises(CheckpointError, match=r"differs from this one"):
        save_policy(ModulePolicy(network(2), DIM, "tanh_net"), tmp_path / "policy.safetensors")
    assert not list(tmp_path.iterdir())


class Mixing(nn.Module):
    def forward(self, tokens: Tensor) -> Tensor:
        return tokens[:, :2] - tokens.mean()


class Flat(nn.Module):
    def forward(self, tokens: Tensor) -> Tensor:
        return tokens[:, 0]


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (nn.Linear(12, 2), r"\[rows, 48\] to logits .*, got RuntimeError"),
        (nn.LSTM(DIM, 2), r"got tuple for 8 rows"),
        (Flat(), r"got \[8\] for 8 rows"),
        (Mixing(), "depend on it alone"),
        (nn.Linear(DIM, 3), "expected the kind of the actor's 3 actions"),
    ],
)
def test_what_is_no_policy_is_refused(module: nn.Module, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ModulePolicy(module, DIM)


def test_other_mistakes_are_refused() -> None:
    with pytest.raises(TypeError, match=r"module: expected a torch\.nn\.Module"):
        ModulePolicy(cast(Any, torch.relu), DIM)
    with pytest.raises(TypeError, match="name: expected a string"):
        register_actor("", network)
    with pytest.raises(TypeError, match="builder: expected a function"):
        register_actor("x", cast(Any, network()))
    with pytest.raises(TypeError, match="start: expected a policy with a TokenActor"):
        ModulePolicy(network(), DIM).starting_actor()
