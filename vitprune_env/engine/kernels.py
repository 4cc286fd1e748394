"""Ways to attend within each image of a packed batch, by name; all compute what `attention.packed` does.

`packed` is the fastest on a CPU. A GPU wants one call for all images: `varlen` in half precision, `nested` in single
precision. `flex` needs `torch.compile` to be fast; `masked` computes all pairs of rows and is there to compare with.
`autocast` says in which precision matrices are multiplied.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import flex_attention as flex_module
from torch.nn.attention.varlen import varlen_attn

from vitprune_env.engine.attention import Kernel, Rows, packed
from vitprune_env.errors import UnknownNameError

Amp = Literal["off", "auto", "bf16", "fp16"]
AMP = ("off", "auto", "bf16", "fp16")
HALF = (torch.float16, torch.bfloat16)
FLASH_CAPABILITY = (8, 0)  # variable-length flash attention needs tensor cores of this generation


def kernel(name: str) -> Kernel:
    """Look up a way to attend.

    Args:
        name: `"auto"` or one of `KERNELS`.

    Raises:
        UnknownNameError: with the nearest names.
    """
    known = {"auto": auto, **KERNELS}
    if name not in known:
        raise UnknownNameError("execution", name, known)
    return known[name]


def auto(q: Tensor, k: Tensor, v: Tensor, rows: Rows, key_bias: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """Whatever suits device and dtype, see `choose`; arguments as for `attention.packed`."""
    if len(rows.groups) == 1:  # nothing to choose
        return packed(q, k, v, rows, key_bias, dropout)
    name = choose(q.device, q.dtype, len(rows.groups), biased=key_bias is not None, dropout=dropout)
    return KERNELS[name](q, k, v, rows, key_bias, dropout)


def choose(device: torch.device, dtype: torch.dtype, groups: int, biased: bool = False, dropout: float = 0.0) -> str:
    """The name of the kernel that suits.

    Args:
        device: where the rows are.
        dtype: of queries, keys and values, so that autocast counts.
        groups: runs of equally long images; one is a plain batch.
        biased: whether keys have a bias, which only `packed` and the slow ones take.
        dropout: rate of dropped weights, likewise.
    """
    if device.type != "cuda" or groups == 1 or biased or dropout:
        return "packed"
    if dtype in HALF and _has_flash(device):
        return "varlen"
    return "nested"


def varlen(q: Tensor, k: Tensor, v: Tensor, rows: Rows, key_bias: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """Variable-length flash attention (CUDA, half precision); offsets stay on the device."""
    _refuse("varlen", key_bias, dropout)
    starts, longest = rows.offsets(q.device).int(), rows.longest
    try:
        return cast(Tensor, varlen_attn(q, k, v, starts, starts, longest, longest)).flatten(1)
    except RuntimeError as error:
        if q.device.type == "cuda" and q.dtype in HALF:
            raise
        raise ValueError(
            f"execution: expected half precision on CUDA for 'varlen', got {q.dtype} on {q.device.type}; use 'auto'"
        ) from error


def nested(q: Tensor, k: Tensor, v: Tensor, rows: Rows, key_bias: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """Fused attention on jagged nested tensors."""
    _refuse("nested", key_bias, dropout)
    starts = rows.offsets(q.device)
    shortest = min(length for _, length in rows.groups)

    def jagged(values: Tensor) -> Tensor:
        # Both extremes are given, otherwise the operator would read them back from the device.
        together = torch.nested.nested_tensor_from_jagged(
            values.contiguous(), starts, min_seqlen=shortest, max_seqlen=rows.longest
        )
        return together.transpose(1, 2)

    y = F.scaled_dot_product_attention(jagged(q), jagged(k), jagged(v))
    return y.transpose(1, 2).values().flatten(1)


def flex(q: Tensor, k: Tensor, v: Tensor, rows: Rows, key_bias: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """Flex attention with one document per image; compiled on a GPU, and slow anywhere else."""
    _refuse("flex", None, dropout)
    if q.device.type == "cpu" and torch.is_grad_enabled() and q.requires_grad:
        raise ValueError("execution: expected no gradients for 'flex' on a CPU; use torch.no_grad(), or 'auto'")
    image = rows.image(q.device)
    total = len(image)

    def same_image(_b: Tensor, _h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return image[i] == image[j]

    def biased(score: Tensor, _b: Tensor, _h: Tensor, _i: Tensor, j: Tensor) -> Tensor:
        return score if key_bias is None else score + key_bias[j]

    mask = flex_module.create_block_mask(same_image, None, None, total, total, device=q.device)
    run: Any = _compiled_flex() if q.device.type == "cuda" else flex_module.flex_attention
    y = run(*(part.transpose(0, 1)[None] for part in (q, k, v)), score_mod=biased, block_mask=mask)
    return y[0].transpose(0, 1).flatten(1)


def masked(q: Tensor, k: Tensor, v: Tensor, rows: Rows, key_bias: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """All pairs of rows, those of different images masked: the plainest way, and the slowest."""
    image = rows.image(q.device)
    mask = torch.zeros(len(image), len(image), dtype=q.dtype, device=q.device)
    mask = mask.masked_fill(image[:, None] != image, float("-inf"))
    mask = mask if key_bias is None else mask + key_bias
    q, k, v = (part.transpose(0, 1)[None] for part in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    return y[0].transpose(0, 1).flatten(1)


KERNELS: dict[str, Kernel] = {"packed": packed, "varlen": varlen, "nested": nested, "flex": flex, "masked": masked}


@cache
def _has_flash(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= FLASH_CAPABILITY


@cache
def _compiled_flex() -> Any:
    return torch.compile(flex_module.flex_attention, dynamic=True)


def _refuse(name: str, key_bias: Tensor | None, dropout: float) -> None:
    """Refuse what a kernel cannot do.

    Raises:
        ValueError: naming it and what can.
    """
    what = "a bias per key (proportional attention)" if key_bias is not None else "attention dropout" if dropout else ""
    if what:
        raise ValueError(f"execution: {name!r} does not take {what}; use 'packed' or 'auto'")


def multiplies_bf16(device: torch.device | str) -> bool:
    """Whether matrix products in bfloat16 are faster there than in single precision.

    On a GPU they are where the GPU knows the type; on a CPU only with matrix units for it (AMX): without them they are
    several times slower.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # not in every version of torch
    return bool(capabilities.get("amx_bf16", False))


def autocast(device: torch.device | str, amp: Amp = "off") -> torch.autocast:
    """The context in which a network runs: `"bf16"`, `"fp16"`, `"off"`, or `"auto"` for bf16 where that is faster.

    Raises:
        ValueError: for another precision.
    """
    if amp not in AMP:
        raise ValueError(f"amp: expected one of {', '.join(AMP)}, got {amp!r}")
    device = torch.device(device)
    enabled = amp in ("bf16", "fp16") or (amp == "auto" and multiplies_bf16(device))
    return torch.autocast(device.type, torch.float16 if amp == "fp16" else torch.bfloat16, enabled=enabled)
