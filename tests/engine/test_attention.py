"""Attention on packed rows against timm's own module."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from vitprune_env.engine.attention import Rows
from vitprune_env.engine.families.adapter import leave_attention
from vitprune_env.engine.families.vit import ViTFamily
from vitprune_env.engine.halves import AttendPacked, Found
from vitprune_env.engine.masked import AttendMasked

WIDTH, HEADS = 24, 3
ALL = frozenset({"cls_attention", "mean_attention", "keys", "value_norms"})
lengths_lists = st.lists(st.integers(1, 7), min_size=1, max_size=5)


def attention(**options: Any) -> Attention:
    """A random attention module of timm."""
    torch.manual_seed(0)
    return Attention(WIDTH, HEADS, qkv_bias=True, norm_layer=cast(Any, nn.LayerNorm), **options).eval()


def attend(
    attn: Attention,
    x: Tensor,
    rows: Rows,
    needs: frozenset[str] = frozenset(),
    key_bias: Tensor | None = None,
    key_factor: Tensor | None = None,
) -> tuple[Tensor, Found]:
    """What `attn(x)` computes, on packed rows, through the parts that the engine puts together."""
    block = SimpleNamespace(attn=attn, norm1=nn.Identity())
    how = AttendPacked() if key_factor is None else AttendMasked(key_factor)
    y, evidence = how(ViTFamily().before_attention(block, x, None), rows, key_bias, block, needs)
    return leave_attention(attn, x, y), evidence


def packed(lengths: list[int], seed: int = 0) -> tuple[Tensor, Rows, list[Tensor]]:
    """Random rows of images with the given lengths, together and apart."""
    x = torch.randn(sum(lengths), WIDTH, generator=torch.Generator().manual_seed(seed))
    return x, Rows.of(*lengths), [part[None] for part in x.split(lengths)]


def explicit(attn: Attention, x: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax weights `[heads, n, n]`, keys and values `[heads, n, head dim]` of one image."""
    q, k, v = attn.qkv(x[0]).view(-1, 3, HEADS, WIDTH // HEADS).permute(1, 2, 0, 3)
    q, k = attn.q_norm(q), attn.k_norm(k)
    logits = q @ k.mT * attn.scale + (0 if bias is None else bias)
    return logits.softmax(dim=-1), k, v


@pytest.mark.parametrize("options", [{}, {"qk_norm": True, "scale_norm": True}, {"qk_norm": True, "proj_bias": False}])
@given(lengths=lengths_lists, seed=st.integers(0, 999), biased=st.booleans())
@torch.no_grad()
def test_equals_timm_image_by_image(options: dict[str, Any], lengths: list[int], seed: int, biased: bool) -> None:
    attn = attention(**options)
    x, rows, images = packed(lengths, seed)
    bias = torch.randn(len(x), generator=torch.Generator().manual_seed(seed)) if biased else None
    y, evidence = attend(attn, x, rows, key_bias=bias)
    assert evidence == {}
    masks = [None] * len(images) if bias is None else [part.view(1, 1, 1, -1) for part in bias.split(lengths)]
    expected = [attn(image, attn_mask=mask)[0] for image, mask in zip(images, masks, strict=True)]
    torch.testing.assert_close(y, torch.cat(expected), atol=1e-6, rtol=1e-5)


@given(lengths=lengths_lists, seed=st.integers(0, 999), biased=st.booleans(), qk_norm=st.booleans())
@torch.no_grad()
def test_evidence_is_what_the_softmax_says(lengths: list[int], seed: int, biased: bool, qk_norm: bool) -> None:
    attn = attention(qk_norm=qk_norm)
    x, rows, images = packed(lengths, seed)
    bias = torch.randn(len(x), generator=torch.Generator().manual_seed(seed)) if biased else None
    _, evidence = attend(attn, x, rows, needs=ALL, key_bias=bias)
    biases = [None] * len(images) if bias is None else list(bias.split(lengths))
    tables = [explicit(attn, image, b) for image, b in zip(images, biases, strict=True)]
    expected = {
        "cls_attention": torch.cat([weights.mean(0)[0] for weights, _, _ in tables]),
        "mean_attention": torch.cat([weights.mean(dim=(0, 1)) for weights, _, _ in tables]),
        "keys": torch.cat([k.mean(0) for _, k, _ in tables]),
        "value_norms": torch.cat([v.transpose(0, 1).flatten(1).norm(dim=1) for _, _, v in tables]),
    }
    torch.testing.assert_close(evidence, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", sorted(ALL))
def test_only_evidence_that_is_asked_for(name: str) -> None:
    x, rows, _ = packed([3, 2])
    assert set(attend(attention(), x, rows, needs=frozenset({name}))[1]) == {name}


def test_soft_factors_of_one_change_nothing_and_of_zero_remove() -> None:
    attn = attention()
    x, rows, _ = packed([5, 5])
    ones = torch.ones(2, 5)
    dense, _ = attend(attn, x, rows)
    soft, _ = attend(attn, x, rows, key_factor=ones)
    torch.testing.assert_close(soft, dense, atol=1e-6, rtol=1e-5)
    factor = ones.clone()
    factor[:, 3] = 0
    masked, _ = attend(attn, x, rows, key_factor=factor)
    without = torch.tensor([0, 1, 2, 4, 5, 6, 7, 9])
    removed, _ = attend(attn, x[without], Rows.of(4, 4))
    torch.testing.assert_close(masked[without], removed, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_soft_factors_have_true_gradients(value: float) -> None:
    attn = attention().double()
    x, rows, _ = packed([4, 4])
    factor = torch.ones(2, 4, dtype=torch.float64)
    factor[:, 2] = value
    factor.requires_grad_()
    torch.autograd.gradcheck(lambda f: attend(attn, x.double(), rows, key_factor=f)[0], (factor,))


def test_a_removed_key_may_be_larger_than_all_others() -> None:
    attn = attention()
    with torch.no_grad():
        attn.qkv.weight.mul_(40)
    x, rows, _ = packed([6])
    factor = torch.ones(1, 6)
    factor[0, 2] = 0
    factor.requires_grad_()
    y, _ = attend(attn, x, rows, key_factor=factor)
    y.sum().backward()
    assert torch.isfinite(y).all()
    assert factor.grad is not None
    assert torch.isfinite(factor.grad).all()


def test_gated_attention() -> None:
    attn = attention(gated=True)
    x, rows, images = packed([3, 5])
    expected = torch.cat([attn(image)[0] for image in images])
    torch.testing.assert_close(attend(attn, x, rows)[0], expected, atol=1e-6, rtol=1e-5)


def test_attention_dropout_is_timms_in_training() -> None:
    attn = attention(attn_drop=0.5).train()
    x, rows, _ = packed([4, 4])
    torch.manual_seed(3)
    y, _ = attend(attn, x, rows)
    torch.manual_seed(3)
    torch.testing.assert_close(y, attn(x.view(2, 4, -1)).flatten(0, 1), atol=1e-6, rtol=1e-5)
    attn.eval()
    assert torch.equal(attend(attn, x, rows)[0], attend(attn, x, rows)[0])


def test_uniform_rows_attend_as_one_batch() -> None:
    assert Rows.of(4, 4, 4).groups == ((3, 4),)
    assert Rows.of(4, 3, 4, 4).groups == ((1, 4), (1, 3), (2, 4))
    assert Rows.of(2, 0, 1).image(torch.device("cpu")).tolist() == [0, 0, 2]


def test_heads_wider_than_the_model() -> None:
    attn = attention(attn_head_dim=16)
    x, rows, images = packed([2, 5])
    expected = torch.cat([attn(image)[0] for image in images])
    torch.testing.assert_close(attend(attn, x, rows)[0], expected, atol=1e-6, rtol=1e-5)
