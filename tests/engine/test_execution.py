"""Ways to attend, which one is chosen, and that compiling happens once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from helpers import Fixed, random_images, spread_keeps, toy
from vitprune_env import Decision, PrunedViT
from vitprune_env.engine import kernels
from vitprune_env.engine.attention import Rows, packed
from vitprune_env.engine.evidence import EVIDENCE, PackedAttention, class_attention_ragged
from vitprune_env.engine.tokens import arrange
from vitprune_env.errors import UnknownNameError

HEADS, HEAD_DIM = 3, 8
lengths_lists = st.lists(st.integers(1, 9), min_size=2, max_size=6)


def qkv(total: int, seed: int = 0) -> list[Tensor]:
    """Random queries, keys and values."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(total, HEADS, HEAD_DIM, generator=generator) for _ in range(3)]


@pytest.mark.parametrize("name", ["nested", "masked", "auto", "packed"])
@given(lengths=lengths_lists, seed=st.integers(0, 99))
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@torch.no_grad()
def test_kernels_agree_with_image_by_image(name: str, lengths: list[int], seed: int) -> None:
    q, k, v = qkv(sum(lengths), seed)
    images = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    alone = [packed(q_i, k_i, v_i, Rows.of(len(q_i))) for q_i, k_i, v_i in images]
    y = kernels.kernel(name)(q, k, v, Rows.of(*lengths), None, 0.0)
    torch.testing.assert_close(y, torch.cat(alone), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["flex", "masked"])
@pytest.mark.filterwarnings("ignore:flex_attention called without")
@torch.no_grad()
def test_a_bias_per_key(name: str) -> None:
    (q, k, v), rows = qkv(12), Rows.of(5, 5, 2)
    bias = torch.randn(12, generator=torch.Generator().manual_seed(1))
    expected = packed(q, k, v, rows, bias)
    torch.testing.assert_close(kernels.kernel(name)(q, k, v, rows, bias, 0.0), expected, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(packed(q, k, v, rows), expected)


@given(lengths=lengths_lists, seed=st.integers(0, 99), biased=st.booleans())
@torch.no_grad()
def test_class_attention_of_all_images_at_once(lengths: list[int], seed: int, biased: bool) -> None:
    """What a GPU computes is what the CPU computes image by image."""
    (q, k, v), rows = qkv(sum(lengths), seed), Rows.of(*lengths)
    bias = torch.randn(sum(lengths), generator=torch.Generator().manual_seed(seed)) if biased else None
    expected = EVIDENCE["cls_attention"].packed(PackedAttention(q, k, v, rows, bias, 0.4))
    torch.testing.assert_close(class_attention_ragged(q, k, rows, bias, 0.4), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["varlen", "nested", "flex"])
def test_what_a_kernel_cannot_do_is_refused(name: str) -> None:
    (q, k, v), rows = qkv(5), Rows.of(3, 2)
    with pytest.raises(ValueError, match=f"'{name}' does not take attention dropout"):
        kernels.kernel(name)(q, k, v, rows, None, 0.1)
    if name != "flex":
        with pytest.raises(ValueError, match=f"'{name}' does not take a bias per key"):
            kernels.kernel(name)(q, k, v, rows, torch.zeros(5), 0.0)


def test_unknown_kernel() -> None:
    with pytest.raises(UnknownNameError, match="did you mean nested"):
        kernels.kernel("nestd")


def test_varlen_gets_int32_offsets_and_the_longest_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands in for the CUDA operator: records what it would be given, and answers with the packed result."""
    (q, k, v), rows = qkv(12), Rows.of(5, 5, 2)
    given_to: dict[str, Any] = {}

    def operator(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> Tensor:
        given_to.update(cu_q=cu_q, cu_k=cu_k, max_q=max_q, max_k=max_k)
        return packed(q, k, v, rows).view(-1, HEADS, HEAD_DIM)

    monkeypatch.setattr(kernels, "varlen_attn", operator)
    y = kernels.varlen(q, k, v, rows)
    torch.testing.assert_close(y, packed(q, k, v, rows))
    assert given_to["cu_q"].tolist() == [0, 5, 10, 12]
    assert given_to["cu_q"].dtype == torch.int32
    assert given_to["cu_k"] is given_to["cu_q"]
    assert (given_to["max_q"], given_to["max_k"]) == (5, 5)


@pytest.mark.parametrize(
    ("device", "dtype", "groups", "extras", "name"),
    [
        ("cpu", torch.float32, 8, {}, "packed"),
        ("cpu", torch.bfloat16, 8, {}, "packed"),
        ("cuda", torch.bfloat16, 8, {}, "varlen"),
        ("cuda", torch.float16, 8, {}, "varlen"),
        ("cuda", torch.float32, 8, {}, "nested"),
        ("cuda", torch.bfloat16, 1, {}, "packed"),
        ("cuda", torch.bfloat16, 8, {"biased": True}, "packed"),
        ("cuda", torch.float32, 8, {"dropout": 0.1}, "packed"),
    ],
)
def test_the_choice(
    monkeypatch: pytest.MonkeyPatch, device: str, dtype: torch.dtype, groups: int, extras: dict[str, Any], name: str
) -> None:
    monkeypatch.setattr(kernels, "_has_flash", lambda _: True)
    # A stand-in, because a build without CUDA may refuse such devices.
    assert kernels.choose(SimpleNamespace(type=device), dtype, groups, **extras) == name


def test_an_old_gpu_gets_nested(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_has_flash", lambda _: False)
    assert kernels.choose(SimpleNamespace(type="cuda"), torch.float16, 8) == "nested"


@given(lengths=st.lists(st.integers(1, 4), min_size=1, max_size=12))
def test_equally_long_images_lie_together(lengths: list[int]) -> None:
    groups, layout = arrange(lengths, sort=True)
    assert len(groups) == len(set(lengths))
    assert [lengths[image] for image in layout or range(len(lengths))] == list(Rows(groups).lengths)
    still, nobody = arrange(lengths, sort=False)
    assert nobody is None
    assert list(Rows(still).lengths) == lengths


def test_one_question_to_the_device_per_site(monkeypatch: pytest.MonkeyPatch) -> None:
    """What makes the host wait for a GPU: counted on the CPU, where every such call can be seen."""
    asked: list[str] = []

    def count(name: str) -> None:
        original = getattr(Tensor, name)
        monkeypatch.setattr(
            Tensor, name, lambda self, *args, **kw: (asked.append(name), original(self, *args, **kw))[1]
        )

    backbone = toy("deit_tiny_patch16_224")
    images = random_images(backbone, 5)
    decisions = [Decision(keep=keep) for keep in spread_keeps(backbone, ["1", "2", "3"], 5, 0)]
    model = PrunedViT(backbone, Fixed(decisions), (1, 2, 3))
    for name in ("tolist", "item", "nonzero", "cpu", "__bool__", "__int__", "__float__", "__index__"):
        count(name)
    with torch.no_grad():
        model(images)
    assert asked == [*["tolist"] * 3, "__bool__"]  # the last one, whether the logits are numbers, on a CPU alone


@pytest.mark.slow
@torch.no_grad()
def test_compiled_parts_are_compiled_once() -> None:
    """New raggedness, new batch sizes and other blocks reuse the graphs of the first batch: three parts, of which two
    also exist for the first block, whose rows are a view of the embedded images."""
    backbone = toy("deit_tiny_patch16_224")
    torch._dynamo.reset()
    counter = torch._dynamo.utils.counters
    counter.clear()

    def agree(batch: int, seed: int) -> None:
        decisions = [Decision(keep=keep) for keep in spread_keeps(backbone, ["1", "2", "3"], batch, seed)]
        images = random_images(backbone, batch, seed)
        plain = PrunedViT(backbone, Fixed(decisions), (1, 2, 3))
        compiled.policy = Fixed(decisions)
        torch.testing.assert_close(compiled(images), plain(images), atol=1e-5, rtol=1e-4)

    compiled = PrunedViT(backbone, Fixed([]), (1, 2, 3)).compile_parts()
    agree(8, 0)
    graphs = counter["stats"]["unique_graphs"]
    assert graphs <= 5
    for seed in range(1, 6):
        agree(4 + seed, seed)
    assert counter["stats"]["unique_graphs"] == graphs


@pytest.mark.parametrize("execution", ["varlen", "flex"])
def test_kernels_of_a_gpu_say_so(execution: str) -> None:
    backbone = toy("deit_tiny_patch16_224")
    model = PrunedViT(backbone, Fixed(spread_keeps(backbone, ["2"], 2, 0)), ["2"], execution=execution)
    with pytest.raises(ValueError, match="execution: expected"):
        model(random_images(backbone, 2))
