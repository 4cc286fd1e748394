"""A learner of one's own in one file: COMA trains to the budget, resumes to the bit, and computes what it should."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import runs
from games import NAME, OwnLabels, explored, toy_game
from helpers import toy
from places import EXAMPLES
from vitprune_env.agents import LearnerConfig, LightNetworks, TokenActor, TrainResult, load_policy, train
from vitprune_env.agents.learners.buffer import Trajectory
from vitprune_env.agents.learners.learner import Learner
from vitprune_env.envs.actions import KeepActions
from vitprune_env.errors import NumericalError
from vitprune_env.examples.custom_learner import COMA, COMAConfig
from vitprune_env.game.rollout import play
from vitprune_env.game.token_game import TokenGame

SMALL = LightNetworks(actor_hidden=(8,))
TINY = runs.but(runs.TINY, learner=COMAConfig(networks=SMALL), updates=6)
DATA = OwnLabels(64)
DIM = 48


def run(config: Any = TINY, **options: Any) -> TrainResult:
    return train(toy(NAME), DATA, **config.arguments, progress=False, **options)


def built(config: LearnerConfig) -> Any:
    return config.build(DIM, 25, 10, KeepActions(), torch.Generator().manual_seed(0))


def test_it_is_one_short_file() -> None:
    """Lines with code: at most 80."""
    source = (EXAMPLES / "custom_learner.py").read_text()
    texts = {
        line
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        for line in range(node.lineno, (node.end_lineno or 0) + 1)
    }
    lines = [line.strip() for number, line in enumerate(source.splitlines(), 1) if number not in texts]
    assert len([line for line in lines if line and not line.startswith("#")]) <= 80


def test_a_run_meets_its_budget_and_can_be_deployed(tmp_path: Path) -> None:
    result = run(output=tmp_path)
    assert 0.95 * result.target_macs < result.train_macs <= result.target_macs
    assert {"loss", "actor_loss", "vf_loss", "ent_loss", "grad_norm", "gradient_steps"} <= set(result.history[0])
    assert result.history[0]["gradient_steps"] == TINY.learner.epochs
    assert result.policy.info["algorithm"] == "COMA"
    loaded = load_policy(tmp_path / "policy.safetensors")
    game = TokenGame.for_policy(toy(NAME), loaded)
    assert torch.equal(play(game, loaded, DATA.images).keep, play(game, result.policy, DATA.images).keep)


def test_interrupted_and_resumed_gives_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, loss, calls = run(), COMA.loss, []

    def dying(self: COMA, *parts: Any) -> Any:
        calls.append(1)
        if len(calls) == 4 * TINY.learner.epochs + 2:  # in the middle of the fifth update
            raise RuntimeError("killed")
        return loss(self, *parts)

    monkeypatch.setattr(COMA, "loss", dying)
    with pytest.raises(RuntimeError, match="killed"):
        run(output=tmp_path)
    monkeypatch.setattr(COMA, "loss", loss)
    resumed = run(output=tmp_path, resume=True)
    for one, two in ((whole.policy.actor, resumed.policy.actor), (whole.critic, resumed.critic)):
        assert torch.equal(*(nn.utils.parameters_to_vector(module.parameters()) for module in (one, two)))
    assert whole.policy.threshold == resumed.policy.threshold
    timeless = [[{k: v for k, v in row.items() if k != "train_time"} for row in r.history] for r in (whole, resumed)]
    assert timeless[0] == timeless[1]


def test_the_advantage_is_counterfactual() -> None:
    """Under the agent's own policy it is 0 on average, and it does not depend on what the agent itself did."""
    algorithm = built(COMAConfig(networks=SMALL))
    _, games = explored(toy_game(), algorithm.actor, seed=0)
    with torch.no_grad():
        values = algorithm.critic(games)
        own = torch.arange(len(games)) == 7
        flipped = Trajectory(**{**vars(games), "action": torch.where(own, 1 - games.action, games.action)})
        changed = algorithm.critic(flipped)
    assert torch.allclose(values[7], changed[7], atol=1e-6), "Q of its actions, the others' held fixed"
    others = (games.image == games.image[7]) & ~own
    assert (values - changed)[others].abs().max() > 1e-4
    assert torch.equal(values[games.image != games.image[7]], changed[games.image != games.image[7]])
    prepared = algorithm.prepare(games)
    taken = values.gather(1, games.action[:, None]).squeeze(1)
    policy = algorithm.actor(games.tokens).softmax(dim=1)
    advantage = taken - (policy * values).sum(dim=1)
    assert torch.allclose(prepared["advantage"], advantage / advantage.std(), atol=1e-4)


def test_several_processes_sum_what_one_computes() -> None:
    """Losses and gradients are means over the rows of all processes."""
    whole, parts = built(COMAConfig(networks=SMALL, max_grad_norm=None)), []
    _, games = explored(toy_game(), whole.actor, seed=0)
    with torch.no_grad():
        whole._games, whole._prepared = games, whole.prepare(games)
    rows = torch.arange(40)
    report = whole._gradient(rows, 40)
    expected = [parameter.grad.clone() for parameter in whole.parameters() if parameter.grad is not None]
    split = built(COMAConfig(networks=SMALL, max_grad_norm=None))
    split._games, split._prepared = games, whole._prepared
    parts = [split._gradient(some, 40) for some in (rows[:15], rows[15:], rows[:0])]
    assert torch.allclose(sum(parts), report, atol=1e-5)
    found = [parameter.grad for parameter in split.parameters() if parameter.grad is not None]
    assert all(torch.allclose(one, two, atol=1e-5) for one, two in zip(expected, found, strict=True))


def test_what_is_missing_is_named() -> None:
    with pytest.raises(TypeError, match=r"learner: LearnerConfig does not override algorithm\(parts\)"):
        run(runs.but(TINY, learner=LearnerConfig()))

    class Lazy(LearnerConfig):
        def algorithm(self, parts: Any) -> Learner:
            return Learner(parts, self)

    with pytest.raises(TypeError, match="learner: Learner does not override loss"):
        run(runs.but(TINY, learner=Lazy(networks=SMALL)))


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (lambda loss, _: loss, r"expected \(loss, metrics\), a tensor and a dict, got Tensor"),
        (lambda loss, log: (loss.detach(), log), r"expected a scalar with a gradient, got shape \[\] without"),
        (lambda loss, log: (loss.expand(3), log), r"expected a scalar with a gradient, got shape \[3\] with"),
        (lambda loss, _: (loss, {"mine": loss}), r"metrics: expected \['actor_loss', .* got \['mine'\]"),
    ],
)
def test_what_a_loss_returns_is_checked(monkeypatch: pytest.MonkeyPatch, returned: Any, said: str) -> None:
    algorithm, loss = built(COMAConfig(networks=SMALL)), COMA.loss
    _, games = explored(toy_game(), algorithm.actor, seed=0)
    with torch.no_grad():
        algorithm._games, algorithm._prepared = games, algorithm.prepare(games)
    monkeypatch.setattr(COMA, "loss", lambda self, *parts: returned(*loss(self, *parts)))
    with pytest.raises(TypeError, match=said):
        algorithm._gradient(torch.arange(5), 5)


def test_a_loss_that_is_not_finite_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    loss = COMA.loss
    monkeypatch.setattr(
        COMA, "loss", lambda self, *parts: (loss(self, *parts)[0] * float("nan"), loss(self, *parts)[1])
    )
    with pytest.raises(NumericalError, match="loss: expected finite numbers"):
        run()


def test_the_start_does_not_depend_on_the_global_stream() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one, two = (nn.utils.parameters_to_vector(built(COMAConfig()).parameters()) for _ in range(2))
    assert torch.equal(one, two)
    assert torch.equal(before, torch.get_rng_state())
    assert isinstance(built(COMAConfig()).actor, TokenActor)


def test_the_loss_gets_what_was_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared: list[Any] = []
    prepare, loss, agreed = COMA.prepare, COMA.loss, []

    def watched_prepare(self: COMA, games: Trajectory) -> Any:
        prepared.append(prepare(self, games))
        return prepared[-1]

    def watched_loss(self: COMA, games: Trajectory, columns: Any, rows: torch.Tensor) -> Any:
        agreed.append(all(torch.equal(columns[name], value) for name, value in prepared[-1].items()))
        return loss(self, games, columns, rows)

    monkeypatch.setattr(COMA, "prepare", watched_prepare)
    monkeypatch.setattr(COMA, "loss", watched_loss)
    run()
    assert prepared[-1]["advantage"].abs().max() > 0
    assert agreed
    assert all(agreed)
