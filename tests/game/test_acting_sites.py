"""Games, deployed models, calibration and files put a policy in the same place: the same for all methods by default."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import random_images, toy
from vitprune_env import BasePolicy, PrunedViT, TokenGame, load_pruned, save_policy
from vitprune_env.baselines import ATS, DPCMerge, EViT, LifeRegression, RandomDrop, ToMe, TopK, calibrate
from vitprune_env.baselines.registry import METHODS
from vitprune_env.deploy.policy_files import read_policy_file
from vitprune_env.engine.cost import CostModel
from vitprune_env.errors import SiteError
from vitprune_env.files import write_file
from vitprune_env.game.rollout import evaluate
from vitprune_env.models.load import load_backbone
from vitprune_env.types import Site, every_block, parse_sites

INSIDE = ["4.attn", "7.attn", "10.attn"]


class Late(BasePolicy):
    """A policy made to act at one place."""

    def default_sites(self, depth: int) -> list[int]:
        return [depth]


def labels(sites: tuple[Site, ...]) -> list[str]:
    return [site.label for site in sites]


@pytest.mark.parametrize(
    ("policy", "usual", "published"),
    [
        (EViT(0.7), ["3", "6", "9"], INSIDE),
        (TopK(0.7), ["3", "6", "9"], INSIDE),
        (DPCMerge(0.7), ["3", "6", "9"], INSIDE),
        (LifeRegression(0.7), ["3", "6", "9"], ["4", "7", "10"]),
        (LifeRegression(0.7, sites=(2, 5)), ["2", "5"], ["2", "5"]),
        (RandomDrop(0.7), ["3", "6", "9"], ["3", "6", "9"]),
        (ATS(), every_block(12), every_block(12)[3:]),
        (ToMe(3), every_block(12), every_block(12)),
        (Late(), ["12"], ["12"]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BasePolicy) else "",
)
def test_no_sites_mean_the_same_everywhere(policy: Any, usual: list[str], published: list[str]) -> None:
    backbone = toy("golden")
    for asked, expected in ((None, usual), ("published", published), ((2, "5.attn"), ["2", "5.attn"])):
        assert labels(backbone.sites_for(policy, asked)) == expected
        assert labels(TokenGame.for_policy(backbone, policy, sites=asked).sites) == expected
        if not policy.needs and not isinstance(policy, LifeRegression):
            assert labels(PrunedViT(backbone, policy, asked).sites) == expected
    assert labels(TokenGame.for_policy(backbone, policy).sites) == usual
    with pytest.raises(SiteError, match="sites: expected a non-empty sequence"):
        backbone.sites_for(policy, "publish")  # pyright: ignore[reportArgumentType]


def test_the_registry_says_where_methods_act_that_are_made_from_their_knob() -> None:
    backbone = load_backbone("vit_digits")
    for method in METHODS:
        if method.needs_only_knob:
            policy = method(**{**method.start, method.knob.name: method.knob.setting(1.0, 100, backbone.depth)})
            assert backbone.sites_for(policy) == parse_sites(method.sites(backbone), backbone.depth), method.name


def test_a_calibrated_policy_costs_its_budget_where_it_then_acts() -> None:
    backbone = load_backbone("vit_digits")
    batches = [(random_images(backbone, 2), torch.tensor([0, 1]))]
    budget = 0.5 * CostModel.of(backbone).dense() / 1e9
    found = {}
    for sites in (None, "published"):
        policy = calibrate("evit", budget, backbone, batches, sites)
        cost = evaluate(TokenGame.for_policy(backbone, policy, sites=sites), policy, batches).gmacs
        assert budget <= cost <= 1.03 * budget
        found[sites] = policy.keep_rate
    assert found[None] > 1.2 * found["published"], "a method that begins late has to prune harder"


def test_files_remember_where_a_policy_acts_beside_its_network(tmp_path: Path) -> None:
    """Files without sites are older: the policies in them acted at their published sites."""
    backbone = load_backbone("vit_digits")
    path = save_policy(EViT(0.5), tmp_path / "new.safetensors", backbone=backbone)
    assert labels(load_pruned(path).sites) == ["1", "3", "5"]
    header, tensors = read_policy_file(path)
    assert header.pop("sites") == ["1", "3", "5"]
    old = write_file(tmp_path / "old.safetensors", tensors, header)
    assert labels(load_pruned(old).sites) == ["3.attn", "5.attn", "7.attn"]
