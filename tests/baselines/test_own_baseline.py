"""A baseline of one's own: one file with policy, task and recipe, and one entry in the registry."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from games import NAME, OwnLabels
from helpers import toy
from vitprune_env import BasePolicy, Decision, Observation, TokenGame, baselines, play
from vitprune_env.baselines import DynamicViTConfig, FitConfig, Method, registry
from vitprune_env.baselines.fitting import KeepRateConfig, KeepRateRecipe, KeepRateTask
from vitprune_env.engine.masked import classify_masked
from vitprune_env.engine.walk import Arrival, Masked, Walk
from vitprune_env.errors import CheckpointError, SiteError, UnknownNameError
from vitprune_env.policy import keep_top

# What a user writes: the file ...


class LinearScore(BasePolicy, nn.Module):
    """Keeps the tokens with the largest scores of one linear layer."""

    def __init__(self, keep_rate: float, embed_dim: int = 48, seed: int = 0) -> None:
        super().__init__()
        self.keep_rate, self.embed_dim, self.seed = keep_rate, embed_dim, seed
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(embed_dim, generator=generator) / embed_dim**0.5)

    def decide(self, obs: Observation) -> Decision:
        return Decision(keep_top(obs, obs.tokens @ self.weight, (obs.num_alive * self.keep_rate).ceil()))

    def at(self, value: float) -> Self:
        other = type(self)(value, self.embed_dim, self.seed)
        other.weight = self.weight
        return other

    def config(self) -> dict[str, Any]:
        return {"keep_rate": self.keep_rate, "embed_dim": self.embed_dim, "seed": self.seed}


class LinearScoreTask(KeepRateTask[LinearScore]):
    def loss(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        def weigh(arrival: Arrival[Any]) -> Any:
            scores = arrival.state.tokens @ self.policy.weight
            return arrival.state.with_weights((scores - scores.mean(dim=1, keepdim=True)).sigmoid())

        backbone = self.game.backbone
        last = Walk(Masked(backbone), self.game.sites).through(self.data.state(images), weigh)
        return F.cross_entropy(classify_masked(backbone, last, last.weights), labels), {}


RECIPE = KeepRateRecipe(
    config=KeepRateConfig(FitConfig(steps=12, batch_size=16, lr=0.05, validation=16, validate_every=4), images=0),
    sites=lambda backbone: backbone.default_sites,
    untrained=lambda problem: LinearScore(1.0, problem.backbone.embed_dim, problem.seed),
    make_task=LinearScoreTask,
)

# ... and the entry.

ENTRY = Method("linear_score", LinearScore, "keeps a share of the tokens, by a linear score", "-", recipe=RECIPE)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "METHODS", (*registry.METHODS, ENTRY))


def spent(policy: Any, data: OwnLabels) -> tuple[float, float]:
    """GMACs and cross-entropy."""
    backbone = toy(NAME)
    game = TokenGame.for_policy(backbone, policy)
    with torch.no_grad():
        outcome = play(game, policy, data.images).outcome
    return float(outcome.macs.mean()) / 1e9, float(F.cross_entropy(outcome.logits, data.labels))


@pytest.mark.usefixtures("registered")
def test_an_entry_is_all_that_names_need() -> None:
    assert "linear_score" in baselines.available()
    assert isinstance(baselines.make("linear_score", keep_rate=0.5), LinearScore)
    backbone, data = toy(NAME), OwnLabels(64)
    target = 0.6 * TokenGame(backbone).cost.dense() / 1e9
    untrained = baselines.calibrate("linear_score", target, backbone, [(data.images, data.labels)])
    fitted = baselines.fit("linear_score", backbone, data, target, progress=False)
    assert isinstance(fitted, LinearScore)
    (macs, loss), (as_much, before) = spent(fitted, data), spent(untrained, data)
    assert target <= macs == as_much < 1.1 * target
    assert loss < before, "something was learnt"


def test_a_recipe_needs_no_entry(tmp_path: Path) -> None:
    backbone, data = toy(NAME), OwnLabels(64)
    target = 0.6 * TokenGame(backbone).cost.dense() / 1e9
    options: dict[str, Any] = {"seed": 3, "config": RECIPE.config.quick(), "progress": False, "sites": (1, 3)}
    first = baselines.fit(RECIPE, backbone, data, target, output=tmp_path, **options)
    again = baselines.fit(RECIPE, backbone, data, target, output=tmp_path, resume=True, **options)
    assert torch.equal(first.weight, again.weight)
    with pytest.raises(CheckpointError, match="another \\['seed'\\]"):
        baselines.fit(RECIPE, backbone, data, target, output=tmp_path, resume=True, **{**options, "seed": 4})


def test_names_and_functions_fit_the_same() -> None:
    backbone, data = toy(NAME), OwnLabels(48)
    target, config = 0.6 * TokenGame(backbone).cost.dense() / 1e9, DynamicViTConfig().quick()
    options: dict[str, Any] = {"config": config, "sites": (1, 2), "seed": 2, "progress": False}
    policies = [
        baselines.fit("dynamicvit", backbone, data, target, **options),
        baselines.fit(baselines.describe("dynamicvit"), backbone, data, target, **options),
        baselines.fit_dynamicvit(backbone, data, target, **options),
    ]
    states = [policy.state_dict() for policy in policies]
    assert all(torch.equal(value, other[name]) for other in states[1:] for name, value in states[0].items())


def test_what_cannot_be_fitted_is_refused() -> None:
    backbone, data = toy(NAME), OwnLabels(4)
    with pytest.raises(ValueError, match=r"^method: expected one with something to train \(.*\), got 'evit'"):
        baselines.fit("evit", backbone, data, 0.1)
    with pytest.raises(UnknownNameError, match="did you mean dynamicvit"):
        baselines.fit("dynamic_vit", backbone, data, 0.1)
    with pytest.raises(SiteError, match="sites: expected blocks 1 to 4"):
        baselines.fit("dynamicvit", backbone, data, 0.1, sites=(1, 9))
