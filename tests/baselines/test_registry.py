"""Baselines by name: what there is, what each takes, and what is said about mistakes."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any, cast

import pytest

from helpers import random_images, toy
from places import DOCS
from vitprune_env import Policy, TokenGame, baselines, play
from vitprune_env.baselines import EViT, Knob, RandomDrop, TopK
from vitprune_env.baselines.calibration import spread
from vitprune_env.baselines.registry import METHODS, all_blocks, backbone_sites, knob_of
from vitprune_env.errors import ParameterError, UnknownNameError


def test_make_gives_the_method_with_its_parameters() -> None:
    policy = baselines.make("evit", keep_rate=0.7, fuse=False)
    assert isinstance(policy, EViT)
    assert (policy.keep_rate, policy.fuse) == (0.7, False)
    assert isinstance(baselines.make("random", keep_rate=0.5, seed=3), RandomDrop)


def test_names_are_unique_sorted_and_all_known() -> None:
    names = baselines.available()
    assert list(names) == sorted({method.name for method in METHODS})
    assert len(names) == len(METHODS)
    assert {"evit", "topk", "random"} <= set(names)


@pytest.mark.parametrize("name", baselines.available())
def test_every_method_says_what_it_is_and_has_its_knob(name: str) -> None:
    method = baselines.describe(name)
    assert method.name == name
    assert method.summary
    assert method.source
    assert method.knob.name in method.parameters


@pytest.mark.parametrize("name", [method.name for method in METHODS if method.recipe is None])
def test_both_ends_of_every_knob_make_a_policy_that_plays(name: str) -> None:
    method, backbone = baselines.describe(name), toy("deit_tiny_patch16_224")
    sites = method.sites(backbone)
    images = random_images(backbone, 2)
    costs = []
    for position in (0.0, 1.0):
        setting = method.knob.setting(position, backbone.num_patches, len(sites))
        policy = method(**{**method.start, method.knob.name: setting})
        assert isinstance(policy, Policy)
        game = TokenGame.for_policy(backbone, policy, sites=sites)
        costs.append(float(play(game, policy, images).outcome.macs.mean()))
    assert costs[0] < costs[1]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("evitt", "unknown baseline 'evitt'; did you mean evit"),
        ("EViT", "unknown baseline 'EViT'"),
        ("zzz", "unknown baseline 'zzz'; known: "),
    ],
)
def test_unknown_names_are_answered_with_the_nearest(name: str, message: str) -> None:
    with pytest.raises(UnknownNameError, match=re.escape(message)):
        baselines.make(name, keep_rate=0.5)


def test_unknown_parameters_are_refused_by_name() -> None:
    with pytest.raises(
        ParameterError, match=r"^keep_ratio: no parameter of 'evit', which has keep_rate, fuse, leave; .*keep_rate\?"
    ):
        baselines.make("evit", keep_ratio=0.5)
    with pytest.raises(ParameterError, match=r"^x: no parameter of 'topk', which has keep_rate, leave$"):
        baselines.make("topk", keep_rate=0.5, x=1)
    parameters = "keep_rate, fuse, leave"
    with pytest.raises(ParameterError, match=rf"^keep_rate: 'evit' needs it; its parameters are {parameters}$"):
        baselines.make("evit", fuse=False)


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.1, float("nan")])
@pytest.mark.parametrize("name", ["evit", "topk", "random"])
def test_values_out_of_range_are_refused_by_name(name: str, rate: float) -> None:
    with pytest.raises(ValueError, match=r"^keep_rate: expected a number above 0 and at most 1"):
        baselines.make(name, keep_rate=rate)


@pytest.mark.parametrize("rate", ["0.5", None, True, [0.5]])
def test_values_of_another_type_are_refused_by_name(rate: object) -> None:
    with pytest.raises(TypeError, match=r"^keep_rate: expected a number above 0 and at most 1"):
        baselines.make("evit", keep_rate=rate)


def test_spread_mixes_floor_and_ceiling_evenly() -> None:
    assert spread(2.5, 4) == (2, 3, 2, 3)
    assert spread(3.0, 3) == (3, 3, 3)
    assert spread(0.25, 8) == (0, 0, 0, 1, 0, 0, 0, 1)
    for mean in (0.0, 0.3, 1.7, 12.9):
        assert sum(spread(mean, 12)) == int(12 * mean)
        assert set(spread(mean, 12)) <= {int(mean), int(mean) + 1}


def test_a_knob_turns_from_cheap_to_dear_whatever_its_direction() -> None:
    assert Knob("k", 2, 10, kind="real").setting(0.25, 64, 3) == 4.0
    assert Knob("k", 2, 10, rising=False).setting(0.25, 64, 3) == 8.0
    assert Knob("k", 0, None, kind="integer").setting(0.5, 64, 3) == 32
    assert Knob("r", 0, None, rising=False, kind="schedule").setting(0.0, 64, 3) == (64, 64, 64)
    assert Knob("r", 0, 5, rising=False, kind="schedule").setting(0.5, 64, 4) == (2, 3, 2, 3)


def test_a_schedule_grows_in_sum_with_its_position() -> None:
    knob = Knob("samples", 1, None, kind="schedule")
    sums = [sum(cast(Any, knob.setting(position / 200, 64, 12))) for position in range(201)]
    assert all(a <= b for a, b in pairwise(sums))
    assert all(b - a <= 4 for a, b in pairwise(sums))


def test_a_class_is_known_by_itself() -> None:
    assert knob_of(TopK) is baselines.describe("topk").knob
    assert knob_of(lambda rate: TopK(rate)).name == "keep_rate"


def test_sites_of_comparisons() -> None:
    backbone = toy("deit_tiny_patch16_224")
    assert backbone_sites(backbone) == backbone.default_sites
    assert all_blocks(backbone) == ["1.attn", "2.attn", "3.attn", "4.attn"]


def test_random_methods_are_known_by_their_seed() -> None:
    assert baselines.describe("random").is_random
    assert not baselines.describe("evit").is_random


def test_the_documentation_lists_every_method() -> None:
    text = (DOCS / "baselines.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| (`.*?`) \|", text, flags=re.MULTILINE)
    assert {name.strip("`") for row in listed for name in row.split(", ")} >= set(baselines.available())
