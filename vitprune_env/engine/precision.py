"""In which precision a network runs."""

from __future__ import annotations

from typing import Literal

import torch

Amp = Literal["off", "auto", "bf16", "fp16"]
AMP = ("off", "auto", "bf16", "fp16")


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
