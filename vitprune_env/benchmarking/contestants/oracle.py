"""What knowledge is worth: policies that are told where the digit of each scene is."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vitprune_env.data import Digits
from vitprune_env.engine.backbone import Backbone
from vitprune_env.engine.cost import CostModel
from vitprune_env.errors import BudgetError
from vitprune_env.policy import BasePolicy, keep_top
from vitprune_env.types import Decision, Observation


class InkOracle(BasePolicy):
    """Keep the tokens with the most ink of the digit at the first site, and all of them afterwards.

    It plays the scenes in the order of their numbers, and begins again after the last one.

    Args:
        count: tokens to keep of every image.
        ink: `[images, N]`, ink in each patch.
    """

    def __init__(self, count: int, ink: Tensor) -> None:
        self.count, self.ink, self.start = count, ink, 0
        self.rows = torch.arange(0)

    def reset(self, batch_size: int, num_agents: int) -> None:
        """Take the next scenes."""
        self.rows = torch.arange(self.start, self.start + batch_size) % len(self.ink)
        self.start = (self.start + batch_size) % len(self.ink)

    def decide(self, obs: Observation) -> Decision:
        """Keep the tokens with the most ink."""
        ink = obs.gather(self.ink[self.rows].to(obs.alive.device))
        return Decision(keep=keep_top(obs, ink, torch.full_like(obs.num_alive, self.count)))


def ink_oracle(backbone: Backbone, scenes: Digits, budget: float, copy: int | None = None) -> InkOracle:
    """The oracle for a set of scenes, with as many tokens as a budget pays for.

    Args:
        backbone: the network; the oracle acts at its default sites.
        scenes: what it will play, from the first scene on.
        budget: GMACs per image, which are not exceeded.
        copy: which copy of the digit it looks for, 0 for the smallest; None: all of them.

    Raises:
        BudgetError: for a budget that does not pay for one token.
        IndexError: for a copy that the scenes do not have.
    """
    ink = scenes.ink(torch.arange(len(scenes)), copy)
    counts = torch.arange(1, backbone.num_patches + 1)
    sites = backbone.default_sites
    gmacs = CostModel.of(backbone).forward(counts[:, None].expand(-1, len(sites)), sites) / 1e9
    count = int((gmacs <= budget).sum())
    if count < 1:
        raise BudgetError(f"budget: expected {float(gmacs[0]):.5g} GMACs or more, for one token, got {budget:.5g}")
    return InkOracle(count, F.adaptive_avg_pool2d(ink[:, None], backbone.grid_size).flatten(1))
