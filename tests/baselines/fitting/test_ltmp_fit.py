"""LTMP's training form agrees with its inference form; fitted thresholds meet the budget and beat unfitted ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers import TIMM_MODELS, golden, random_images, toy
from vitprune_env.baselines import RandomDrop, calibrate
from vitprune_env.baselines.fitting import Problem
from vitprune_env.baselines.ltmp.fitting import LTMPFitConfig, ThresholdTask, at_budget, fit_ltmp
from vitprune_env.baselines.ltmp.policy import LTMP
from vitprune_env.baselines.ltmp.training_pass import _step, run_training_pass
from vitprune_env.data import Digits, batches_of
from vitprune_env.engine.backbone import Backbone
from vitprune_env.engine.cost import CostModel
from vitprune_env.engine.masked import start_masked
from vitprune_env.errors import BudgetError, CheckpointError
from vitprune_env.game.rollout import evaluate, play
from vitprune_env.game.token_game import TokenGame
from vitprune_env.models.load import load_backbone
from vitprune_env.types import parse_sites

SITES = ("1.attn", 1, "3.attn", 4)  # two of them share one attention


def thresholds(policy: LTMP, sites: int) -> dict[str, Tensor]:
    """The thresholds of a policy as the training form takes them."""
    values = {"merge": policy.merge_thresholds, "prune": policy.prune_thresholds}
    return {name: torch.as_tensor(value).expand(sites) for name, value in values.items() if value is not None}


def threshold_task(backbone: Backbone, labels: tuple[str, ...], share: float, config: LTMPFitConfig) -> ThresholdTask:
    """The task of a fit at sites to a share of the dense MACs, on no images."""
    target, sites = share * CostModel.of(backbone).dense() / 1e9, parse_sites(labels, backbone.depth)
    return ThresholdTask(Problem(backbone, [], target, sites, labels, 0, config))


def check_agreement(backbone: Backbone, policy: LTMP, images: Tensor) -> None:
    """Same decisions, MACs and logits in both forms."""
    sites = parse_sites(policy.default_sites(backbone.depth) or (), backbone.depth)
    with torch.no_grad():
        episode = play(TokenGame.for_policy(backbone, policy), policy, images)
        start, limits = start_masked(backbone, images), thresholds(policy, len(sites))
        soft = run_training_pass(backbone, sites, start, limits, {"merge": 0.1, "prune": 0.01})
    assert torch.equal(soft.keep, episode.keep.float()), "also exactly 0 or 1"
    torch.testing.assert_close(soft.logits, episode.outcome.logits, atol=1e-4, rtol=0)
    assert torch.equal(soft.macs, episode.outcome.macs)


@pytest.mark.parametrize("name", ["golden", *TIMM_MODELS])
@settings(max_examples=5)
@given(
    merging=st.none() | st.floats(0.3, 1), pruning=st.none() | st.floats(0, 2), seed=st.integers(0, 2**31)
)  # fmt: skip
def test_training_form_is_inference_form(name: str, merging: float | None, pruning: float | None, seed: int) -> None:
    backbone = toy(name)
    average = 1 / (backbone.num_patches + backbone.num_prefix)
    if merging is None and pruning is None:
        merging, pruning = 0.0, 1 / average  # everybody leaves, but for who must stay
    policy = LTMP(merging, None if pruning is None else pruning * average, SITES)
    check_agreement(backbone, policy, random_images(backbone, 4, seed))


@pytest.mark.parametrize("name", ["ltmp_prune", "ltmp_mergeprune"])
def test_training_form_is_the_originals_inference(name: str, golden_backbone: Backbone, golden_images: Tensor) -> None:
    file = golden(name)
    policy = LTMP(file.get("merge_thresholds"), file.get("prune_thresholds"))
    check_agreement(golden_backbone, policy, golden_images)
    theirs = (file["trainform_eval_logits"] - file["logits"]).abs().max()
    assert theirs > 0.5, "the published training form is another model"


def test_a_step_forwards_and_a_sigmoid_backwards() -> None:
    margin = torch.tensor([-0.1, 0.0, 0.3], requires_grad=True)
    steps = _step(margin, 0.5)
    steps.sum().backward()
    assert steps.tolist() == [0, 0, 1]
    soft = torch.sigmoid(margin.detach() / 0.5)
    torch.testing.assert_close(margin.grad, soft * (1 - soft) / 0.5)


@pytest.mark.parametrize("variant", ["merge", "prune", "merge+prune"])
def test_loss_is_error_and_distance_to_the_budget(variant: Any, golden_backbone: Backbone) -> None:
    config = LTMPFitConfig(variant=variant, budget_weight=7.0, label_smoothing=0.1, merge_init=0.9)
    sites = ("2.attn", "5.attn")
    task = threshold_task(golden_backbone, sites, 0.4, config)
    images, labels = random_images(golden_backbone, 6), torch.arange(6)
    loss, metrics = task.loss(images, labels, torch.Generator())
    policy = task.policy()
    outcome = play(TokenGame.for_policy(golden_backbone, policy), policy, images).outcome
    share = float(outcome.macs.mean()) / CostModel.of(golden_backbone).dense()
    expected = F.cross_entropy(outcome.logits, labels, label_smoothing=0.1) + 7 * (share - 0.4) ** 2
    assert loss.item() == pytest.approx(float(expected), abs=1e-4)
    assert metrics["share"] == pytest.approx(share)
    loss.backward()
    assert share > 0.4, "so that the budget asks for less"
    signs = {name: value.grad.sign().tolist() for name, value in task.module.named_parameters()}
    budget = {"merge": [1.0, 1.0], "prune": [-1.0, -1.0]}  # downhill: merge thresholds fall, prune thresholds rise
    heavy = threshold_task(golden_backbone, sites, 0.4, replace(config, budget_weight=1e6))
    heavy.loss(images, labels, torch.Generator())[0].backward()
    signs = {name: value.grad.sign().tolist() for name, value in heavy.module.named_parameters()}
    assert signs == {name: budget[name] for name in config.names}


def test_thresholds_stay_in_range() -> None:
    task = threshold_task(toy("golden"), ("1.attn",), 0.4, LTMPFitConfig())
    with torch.no_grad():
        task.module.get_parameter("merge").fill_(1.5)
        task.module.get_parameter("prune").fill_(-0.5)
    task.after_step()
    assert task.policy() == LTMP((1.0,), (0.0,), ("1.attn",))


QUICK = LTMPFitConfig(calibration=32, checkpoint_every=2, validate_every=2).quick(4)


def test_fit_meets_the_budget_and_can_be_resumed(tmp_path: Path) -> None:
    backbone, data = load_backbone("vit_digits"), Digits("train", 96)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    target = 0.35 * CostModel.of(backbone).dense() / 1e9
    where = ("1.attn", "3.attn", "6.attn")
    policy = fit_ltmp(backbone, data, target, sites=where, output=tmp_path, config=QUICK)
    assert policy.default_sites(8) == where
    found = evaluate(TokenGame.for_policy(backbone, policy), policy, batches_of(data, 32, images=32))
    assert found.gmacs == pytest.approx(target, rel=0.03)
    assert policy.merge_thresholds != pytest.approx((QUICK.merge_init,) * 3), "they have been trained"
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    again = fit_ltmp(backbone, data, target, sites=where, output=tmp_path, resume=True, config=QUICK)
    assert again == policy
    with pytest.raises(CheckpointError, match="target_gmacs"):
        fit_ltmp(backbone, data, 2 * target, sites=where, output=tmp_path, resume=True, config=QUICK)


def test_budgets_out_of_reach() -> None:
    backbone, data = load_backbone("vit_digits"), Digits("train", 48)
    dense = CostModel.of(backbone).dense() / 1e9
    for target in (1.1 * dense, 0.05 * dense):
        with pytest.raises(BudgetError, match="budget: expected above"):
            fit_ltmp(backbone, data, target, config=QUICK)
    with pytest.raises(BudgetError, match=r"target_gmacs: these thresholds reach .* got"):
        at_budget(LTMP(None, 0.0), backbone, 0.5 * dense, batches_of(data, 48))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variant": "both"}, "variant: expected 'merge\\+prune', 'merge' or 'prune', got 'both'"),
        ({"prune_lr": 0.0}, "prune_lr: expected above 0"),
        ({"merge_temperature": -1.0}, "merge_temperature: expected above 0"),
        ({"merge_init": 1.2}, "merge_init: expected 0 to 1"),
        ({"label_smoothing": -0.1}, "label_smoothing: expected 0 to 1"),
        ({"budget_weight": -1.0}, "budget_weight: expected at least 0"),
        ({"batch_size": 0}, "batch_size: expected at least 1"),
    ],
)
def test_senseless_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LTMPFitConfig(**changes)


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.25, 0.35, 0.5])
def test_fitted_beats_unfitted_and_random(share: float) -> None:
    backbone, train = load_backbone("vit_digits"), Digits("train", 4096, seed=3)
    target = share * CostModel.of(backbone).dense() / 1e9
    some, held_out = batches_of(train, 128, images=512), batches_of(Digits("validation", 1000, seed=1), 125)
    fitted = fit_ltmp(backbone, train, target)
    found = evaluate(TokenGame.for_policy(backbone, fitted), fitted, held_out)
    assert found.gmacs == pytest.approx(target, rel=0.03)
    start = LTMPFitConfig().start(backbone)
    unfitted = at_budget(LTMP(start["merge"], start["prune"]), backbone, target, some)
    for other in (unfitted, calibrate(RandomDrop, target, backbone, some)):
        assert found.accuracy > evaluate(TokenGame.for_policy(backbone, other), other, held_out).accuracy + 0.01
