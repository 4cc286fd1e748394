"""The linear head on a frozen network: what is minimised, and that nothing else changes."""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from typing import Any, cast

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from games import NAME, OwnLabels
from helpers import toy
from vitprune_env import load_backbone
from vitprune_env.agents.finetuning.head import fit_head
from vitprune_env.errors import NumericalError, UnsupportedBackboneError

DATA, DECAY = OwnLabels(40), 0.01


@cache
def fitted() -> tuple[Any, float]:
    backbone = load_backbone(deepcopy(toy(NAME).model))
    return backbone, fit_head(backbone, DATA, DECAY, batch_size=16, progress=False)


@torch.no_grad()
def features() -> torch.Tensor:
    model = cast(Any, toy(NAME).model)
    return model.forward_head(model.forward_features(DATA.images), pre_logits=True)


def test_only_the_head_changes_and_its_accuracy_is_reported() -> None:
    backbone, share = fitted()
    before, after = toy(NAME).model.state_dict(), backbone.model.state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"head.weight", "head.bias"}
    with torch.no_grad():
        right = backbone(DATA.images).argmax(dim=1) == DATA.labels
    assert share == pytest.approx(float(right.double().mean()))
    assert share > 0.9


def test_the_head_is_where_cross_entropy_plus_decay_has_no_slope() -> None:
    found = features()
    scale = found.sub(found.mean(dim=0)).square().mean().sqrt()
    head = cast(nn.Linear, fitted()[0].model.head)
    weight = (head.weight * scale).detach().requires_grad_()  # of centred features divided by their mean deviation
    bias = (head.bias + head.weight @ found.mean(dim=0)).detach().requires_grad_()
    loss = F.cross_entropy((found - found.mean(dim=0)) / scale @ weight.T + bias, DATA.labels)
    (loss + DECAY * weight.square().sum()).backward()
    assert weight.grad is not None
    assert bias.grad is not None
    assert max(weight.grad.abs().max(), bias.grad.abs().max()) < 1e-4


def test_the_fit_does_not_depend_on_the_size_of_the_features() -> None:
    """Doubled features get half the weights, so the same logits."""
    backbone = load_backbone(deepcopy(toy(NAME).model))
    norm = cast(Any, backbone.model).norm
    with torch.no_grad():
        norm.weight.mul_(2)
        norm.bias.mul_(2)
    fit_head(backbone, DATA, DECAY, progress=False)
    with torch.no_grad():
        torch.testing.assert_close(backbone(DATA.images), fitted()[0](DATA.images), atol=1e-2, rtol=1e-2)


def test_other_heads_are_refused() -> None:
    backbone = load_backbone(deepcopy(toy(NAME).model))
    cast(Any, backbone.model).head = nn.Sequential(nn.Linear(48, 7))
    with pytest.raises(UnsupportedBackboneError, match="one linear layer"):
        fit_head(backbone, DATA, DECAY, progress=False)


def test_features_that_are_no_numbers_are_refused() -> None:
    backbone = load_backbone(deepcopy(toy(NAME).model))
    with torch.no_grad():
        cast(Any, backbone.model).norm.bias.fill_(float("nan"))
    with pytest.raises(NumericalError, match="not finite"):
        fit_head(backbone, DATA, DECAY, progress=False)
