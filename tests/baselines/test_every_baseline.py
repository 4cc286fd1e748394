"""What all baselines owe: they play on every kind of ViT, on ragged batches, survive a file, and say what is wrong."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from helpers import golden, make_model, random_images, toy
from ragged import check_batch_independence, play_ragged, ragged_keep
from vitprune_env import PrunedViT, TokenGame, baselines, check_policy, load_backbone, play
from vitprune_env.baselines import DPCKNN, DPCMerge, DynamicViT, EvoViT, LifeRegression, Method, RandomDrop, ToMe
from vitprune_env.baselines.registry import METHODS
from vitprune_env.engine.backbone import Backbone
from vitprune_env.errors import EvidenceError

KINDS = (
    "deit_tiny_distilled_patch16_224",
    "vit_base_patch16_224",  # pools the patches beside a class token
    "vit_medium_patch16_gap_240",  # no class token
    "vit_small_patch14_reg4_dinov2",
)
NAME = "deit_tiny_patch16_224"
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
DETERMINISTIC = [method for method in METHODS if not method.is_random]


def made(method: Method, backbone: Backbone, num_sites: int) -> Any:
    """A method that prunes about half of what it sees."""
    values = {"keep_rate": 0.6, "r": 2, "merge_thresholds": 0.6, "prune_thresholds": 0.4 / backbone.num_patches}
    values |= {"threshold": 0.0, "embed_dim": backbone.embed_dim, "num_sites": num_sites}
    needed = {name for name, value in method.parameters.items() if value.default is value.empty}
    given = {name: values[name] for name in needed | {method.knob.name, *method.start} if name in values}
    return method(**{**method.start, **given})


@every_method
@pytest.mark.parametrize("kind", KINDS)
def test_it_keeps_the_contract_or_refuses_by_name(method: Method, kind: str) -> None:
    backbone = toy(kind)
    policy, images = made(method, backbone, 3), random_images(backbone, 3)
    if "cls_attention" in policy.needs and not backbone.has_class_token:
        with pytest.raises(EvidenceError, match="'cls_attention' asks for a class token"):
            PrunedViT(backbone, policy)
        return
    check_policy(policy, backbone, images, deterministic=not method.is_random)
    if not method.is_random:
        logits = play(TokenGame.for_policy(backbone, policy), policy, images).outcome.logits
        with torch.no_grad():
            torch.testing.assert_close(PrunedViT(backbone, policy).eval()(images), logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", DETERMINISTIC, ids=lambda method: method.name)
def test_images_of_a_ragged_batch_do_not_see_each_other(method: Method) -> None:
    backbone = toy(NAME)
    policy = made(method, backbone, 2)
    check_batch_independence(policy, seed=1)
    with FlopCounterMode(display=False) as counter:
        outcome = play_ragged(backbone, policy, ragged_keep(backbone, 6, 2), random_images(backbone, 6)).outcome
    assert counter.get_total_flops() == 2 * int(outcome.macs.sum())


@every_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, None], ids=["bfloat16", "float16", "autocast"])
def test_it_plays_in_half_precision(method: Method, dtype: torch.dtype | None) -> None:
    backbone = Backbone(make_model(NAME).to(dtype), name=NAME) if dtype else toy(NAME)
    images = random_images(backbone, 3)
    model = PrunedViT(backbone, made(method, backbone, 3)).to(dtype).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype is None):
        assert torch.isfinite(model(images.to(dtype))).all()


@every_method
def test_a_saved_model_comes_back(method: Method, tmp_path: Path) -> None:
    backbone = load_backbone("vit_digits")
    policy, images = made(method, backbone, 3), random_images(backbone, 2)
    PrunedViT(backbone, policy).save_pretrained(tmp_path)
    again = PrunedViT.from_pretrained(tmp_path)
    if not isinstance(policy, torch.nn.Module):
        assert again.policy == policy
    with torch.no_grad():
        assert torch.equal(again(images), PrunedViT(backbone, made(method, backbone, 3)).eval()(images))


@pytest.mark.parametrize(
    ("name", "parameters"),
    {
        "RandomDrop": ("keep_rate",),
        "TopK": ("keep_rate",),
        "EViT": ("keep_rate", "fuse"),
        "DPCMerge": ("keep_rate", "clusters", "pairs"),
        "ToMe": ("r", "proportional_attention"),
        "LTMP": ("merge_thresholds", "prune_thresholds"),
        "LifeRegression": ("keep_rate",),
        "DynamicViT": ("keep_rate",),
        "ATS": (),
        "Brightness": ("keep_rate",),
        "TokenScores": ("threshold", "seed", "embed_dim", "sites"),
        "EvoViT": ("keep_rate",),
        "TriLevel": ("keep_rate",),
        "DPCKNN": ("keep_rate",),
    }.items(),
    ids=str,
)
def test_constructors_that_users_were_promised(name: str, parameters: tuple[str, ...]) -> None:
    found = list(inspect.signature(getattr(baselines, name)).parameters.values())
    assert tuple(parameter.name for parameter in found[: len(parameters)]) == parameters
    assert all(parameter.default is not parameter.empty for parameter in found[max(1, len(parameters)) :])


@pytest.mark.parametrize(
    ("name", "parameter", "values"),
    [
        ("random", "seed", ["x", 1.5, True]),
        ("evit", "fuse", ["no", 1]),
        ("tome", "proportional_attention", ["no", None]),
        ("tome", "inflect", ["x", float("nan"), True]),
        ("evo_vit", "layer_wise", ["yes", 1]),
        ("evo_vit", "momentum", ["x", 0, 1.1, float("nan")]),
        ("dynamicvit", "seed", ["x", 1.5]),
        ("life_regression", "seed", ["x", 1.5]),
        ("life_regression", "embed_dim", ["x", 0, 2.5]),
        ("dpcknn", "neighbours", ["x", 0, 2.5]),
        ("masks", "threshold", ["x", None, float("nan"), True]),
        ("masks", "seed", ["x", 1.5]),
        ("distilled_attention", "embed_dim", ["x", 0, 2.5]),
    ],
)
def test_senseless_values_are_refused_by_name(name: str, parameter: str, values: list[Any]) -> None:
    knob = baselines.describe(name).knob.name
    for value in values:
        with pytest.raises((ValueError, TypeError), match=f"^{parameter}: expected .* got"):
            baselines.make(name, **{knob: 1, parameter: value})


@pytest.mark.parametrize("form", [list, tuple, np.array, torch.tensor, lambda numbers: list(np.array(numbers))])
def test_numbers_per_site_come_in_any_form(form: Any) -> None:
    assert ToMe(form([3, 1])) == ToMe((3, 1))
    assert DPCMerge(0.5, form([3, 1]), form([1, 0])).pairs == (1, 0)
    assert baselines.ATS(form([3, 1])).samples == (3, 1)


def test_equal_settings_are_equal_policies() -> None:
    assert RandomDrop(0.5) == RandomDrop(0.5)
    assert RandomDrop(0.5) != RandomDrop(0.5, seed=1)
    assert DPCKNN(0.5, np.int64(4)) == DPCKNN(0.5, 4)  # pyright: ignore[reportArgumentType]


def test_weights_make_room_for_themselves(golden_backbone: Backbone, golden_images: torch.Tensor) -> None:
    """Into a policy that has not seen a network yet, alone or inside a model."""
    file = golden("dynamicvit_rho07")
    state = {key.removeprefix("param."): value for key, value in file.items() if key.startswith("param.")}
    policy = DynamicViT(0.7)
    policy.load_state_dict(state)
    for wrapped in (state, {"model": state}):
        assert torch.equal(
            DynamicViT(0.7).load_published(wrapped).state_dict()["score_predictor.2.out_conv.4.bias"],
            policy.state_dict()["score_predictor.2.out_conv.4.bias"],
        )
    model, fresh = PrunedViT(golden_backbone, policy), PrunedViT(golden_backbone, DynamicViT(0.7))
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(fresh.eval()(golden_images), file["logits"], atol=1e-4, rtol=0)
    life = LifeRegression(0.7)
    life.load_state_dict({"weight": golden("life_ref")["W"]}, strict=False)
    with torch.no_grad():
        logits = PrunedViT(golden_backbone, life, sites="published").eval()(golden_images)
    torch.testing.assert_close(logits, golden("life_ref")["rho07.logits_hard"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("layer_wise", [False, True])
def test_evo_vit_ranks_only_who_is_there(layer_wise: bool) -> None:
    backbone, policy = toy(NAME), EvoViT(0.5, layer_wise)
    keep = ragged_keep(backbone, 6, seed=3)
    episode = play_ragged(backbone, policy, keep, random_images(backbone, 6))
    assert torch.equal(episode.keep[-1], keep), "nobody else dies, nobody comes to life"
    assert torch.equal(episode.outcome.n_kept[:, -1], keep.sum(dim=1).clamp(max=8))
