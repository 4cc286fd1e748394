"""Automatic choice of precision."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

from vitprune_env.engine.kernels import autocast, multiplies_bf16


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
