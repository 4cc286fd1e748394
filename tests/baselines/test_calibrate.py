"""Baselines meet the budget that they are asked for, and say so when they cannot."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import timm
import torch
from torch.utils.data import TensorDataset

from vitprune_env import Backbone, BasePolicy, Decision, Observation, Policy, TokenGame, load_backbone
from vitprune_env.baselines import EViT, Knob, RandomDrop, TopK, calibrate
from vitprune_env.errors import BudgetError, ParameterError, UnknownNameError
from vitprune_env.game.rollout import evaluate


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    torch.manual_seed(0)
    options = {"img_size": 128, "depth": 4, "embed_dim": 24, "num_heads": 3, "num_classes": 5}
    return load_backbone(timm.create_model("deit_tiny_patch16_224", **options))


@pytest.fixture(scope="module")
def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(4, 3, 128, 128, generator=generator), torch.randint(5, (4,), generator=generator))]


@pytest.mark.parametrize("share", [0.55, 0.7, 0.9])
@pytest.mark.parametrize("make", [RandomDrop, EViT])
def test_budget_is_met_from_above_by_less_than_a_token_per_site(
    backbone: Backbone, batches: list, share: float, make: type
) -> None:
    dense = TokenGame(backbone).cost.dense() / 1e9
    policy = calibrate(make, share * dense, backbone, batches, sites=backbone.default_sites)
    game = TokenGame.for_policy(backbone, policy, sites=backbone.default_sites)
    spent = evaluate(game, policy, batches).gmacs
    assert share * dense <= spent <= (share + 3 / backbone.num_patches) * dense


def test_unreachable_budget_names_the_range(backbone: Backbone, batches: list) -> None:
    with pytest.raises(BudgetError, match=r"target_gmacs: EViT reaches .* to .* GMACs here, got 1e-06"):
        calibrate(EViT, 1e-6, backbone, batches, sites=backbone.default_sites)
    dense = TokenGame(backbone).cost.dense() / 1e9
    with pytest.raises(BudgetError, match="RandomDrop reaches"):
        calibrate(RandomDrop, 1.01 * dense, backbone, batches)


def test_images_are_needed(backbone: Backbone) -> None:
    with pytest.raises(ValueError, match="data: expected at least one image"):
        calibrate(EViT, 0.1, backbone, [])


@dataclass
class Brightest(BasePolicy):
    """Keeps tokens that are longer than a threshold: how many depends on the image."""

    threshold: float

    def decide(self, obs: Observation) -> Decision:
        return Decision(keep=obs.scatter(obs.tokens.norm(dim=1) > self.threshold, fill=False))


def test_what_depends_on_the_image_is_calibrated_on_all_images(backbone: Backbone, batches: list) -> None:
    (images, labels), knob = batches[0], Knob("threshold", 0, 50, rising=False)
    images = images * torch.tensor([0.2, 1.0, 2.0, 4.0])[:, None, None, None]
    cases = [(images[:3], labels[:3]), (images[3:], labels[3:])]
    budget = 0.7 * TokenGame(backbone).cost.dense() / 1e9
    policy = calibrate(Brightest, budget, backbone, cases, sites=backbone.default_sites, knob=knob)
    assert budget <= spent(backbone, policy, cases) <= 1.02 * budget
    alone = calibrate(Brightest, budget, backbone, [(images[:1], labels[:1])], sites=backbone.default_sites, knob=knob)
    assert not 0.98 * budget <= spent(backbone, alone, cases) <= 1.02 * budget


@pytest.mark.parametrize("budget", [float("nan"), float("inf"), "0.5", None, True])
def test_budget_must_be_a_finite_number(backbone: Backbone, batches: list, budget: object) -> None:
    with pytest.raises(BudgetError, match="target_gmacs: expected a finite number of GMACs"):
        calibrate(EViT, budget, backbone, batches)


def spent(backbone: Backbone, policy: Policy, batches: list) -> float:
    game = TokenGame.for_policy(backbone, policy, sites=backbone.default_sites)
    return evaluate(game, policy, batches).gmacs


def test_name_class_and_callable_find_the_same_setting(backbone: Backbone, batches: list) -> None:
    budget, where = 0.6 * TokenGame(backbone).cost.dense() / 1e9, {"sites": backbone.default_sites}
    made = [
        calibrate("evit", budget, backbone, batches, fuse=False, **where),
        calibrate(EViT, budget, backbone, batches, fuse=False, **where),
        calibrate(lambda rate: EViT(rate, fuse=False), budget, backbone, batches, **where),
    ]
    assert all(isinstance(policy, EViT) and not policy.fuse for policy in made)
    assert len({policy.keep_rate for policy in made}) == 1
    with_fusion = calibrate("evit", budget, backbone, batches, **where)
    assert with_fusion.keep_rate < made[0].keep_rate  # the fused token has to be paid for


def test_a_data_set_serves_as_well_as_its_batches(backbone: Backbone, batches: list) -> None:
    images, labels = batches[0]
    dataset = TensorDataset(images, labels)
    budget = 0.7 * TokenGame(backbone).cost.dense() / 1e9
    assert calibrate("topk", budget, backbone, dataset) == calibrate("topk", budget, backbone, batches)


def test_unknown_names_and_parameters_are_refused(backbone: Backbone, batches: list) -> None:
    with pytest.raises(UnknownNameError, match="did you mean evit"):
        calibrate("evit_", 0.1, backbone, batches)
    with pytest.raises(ParameterError, match="fused: no parameter of 'evit'"):
        calibrate("evit", 0.1, backbone, batches, fused=True)


@dataclass
class FirstTokens(BasePolicy):
    """Drops whole numbers of tokens from the end: one number, or one per site."""

    drop: int | tuple[int, ...]

    def decide(self, obs: Observation) -> Decision:
        drop = self.drop if isinstance(self.drop, int) else self.drop[obs.step]
        rank = obs.alive.cumsum(dim=1)
        return Decision(keep=obs.alive & (rank <= (obs.num_alive - drop)[:, None]))


def test_integer_knobs_meet_the_budget_from_above(backbone: Backbone, batches: list) -> None:
    budget = 0.6 * TokenGame(backbone).cost.dense() / 1e9
    knob = Knob("drop", 0, None, rising=False, kind="integer")
    policy = calibrate(FirstTokens, budget, backbone, batches, sites=backbone.default_sites, knob=knob)
    assert isinstance(policy.drop, int)
    assert spent(backbone, policy, batches) >= budget > spent(backbone, FirstTokens(policy.drop + 1), batches)


def test_schedules_come_closer_than_a_single_whole_number(backbone: Backbone, batches: list) -> None:
    dense = TokenGame(backbone).cost.dense() / 1e9
    excess = {"integer": 0.0, "schedule": 0.0}
    for share in (0.55, 0.6, 0.65, 0.7, 0.75):
        for kind in excess:
            knob = Knob("drop", 0, None, rising=False, kind=kind)
            policy = calibrate(FirstTokens, share * dense, backbone, batches, sites=backbone.default_sites, knob=knob)
            excess[kind] += spent(backbone, policy, batches) / (share * dense) - 1
    assert 0 <= excess["schedule"] < excess["integer"] / 1.5
    assert excess["schedule"] / 5 < 0.01


def test_tolerance_stops_early_but_never_below_the_budget(backbone: Backbone, batches: list) -> None:
    budget, calls = 0.7 * TokenGame(backbone).cost.dense() / 1e9, []

    def make(rate: float) -> TopK:
        calls.append(rate)
        return TopK(rate)

    exact = calibrate(make, budget, backbone, batches)
    needed = len(calls)
    rough = calibrate(make, budget, backbone, batches, tolerance=0.05)
    assert len(calls) - needed < needed
    assert rough.keep_rate >= exact.keep_rate
    game = TokenGame.for_policy(backbone, rough)
    assert budget <= evaluate(game, rough, batches).gmacs <= 1.05 * budget
