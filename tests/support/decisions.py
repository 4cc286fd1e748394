"""Policies asked without a network: how many of its tokens they leave."""

from __future__ import annotations

import torch

from vitprune_env.policy import Policy
from vitprune_env.types import Observation, parse_sites

WIDTH = 8


def counts_of(policy: Policy, num_tokens: int = 196, depth: int = 12, sites: tuple[int | str, ...] = ()) -> list[int]:
    """Tokens that go on after each site, of an image of noise; one class token.

    Args:
        policy: whose decisions; it has to know its counts beforehand, and what it says of them is checked.
        num_tokens: N.
        depth: blocks of the network.
        sites: where; empty: where the policy wants to act.
    """
    where = parse_sites(sites or policy.default_sites(depth) or (3, 6, 9), depth)
    generator = torch.Generator().manual_seed(0)
    alive, counts = torch.ones(1, num_tokens, dtype=torch.bool), []
    parked = torch.zeros_like(alive)
    policy.reset(1, num_tokens)
    for step, site in enumerate(where):
        token, count = alive[0].nonzero()[:, 0], int(alive.sum())
        noise = torch.rand(count, WIDTH, generator=generator)
        obs = Observation(
            tokens=noise, image=torch.zeros_like(token), token=token, offsets=torch.tensor([0, count]),
            cls=torch.rand(1, WIDTH, generator=generator), alive=alive, size=(alive | parked).float(),
            order=(alive.cumsum(dim=1) - 1).masked_fill(~alive, -1), position=torch.zeros(num_tokens, 2),
            site=site, step=step, num_steps=len(where), depth=depth, count=count,
            evidence={"cls_attention": noise[:, 0] / count, "mean_attention": noise[:, 1] / count, "keys": noise},
            parked=parked if parked.any() else None,
        )  # fmt: skip
        decision = policy.decide(obs)
        parked = torch.zeros_like(alive) if decision.park is None else decision.park
        alive = decision.keep & ~parked
        counts.append(int(alive.sum()))
        assert decision.count == counts[-1], "what it said beforehand"
    return counts
