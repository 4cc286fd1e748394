"""The losses of MAPPO, Eq. 3 and 4 of RL4EViT, against numbers computed by hand."""

from __future__ import annotations

import pytest
import torch

from vitprune_env.agents.learners.losses import policy_loss, value_loss


def test_policy_objective_by_hand() -> None:
    ratio = torch.tensor([1.5, 0.5, 1.5, 0.5, 1.1])
    advantage = torch.tensor([1.0, 1.0, -1.0, -1.0, 2.0])
    # min(r A, clip(r) A) with clip to 0.8 .. 1.2: 1.2, 0.5, -1.5, -0.8, 2.2
    assert policy_loss(ratio, advantage, 0.2).item() == pytest.approx(-(1.2 + 0.5 - 1.5 - 0.8 + 2.2) / 5)


def test_dual_clip_by_hand() -> None:
    ratio, advantage = torch.tensor([4.0, 4.0]), torch.tensor([-1.0, 1.0])
    # without: -4 and 1.2; the first is bounded by 3 A = -3
    assert policy_loss(ratio, advantage, 0.2, dual_clip=3.0).item() == pytest.approx(-(-3 + 1.2) / 2)


def test_value_loss_by_hand() -> None:
    value = torch.tensor([1.0, 1.0, 0.1])
    old = torch.tensor([0.0, 0.0, 0.0])
    target = torch.tensor([2.0, 0.0, 1.0])
    # clipped values 0.2, 0.2, 0.1: max((1 - 2)^2, (.2 - 2)^2), max(1, .04), max(.81, .81)
    assert value_loss(value, old, target, clip=0.2).item() == pytest.approx((3.24 + 1.0 + 0.81) / 3)
    assert value_loss(value, old, target, clip=None).item() == pytest.approx((1 + 1 + 0.81) / 3)


def test_clipped_value_loss_still_moves_the_new_value() -> None:
    value = torch.tensor([0.1], requires_grad=True)
    value_loss(value, torch.zeros(1), torch.ones(1), clip=0.2).backward()
    assert value.grad is not None
    assert value.grad.item() == pytest.approx(-1.8)


def test_huber_loss_is_the_squared_error_up_to_delta() -> None:
    old = target = torch.zeros(2)
    value = torch.tensor([0.5, 3.0])
    # 0.25; beyond delta = 1: 2 * (3 - 0.5)
    assert value_loss(value, old, target, None, huber_delta=1.0).item() == pytest.approx((0.25 + 5.0) / 2)
