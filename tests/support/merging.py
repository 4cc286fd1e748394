"""Merging policies with random parameters, and small settings to make them from a network."""

from __future__ import annotations

import torch

from vitprune_env.agents import Distillation, MergePolicy, PairActor
from vitprune_env.engine.backbone import Backbone
from vitprune_env.types import every_block

FEW = Distillation(images=16, schedule_images=12)


def random_merging(backbone: Backbone, sites: tuple[int | str, ...] | None = None, seed: int = 0) -> MergePolicy:
    """A policy that merges about half of the pairs."""
    generator = torch.Generator().manual_seed(seed)
    placed = every_block(backbone.depth) if sites is None else sites
    actor = PairActor(len(placed), backbone.embed_dim, 6 if backbone.has_class_token else 5)
    with torch.no_grad():
        for tensor in actor.state_dict().values():
            tensor.add_(0.3 * torch.randn(tensor.shape, generator=generator))
        actor.deviation.abs_()
    return MergePolicy(actor, sites=placed)
