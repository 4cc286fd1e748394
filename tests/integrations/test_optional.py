"""Without the optional packages, the error says what to install."""

from __future__ import annotations

import sys
from importlib import import_module

import pytest


@pytest.mark.parametrize(
    ("name", "needed"), [("torchrl", "torchrl.envs"), ("benchmarl", "benchmarl.environments.common")]
)
def test_what_is_missing_is_named(name: str, needed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, needed, None)  # an import of it fails
    monkeypatch.delitem(sys.modules, f"vitprune_env.integrations.{name}", raising=False)
    with pytest.raises(ImportError, match=rf"pip install vitprune_env\[{name}\]"):
        import_module(f"vitprune_env.integrations.{name}")
