from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import random_images, toy
from vitprune_env.errors import SiteError, UnknownNameError
from vitprune_env.game.token_game import TokenGame
from vitprune_env.types import Decision, Site, parse_sites


@given(block=st.integers(1, 99), inside=st.booleans())
def test_site_notation_round_trip(block: int, inside: bool) -> None:
    label = f"{block}.attn" if inside else str(block)
    site = Site.parse(label)
    assert (site.block, site.inside, site.label, str(site)) == (block, inside, label, label)
    assert Site.parse(site) is site
    assert inside or Site.parse(block) == site


def test_sites_are_ordered_as_the_data_flows() -> None:
    assert Site.parse("4.attn") < Site.parse(4) < Site.parse("5.attn")
    assert Site.parse(3).half == 6
    assert Site.parse("4.attn").half == 7


@pytest.mark.parametrize(
    "wrong", [0, -1, 1.5, True, None, "", "x", "3.", "3.mlp", "attn", ".attn", "3.attn.attn", "²", Site(0)]
)
def test_wrong_site_notation_names_what_came(wrong: object) -> None:
    with pytest.raises(SiteError, match="sites: expected") as info:
        Site.parse(wrong)  # type: ignore[arg-type]
    assert repr(wrong) in str(info.value)


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        ((), "non-empty sequence"),
        ("3", "non-empty sequence"),
        (3, "non-empty sequence"),
        ((3, 6, 13), r"expected blocks 1 to 12, got '13'"),
        (("13.attn",), r"expected blocks 1 to 12, got '13.attn'"),
        ((6, 3), r"increasing sites, got \['6', '3'\]"),
        ((3, 3), "increasing sites"),
        ((4, "4.attn"), "increasing sites"),
    ],
)
def test_wrong_site_lists(sites: object, message: str) -> None:
    with pytest.raises(SiteError, match=message):
        parse_sites(sites, depth=12)  # type: ignore[arg-type]


def test_observation_shapes_and_views() -> None:
    backbone = toy("deit_tiny_distilled_patch16_224")
    needs = frozenset({"cls_attention", "mean_attention", "keys", "value_norms"})
    game = TokenGame(backbone, (1, 2), needs=needs)
    obs = game.reset(random_images(backbone, 3))
    keep = torch.zeros(3, 16, dtype=torch.bool)
    keep[0, :5], keep[2, 3] = True, True
    obs = game.step(Decision(keep=keep))[0]
    assert obs is not None
    assert (obs.batch_size, obs.num_agents, obs.step, obs.num_steps, obs.depth) == (3, 16, 1, 2, 4)
    assert obs.site == Site.parse(2)
    assert obs.tokens.shape == (6, 48)
    assert obs.image.tolist() == [0, 0, 0, 0, 0, 2]
    assert obs.token.tolist() == [0, 1, 2, 3, 4, 3]
    assert obs.offsets.tolist() == [0, 5, 5, 6]
    assert obs.num_alive.tolist() == [5, 0, 1]
    assert obs.cls.shape == (3, 48)
    assert obs.position.shape == (16, 2)
    assert obs.position[0].tolist() == [0, 0]
    assert obs.position[1].tolist() == pytest.approx([0, 1 / 3])
    assert obs.position[-1].tolist() == [1, 1]
    assert torch.equal(obs.alive, keep)
    assert torch.equal(obs.size, keep.float())
    assert obs.order[0].tolist() == [0, 1, 2, 3, 4] + [-1] * 11
    assert obs.order[2].tolist() == [-1, -1, -1, 0] + [-1] * 12
    assert {name: tuple(value.shape) for name, value in obs.evidence.items()} == {
        "cls_attention": (6,),
        "mean_attention": (6,),
        "keys": (6, 16),
        "value_norms": (6,),
    }
    dense = obs.dense()
    assert dense.shape == (3, 16, 48)
    assert torch.equal(obs.gather(dense), obs.tokens)
    assert (dense[~obs.alive] == 0).all()
    flags = obs.scatter(torch.ones(6, dtype=torch.bool), fill=False)
    assert torch.equal(flags, obs.alive)


def test_unknown_names_suggest_the_nearest() -> None:
    assert "did you mean vit_digits?" in str(UnknownNameError("backbone", "vit_digit", ["vit_digits", "deit_tiny"]))
    assert str(UnknownNameError("policy", "zzz", ["b", "a"])).endswith("known: a, b")
    assert str(UnknownNameError("policy", "zzz", map(str, range(13)))).endswith("7, 8, ..."), "not all are listed"
