"""Generalised advantage estimation (Schulman et al., 2016) for agents that leave at different times."""

from __future__ import annotations

import torch
from torch import Tensor


def generalized_advantage(
    reward: Tensor, value: Tensor, alive: Tensor, terminated: Tensor, discount: float, trace: float
) -> Tensor:
    """Advantages on a dense table of agent-steps.

    An agent's episode ends at the step where it is pruned, or at the last one: nothing is bootstrapped across that
    step. With delta_t = r_t + discount * V_{t+1} - V_t, A_t = delta_t + discount * trace * A_{t+1}. Returns for the
    critic are `advantage + value`.

    Args:
        reward: `[T, B, N]`.
        value: `[T, B, N]`, whatever at agent-steps that are not alive.
        alive: `[T, B, N]` bool, agents that acted.
        terminated: `[T, B, N]` bool, agents whose episode ended with that action.
        discount: gamma, 0 to 1.
        trace: lambda, 0 (one step) to 1 (Monte Carlo).

    Returns:
        `[T, B, N]`, zero where nobody acted.
    """
    advantage = torch.zeros_like(value)
    following = torch.zeros_like(value[0])
    next_value = torch.zeros_like(value[0])
    for step in reversed(range(len(reward))):
        goes_on = alive[step] & ~terminated[step]
        delta = reward[step] + discount * next_value * goes_on - value[step]
        following = torch.where(alive[step], delta + discount * trace * following * goes_on, 0.0)
        advantage[step] = following
        next_value = torch.where(alive[step], value[step], 0.0)
    return advantage
