"""Tokens that somebody clicked away: which patch a click hit, and a policy that has to do without these patches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from vitprune_env.policy import Policy
from vitprune_env.types import Decision, Observation, Site


def token_at(x: float, y: float, size: tuple[int, int], grid_size: tuple[int, int]) -> int:
    """The patch that a point of a picture lies in.

    Args:
        x: from the left edge, in pixels.
        y: from the upper edge, in pixels.
        size: height and width of the picture, in pixels.
        grid_size: rows and columns of patches.
    """
    (height, width), (rows, columns) = size, grid_size
    row, column = int(y * rows / height), int(x * columns / width)
    return min(max(row, 0), rows - 1) * columns + min(max(column, 0), columns - 1)


@dataclass(frozen=True, eq=False)
class WithoutTokens:
    """A policy that decides about fewer tokens: some leave every image at the first site, unseen by it.

    Args:
        policy: decides about the others.
        gone: `[N]` bool, the tokens that leave.
    """

    policy: Policy
    gone: Tensor

    @property
    def needs(self) -> frozenset[str]:
        """What the policy needs."""
        return self.policy.needs

    @property
    def attention_bias(self) -> Literal["log_size"] | None:
        """That of the policy."""
        return self.policy.attention_bias

    def default_sites(self, depth: int) -> Sequence[int | str | Site] | None:
        """Those of the policy."""
        return self.policy.default_sites(depth)

    def reset(self, batch_size: int, num_agents: int) -> None:
        """Begin a new batch of games."""
        self.policy.reset(batch_size, num_agents)

    def decide(self, obs: Observation) -> Decision:
        """The policy's decision about what it gets to see."""
        if obs.step > 0 or not self.gone.any():
            return self.policy.decide(obs)
        decision = self.policy.decide(without(obs, self.gone))
        if decision.merge_into is not None:
            decision = replace(decision, merge_into=decision.merge_into.masked_fill(self.gone, -1))
        if decision.features is not None:
            features = obs.tokens.clone()
            features[~self.gone[obs.token]] = decision.features
            decision = replace(decision, features=features)
        return decision


def without(obs: Observation, gone: Tensor) -> Observation:
    """An observation as if some tokens had left before, `gone` `[N]` bool; none waits yet."""
    rows, alive = ~gone[obs.token], obs.alive & ~gone
    last = torch.full_like(obs.order, obs.num_agents)
    order = torch.where(alive, obs.order, last).argsort(dim=1).argsort(dim=1)
    lengths = torch.zeros(len(alive) + 1, dtype=torch.int64, device=alive.device)
    lengths[1:] = alive.sum(dim=1)
    return Observation(
        tokens=obs.tokens[rows],
        image=obs.image[rows],
        token=obs.token[rows],
        offsets=lengths.cumsum(0),
        cls=obs.cls,
        alive=alive,
        size=obs.size * alive,
        order=order.masked_fill(~alive, -1),
        position=obs.position,
        site=obs.site,
        step=obs.step,
        num_steps=obs.num_steps,
        depth=obs.depth,
        evidence={name: values[rows] for name, values in obs.evidence.items()},
        num_prefix=obs.num_prefix,
    )
