"""Distributions of actions: probabilities, sampling by inverse CDF, masks and gradients."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stay_drop_wait import StayDropWait
from vitprune_env.envs.actions import ActionKind, KeepActions, MergeActions
from vitprune_env.envs.distributions import ActionDistribution, Bernoulli, Categorical

LAST_NOISE = 1 - 2.0**-24  # the largest float32 below 1
seeds = st.integers(0, 2**31)


def drawn(rows: int, count: int, seed: int, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    """Random logits and masks with at least one allowed action in each row."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, count, generator=generator) < 0.6
    mask.scatter_(1, torch.randint(count, (rows, 1), generator=generator), True)
    return scale * torch.randn(rows, count, generator=generator), mask


def probabilities(distribution: ActionDistribution, rows: int, count: int) -> Tensor:
    """`[rows, count]`, by `log_prob`."""
    columns = [distribution.log_prob(torch.full((rows,), action)).exp() for action in range(count)]
    return torch.stack(columns, dim=1)


def even_noise(size: int = 20_000) -> Tensor:
    """The middles of equal parts of [0, 1): no random error, frequencies are exact to 1 / size."""
    return (torch.arange(size) + 0.5) / size


# Keep or prune: bit for bit what learners have computed so far


@given(seed=seeds, scale=st.sampled_from([0.01, 1.0, 10.0, 100.0]))
def test_keep_is_computed_bit_for_bit_as_before(seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits, noise = scale * torch.randn(500, 2, generator=generator), torch.rand(500, generator=generator)
    logit = logits[:, 1] - logits[:, 0]
    distribution = KeepActions().distribution(logits)
    actions = distribution.sample(noise)
    keep = noise < logit.sigmoid()
    assert actions.dtype == torch.int64
    assert torch.equal(actions, keep.long())
    assert torch.equal(distribution.log_prob(actions), F.logsigmoid(torch.where(keep, logit, -logit)))
    assert torch.equal(distribution.entropy(), F.softplus(logit) - logit * logit.sigmoid())
    assert torch.equal(distribution.mode(), (logit > 0).long())


@given(seed=seeds)
def test_the_categorical_of_two_actions_is_the_bernoulli(seed: int) -> None:
    logits, _ = drawn(50, 2, seed)
    one, other = Categorical(logits), KeepActions().distribution(logits)
    assert isinstance(other, Bernoulli)
    torch.testing.assert_close(probabilities(one, 50, 2), probabilities(other, 50, 2))
    torch.testing.assert_close(one.entropy(), other.entropy(), atol=1e-5, rtol=1e-4)
    assert torch.equal(one.mode(), other.mode())


def test_a_mask_can_force_keep_or_prune() -> None:
    mask = torch.tensor([[True, False], [False, True]])
    forced = KeepActions().distribution(torch.zeros(2, 2), mask)
    assert forced.sample(torch.tensor([LAST_NOISE, 0.0])).tolist() == forced.mode().tolist() == [0, 1]
    assert forced.entropy().tolist() == [0, 0]


# All kinds


@pytest.mark.parametrize("kind", [KeepActions(), MergeActions(), StayDropWait()], ids=lambda kind: kind.name)
@given(seed=seeds)
def test_probabilities_entropy_and_mode_agree(kind: ActionKind, seed: int) -> None:
    count = kind.count(num_agents=6)
    logits, _ = drawn(20, count, seed)
    distribution = kind.distribution(logits)
    table = probabilities(distribution, 20, count)
    torch.testing.assert_close(table.sum(dim=1), torch.ones(20))
    torch.testing.assert_close(distribution.entropy(), -torch.xlogy(table, table).sum(dim=1), atol=1e-5, rtol=1e-4)
    assert torch.equal(distribution.mode(), table.argmax(dim=1))


@pytest.mark.parametrize("kind", [KeepActions(), MergeActions(), StayDropWait()], ids=lambda kind: kind.name)
@given(seed=seeds)
def test_actions_are_drawn_as_often_as_they_are_probable(kind: ActionKind, seed: int) -> None:
    count, noise = kind.count(num_agents=6), even_noise()
    logits, _ = drawn(1, count, seed)
    actions = kind.distribution(logits.expand(len(noise), count)).sample(noise)
    often = torch.bincount(actions, minlength=count) / len(noise)
    torch.testing.assert_close(often, probabilities(kind.distribution(logits), 1, count)[0], atol=2e-4, rtol=0)


def test_entropy_by_hand() -> None:
    assert float(Categorical(torch.zeros(1, 5)).entropy()) == pytest.approx(math.log(5))
    mask = torch.tensor([[True, True, False, True, False]])
    assert float(Categorical(torch.zeros(1, 5), mask).entropy()) == pytest.approx(math.log(3))


# Masks


@given(count=st.integers(1, 40), seed=seeds)
def test_excluded_actions_have_no_probability(count: int, seed: int) -> None:
    logits, mask = drawn(30, count, seed)
    distribution = Categorical(logits, mask)
    table = probabilities(distribution, 30, count)
    assert not table[~mask].any()
    expected = torch.where(mask, logits.exp(), 0)
    torch.testing.assert_close(table, expected / expected.sum(dim=1, keepdim=True), atol=1e-5, rtol=1e-4)
    assert torch.isfinite(distribution.entropy()).all()
    assert mask.gather(1, distribution.mode()[:, None]).all()


@given(count=st.integers(1, 200), seed=seeds, scale=st.sampled_from([0.1, 3.0, 30.0, 300.0]))
def test_excluded_actions_are_never_drawn(count: int, seed: int, scale: float) -> None:
    logits, mask = drawn(30, count, seed, scale)
    distribution = Categorical(logits, mask)
    noise = torch.rand(30, generator=torch.Generator().manual_seed(seed + 1))
    for row in (noise, torch.zeros(30), torch.full((30,), LAST_NOISE)):
        actions = distribution.sample(row)
        assert mask.gather(1, actions[:, None]).all()
        assert torch.isfinite(distribution.log_prob(actions)).all()


@given(seed=seeds)
def test_an_action_does_not_depend_on_the_other_rows(seed: int) -> None:
    logits, mask = drawn(40, 9, seed)
    noise = torch.rand(40, generator=torch.Generator().manual_seed(seed))
    together = Categorical(logits, mask).sample(noise)
    alone = [Categorical(logits[i : i + 1], mask[i : i + 1]).sample(noise[i : i + 1]) for i in range(40)]
    assert torch.equal(together, torch.cat(alone))


# Gradients


@pytest.mark.parametrize("scale", [1.0, 30.0, 1000.0])
@given(seed=seeds, masked=st.booleans())
def test_gradients_are_finite_and_leave_excluded_actions_alone(scale: float, seed: int, masked: bool) -> None:
    logits, mask = drawn(30, 7, seed, scale)
    logits.requires_grad_()
    distribution = Categorical(logits, mask if masked else None)
    actions = distribution.sample(torch.rand(30, generator=torch.Generator().manual_seed(seed)))
    (distribution.log_prob(actions).sum() + distribution.entropy().sum()).backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    if masked:
        assert not logits.grad[~mask].any()


@given(seed=seeds)
def test_gradients_are_those_of_torch(seed: int) -> None:
    logits, mask = drawn(30, 5, seed)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    distribution = Categorical(ours, mask)
    actions = distribution.mode()
    # Excluded actions with very small logits: an approximation that torch's own class can differentiate.
    oracle = torch.distributions.Categorical(logits=theirs.masked_fill(~mask, -1e4))
    (distribution.log_prob(actions) + distribution.entropy()).sum().backward()
    (oracle.log_prob(actions) + oracle.entropy()).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-4)
