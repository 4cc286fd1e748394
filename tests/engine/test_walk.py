"""The walk from site to site: what it gathers on the way, packed and masked."""

from __future__ import annotations

import pytest
import torch

from helpers import random_images, toy
from vitprune_env.engine.masked import start_masked
from vitprune_env.engine.walk import Arrival, Masked, Packed, Walk
from vitprune_env.types import Decision, parse_sites

NEEDS = frozenset({"mean_attention", "value_norms"})
CLASS_TOKEN, AVERAGE = "deit_tiny_patch16_224", "vit_medium_patch16_gap_240"


def keep(name: str) -> torch.Tensor:
    """`[3, N]` bool, other tokens of each image."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(3, toy(name).num_patches, generator=generator) < 0.6


@pytest.mark.parametrize("name", [CLASS_TOKEN, AVERAGE])
@torch.no_grad()
def test_packed_and_masked_walks_see_the_same(name: str) -> None:
    """The second site lies in the block of the first, and so has its evidence; the third has its own."""
    backbone, stays = toy(name), keep(name)
    images, sites = random_images(backbone, 3), parse_sites(("2.attn", 2, 3), toy(name).depth)
    packed, masked = Walk(Packed(backbone), sites, NEEDS), Walk(Masked(backbone), sites, NEEDS)
    one, other = packed.arrive(backbone.embed(images)), masked.arrive(start_masked(backbone, images))
    for step, fresh in enumerate((True, False, True)):
        assert (one.is_fresh, other.is_fresh) == (fresh, fresh)
        seen, twin = packed.medium.observe(one, 3), masked.medium.observe(other, 3)
        assert (seen.step, seen.site, seen.num_prefix) == (twin.step, twin.site, twin.num_prefix)
        for field in ("tokens", "image", "token", "offsets", "cls", "alive", "size", "order"):
            torch.testing.assert_close(getattr(seen, field), getattr(twin, field), atol=1e-5, rtol=1e-4)
        for kind in NEEDS:
            torch.testing.assert_close(seen.evidence[kind], twin.evidence[kind], atol=1e-5, rtol=1e-4)
        if step < 2:
            one = packed.arrive(Packed(backbone).reduce(one, Decision(keep=stays & seen.alive)), one)
            other = masked.arrive(other.state.with_weights((stays & twin.alive).float()), other)


def test_a_walk_that_begins_too_late_for_its_evidence_is_refused() -> None:
    backbone = toy(CLASS_TOKEN)
    state = backbone.run(backbone.embed(random_images(backbone, 1)), 3)[0]
    walk = Walk(Packed(backbone), parse_sites((2,), backbone.depth), NEEDS)
    with pytest.raises(ValueError, match="state: expected at most 2 half-blocks run, so that the evidence at 2 can"):
        walk.arrive(state)
    Walk(Packed(backbone), walk.sites).arrive(state)


@torch.no_grad()
def test_through_stops_at_every_site_and_runs_to_the_end() -> None:
    backbone, stops = toy(CLASS_TOKEN), []

    def decide(arrival: Arrival) -> object:
        stops.append((str(arrival.site), arrival.step, arrival.state.half))
        return arrival.state

    images = random_images(backbone, 2)
    last = Walk(Packed(backbone), parse_sites((1, "3.attn"), backbone.depth)).through(backbone.embed(images), decide)
    assert stops == [("1", 0, 2), ("3.attn", 1, 5)]
    torch.testing.assert_close(backbone.classify(last), backbone(images), atol=1e-5, rtol=1e-5)
