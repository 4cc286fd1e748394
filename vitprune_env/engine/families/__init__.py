"""Families of timm models that the engine can walk; each file holds one adapter."""

from __future__ import annotations

from torch import nn

from vitprune_env.engine.families.adapter import Family
from vitprune_env.engine.families.eva import EvaFamily
from vitprune_env.engine.families.vit import ViTFamily
from vitprune_env.errors import UnsupportedBackboneError

__all__ = ["FAMILIES", "Family", "family_of", "register_family"]

FAMILIES: list[Family] = [ViTFamily(), EvaFamily()]


def register_family(family: Family) -> Family:
    """Let the engine walk another family of models; of several that recognise a model the latest is used.

    Args:
        family: its adapter.

    Returns:
        The same.
    """
    FAMILIES.append(family)
    return family


def family_of(model: nn.Module) -> Family:
    """The adapter for a model.

    Raises:
        UnsupportedBackboneError: naming the part of the model that no family can walk.
    """
    for family in reversed(FAMILIES):
        if family.recognises(model):
            if (why := family.refusal(model)) is not None:
                raise UnsupportedBackboneError(f"model: expected a plain timm {family.name}, got {why}")
            return family
    known = " or ".join(family.name for family in FAMILIES)
    raise UnsupportedBackboneError(f"model: expected a plain timm {known}, got {type(model).__name__}")
