"""Masked execution step by step: dense without weights, removal at weights 0 and 1, and the evidence on the way."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from helpers import TIMM_MODELS, random_images, random_keeps, toy
from vitprune_env.engine.backbone import Backbone
from vitprune_env.engine.masked import classify_masked, run_masked, soft_attend, soft_weights, start_masked
from vitprune_env.engine.reduction import reduce_tokens
from vitprune_env.types import Decision

ALL = frozenset({"cls_attention", "mean_attention", "keys", "value_norms"})


def needs_of(backbone: Backbone) -> frozenset[str]:
    return ALL if backbone.has_class_token else ALL - {"cls_attention"}


@pytest.mark.parametrize("name", ["golden", *TIMM_MODELS])
def test_without_weights_it_is_the_dense_pass(name: str) -> None:
    backbone = toy(name)
    images = random_images(backbone, 2)
    dense, evidence = backbone.run(backbone.embed(images), 5, needs_of(backbone))
    state, found = run_masked(backbone, start_masked(backbone, images), 5, needs=needs_of(backbone))
    torch.testing.assert_close(state.x.flatten(0, 1), dense.x, atol=1e-5, rtol=1e-5)
    for key, values in evidence.items():
        torch.testing.assert_close(found[key].flatten(0, 1), values, atol=1e-5, rtol=1e-5)
    state, found = run_masked(backbone, state, 2 * backbone.depth)
    assert (state.half, found) == (2 * backbone.depth, {})
    torch.testing.assert_close(classify_masked(backbone, state), backbone(images), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["golden", *TIMM_MODELS])
def test_weights_of_0_and_1_are_removal_also_in_the_evidence(name: str) -> None:
    backbone = toy(name)
    images = random_images(backbone, 4)
    keep = random_keeps(1, 4, backbone.num_patches, seed=2, least=1)[0]
    state = reduce_tokens(backbone.run(backbone.embed(images), 3)[0], Decision(keep=keep))
    removed, evidence = backbone.run(state, 5, needs_of(backbone))
    soft, _ = run_masked(backbone, start_masked(backbone, images), 3)
    soft, found = run_masked(backbone, soft, 5, keep.float(), needs=needs_of(backbone))
    torch.testing.assert_close(soft.tokens[keep], removed.tokens, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(soft.prefix, removed.prefix, atol=1e-5, rtol=1e-5)
    for key, values in evidence.items():
        torch.testing.assert_close(found[key][keep], values, atol=1e-5, rtol=1e-5)


def test_a_key_bias_is_proportional_attention() -> None:
    backbone = toy("golden")
    state = backbone.embed(random_images(backbone, 2))
    size = torch.rand(2, 64, generator=torch.Generator().manual_seed(0)) * 4 + 1
    expected, evidence = backbone.run(replace(state, size=size), 4, frozenset({"mean_attention"}), log_size=True)
    soft = start_masked(backbone, random_images(backbone, 2))
    for weights in (None, torch.ones(2, 64)):
        x, found = run_masked(backbone, soft, 4, weights, key_bias=size.log(), needs={"mean_attention"})
        torch.testing.assert_close(x.x.flatten(0, 1), expected.x, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found["mean_attention"].flatten(), evidence["mean_attention"], atol=1e-6, rtol=1e-5)


def test_removed_tokens_that_see_themselves_see_what_is_left_and_themselves() -> None:
    backbone = toy("golden")
    images = random_images(backbone, 2)
    state = start_masked(backbone, images)
    weights = torch.ones(2, 64)
    weights[:, 7] = 0
    dense, _ = run_masked(backbone, state, 1)
    blind, _ = run_masked(backbone, state, 1, weights)
    seeing, _ = run_masked(backbone, state, 1, weights, see_themselves=True)
    torch.testing.assert_close(seeing.tokens[:, 7], dense.tokens[:, 7])
    others = [token for token in range(64) if token != 7]
    torch.testing.assert_close(seeing.tokens[:, others], blind.tokens[:, others])
    assert (blind.tokens[:, 7] - dense.tokens[:, 7]).abs().max() > 1e-3


def test_other_tokens_can_be_put_in() -> None:
    backbone = toy("deit_tiny_patch16_224")
    state, _ = run_masked(backbone, start_masked(backbone, random_images(backbone, 2)), 2)
    changed = state.with_tokens(state.tokens * 2)
    assert torch.equal(changed.tokens, state.tokens * 2)
    assert torch.equal(changed.prefix, state.prefix)
    assert changed.half == 2


def test_average_pooling_weighs_the_tokens() -> None:
    backbone = toy("vit_medium_patch16_gap_240")
    state, _ = run_masked(backbone, start_masked(backbone, random_images(backbone, 2)), 2 * backbone.depth)
    weights = torch.zeros(2, backbone.num_patches)
    weights[:, 3], weights[:, 5] = 1, 3
    mean = backbone.model.norm(state.tokens)[:, [3, 3 + 2]] * torch.tensor([0.25, 0.75])[:, None]
    expected = backbone.model.forward_head(mean.sum(1, keepdim=True))
    torch.testing.assert_close(classify_masked(backbone, state, weights), expected)


@pytest.mark.parametrize("spread", [1.0, 400.0])
def test_factors_on_the_values_are_factors_on_the_weights(spread: float) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 6, 4, generator=generator) for _ in range(3))
    factor = torch.tensor([[1, 0.5, 0, 1, 0, 1e-3], [1, 1, 1, 1, 1, 0]])

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        logits = (q * spread) @ k.mT + factor.log()[:, None, None]
        return logits.softmax(dim=-1) @ v

    expected = plain(q, k, v)
    torch.testing.assert_close(soft_attend(q, k, v, factor, spread), expected, atol=1e-5, rtol=1e-4)
    pairs = torch.maximum(factor[:, None], torch.eye(6))
    seeing = ((q * spread) @ k.mT + pairs.log()[:, None]).softmax(dim=-1) @ v
    torch.testing.assert_close(soft_attend(q, k, v, factor, spread, True), seeing, atol=1e-5, rtol=1e-4)
    if spread == 1:
        torch.testing.assert_close(soft_weights(q, k, factor, spread) @ v, expected, atol=1e-5, rtol=1e-4)


def test_wrong_arguments_are_refused_by_name() -> None:
    backbone = toy("deit_tiny_patch16_224")
    state = start_masked(backbone, random_images(backbone, 2))
    for name in ("key_weights", "key_bias"):
        with pytest.raises(ValueError, match=rf"{name}: expected \[B, N\] = \[2, 16\], got \[2, 17\]"):
            run_masked(backbone, state, 2, **{name: torch.ones(2, 17)})
    with pytest.raises(ValueError, match="stop: expected 0 to 8 half-blocks, got 9"):
        run_masked(backbone, state, 9)
    with pytest.raises(ValueError, match="stop: expected 2 to 8 half-blocks, got 1"):
        run_masked(backbone, run_masked(backbone, state, 2)[0], 1)
