"""Automatic choice of precision."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, cast

import pytest
import torch

from helpers import random_images, toy
from vitprune_env import KeepAll, PrunedViT, TokenGame
from vitprune_env.agents import TokenActor, TokenPolicy
from vitprune_env.baselines import DynamicViT, LifeRegression, SubSampleMerge, TokenScores
from vitprune_env.engine.kernels import autocast, multiplies_bf16

NAME = "deit_tiny_patch16_224"


def dtype_of_product(amp: Any) -> torch.dtype:
    with autocast("cpu", amp):
        return (torch.ones(2, 2) @ torch.ones(2, 2)).dtype


def test_precisions() -> None:
    assert dtype_of_product("off") == torch.float32
    assert dtype_of_product("bf16") == torch.bfloat16
    assert dtype_of_product("fp16") == torch.float16


@pytest.mark.parametrize(("units", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_is_bf16_where_a_processor_has_units_for_it(
    monkeypatch: pytest.MonkeyPatch, units: bool, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": units}, raising=False)
    assert multiplies_bf16("cpu") == units
    assert dtype_of_product("auto") == dtype


def test_refuses_another_precision() -> None:
    with pytest.raises(ValueError, match="amp: expected one of off, auto, bf16, fp16, got 'half'"):
        autocast("cpu", cast(Any, "half"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_images_have_the_precision_of_the_network(dtype: torch.dtype) -> None:
    images = random_images(toy(NAME), 2).to(dtype)
    for read in (PrunedViT(toy(NAME), KeepAll()), TokenGame(toy(NAME)).reset):
        with pytest.raises(TypeError, match=r"images: expected torch\.float32, as the network has"):
            read(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert PrunedViT(toy(NAME), KeepAll())(images.to(torch.bfloat16)).shape == (2, 7)


def test_a_policy_has_the_precision_of_the_network() -> None:
    backbone = deepcopy(toy(NAME)).to(torch.bfloat16)
    policy = TokenPolicy(TokenActor(backbone.embed_dim, generator=torch.Generator()))
    images = random_images(backbone, 2).to(torch.bfloat16)
    with pytest.raises(TypeError, match=r"policy: expected torch\.bfloat16, as the tokens are, got torch\.float32"):
        PrunedViT(backbone, policy)(images)
    assert PrunedViT(backbone, policy.to(torch.bfloat16))(images).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", [DynamicViT, LifeRegression, TokenScores, SubSampleMerge])
def test_a_fitted_baseline_has_the_precision_of_the_network(kind: Any) -> None:
    backbone, sites = deepcopy(toy(NAME)).to(torch.bfloat16), ("1.attn",)
    rate = {} if kind is TokenScores else {"keep_rate": 0.5}
    steps = {"num_sites": 1} if kind is SubSampleMerge else {}
    policy = kind(**rate, embed_dim=backbone.embed_dim, sites=sites, **steps)
    images = random_images(backbone, 2).to(torch.bfloat16)
    with pytest.raises(TypeError, match=r"policy: expected torch\.bfloat16, as the tokens are, got torch\.float32"):
        PrunedViT(backbone, policy)(images)
    assert PrunedViT(backbone, policy.to(torch.bfloat16))(images).dtype == torch.bfloat16
