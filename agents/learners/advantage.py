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
    critic are `advantage + value`. Between two decisions an agent may wait for some steps; its rewards of these steps
    are then added to that of the decision before, and t + 1 stands for its next decision.

    Args:
        reward: `[T, B, N]`.
        value: `[T, B, N]`; ignored at agent-steps that are not alive.
        alive: `[T, B, N]` bool, agents that acted.
        terminated: `[T, B, N]` bool, agents whose episode ended with that action.
        discount: gamma, 0 to 1.
        trace: lambda, 0 (one step) to 1 (Monte Carlo).

    Returns:
        `[T, B, N]`, zero where no agent acted.
    """
    advantage = torch.zeros_like(value)
    following, next_value, waiting = (torch.zeros_like(value[0]) for _ in range(3))
    for step in reversed(range(len(reward))):
        acted = alive[step]
        goes_on = acted & ~terminated[step]
        paid = reward[step] + waiting * goes_on
        delta = paid + discount * next_value * goes_on - value[step]
        following = torch.where(acted, delta + discount * trace * following * goes_on, following)
        advantage[step] = torch.where(acted, following, 0.0)
        next_value = torch.where(acted, value[step], next_value)
        waiting = torch.where(acted, 0.0, waiting + reward[step])
    return advantage
