"""A freshly trained policy beside what it has to beat."""

from __future__ import annotations

import torch

from games import NAME, OwnLabels
from helpers import toy
from vitprune_env.agents import TokenActor, TokenPolicy, TrainResult
from vitprune_env.benchmarking.trained import compare_trained


def test_a_policy_dearer_than_the_dense_network_gets_its_table() -> None:
    """It keeps every token and is large; the others are compared at the dense network's GMACs, which they can meet."""
    backbone, data = toy(NAME), OwnLabels(8)
    policy = TokenPolicy(TokenActor(48, (192, 64)), threshold=-40.0, sites=(1, 2, 3))
    result = TrainResult(policy, torch.nn.Identity(), (), 0.0, 0.0, 0.0, backbone)
    batches = [(data.images, data.labels)]
    dense, random, untrained, evit, learned = compare_trained(
        result, backbone, batches, batches, untrained_actors=1
    ).rows
    assert learned.gmacs > dense.gmacs
    assert max(row.gmacs for row in (random, untrained, evit)) <= 1.01 * dense.gmacs  # EViT's own evidence counts
    assert min(random.keep_per_site) == min(evit.keep_per_site) == 1.0
