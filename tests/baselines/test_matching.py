"""Bipartite matching against a plain Python one, over every kind of prefix, raggedness and order."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from vitprune_env.baselines import bipartite_matching as matching
from vitprune_env.baselines.argument_checks import per_site
from vitprune_env.baselines.bipartite_matching import is_sender, match_bipartite, merge_senders
from vitprune_env.types import Observation, Site

seeds = st.integers(0, 2**31)


def observe(
    alive: torch.Tensor, keys: torch.Tensor, order: torch.Tensor | None = None, num_prefix: int = 1, **changes: Any
) -> Observation:
    """What a policy sees of tokens with the dense keys `[B, N, d]`."""
    image, token = alive.nonzero(as_tuple=True)
    counts = alive.sum(dim=1)
    ranks = alive.cumsum(dim=1) - 1 if order is None else order
    same = int(counts[0]) if bool((counts == counts[0]).all()) else None
    return Observation(
        tokens=torch.zeros(len(image), 2), image=image, token=token,
        offsets=torch.cat([counts.new_zeros(1), counts.cumsum(0)]), cls=torch.zeros(len(alive), 2), alive=alive,
        size=alive.float(), order=ranks.masked_fill(~alive, -1), position=torch.zeros(alive.shape[1], 2),
        site=Site.parse("1.attn"), step=0, num_steps=1, depth=1, evidence={"keys": keys[image, token]},
        count=same, num_prefix=num_prefix, **changes,
    )  # fmt: skip


def random_observation(seed: int, batch: int, tokens: int, num_prefix: int, ragged: bool = True) -> Observation:
    """Random keys, in a random order, of images with very different numbers of tokens, some with one or none."""
    generator = torch.Generator().manual_seed(seed)
    share = torch.linspace(0, 1, batch)[:, None] if ragged else torch.ones(batch, 1)
    alive = torch.rand(batch, tokens, generator=generator) < share
    shuffled = torch.rand(batch, tokens, generator=generator).masked_fill(~alive, 2.0)
    order = shuffled.argsort(dim=1).argsort(dim=1)
    return observe(alive, torch.randn(batch, tokens, 5, generator=generator), order, num_prefix)


def naive_match(obs: Observation, image: int) -> dict[int, tuple[int, float]]:
    """Sender -> (receiver, similarity), the sequence spelled out."""
    keys = obs.scatter(obs.evidence["keys"])[image]
    keys = keys / keys.norm(dim=1, keepdim=True)
    alive = obs.alive[image].nonzero()[:, 0].tolist()
    sequence = [None] * obs.num_prefix + sorted(alive, key=lambda token: int(obs.order[image, token]))
    senders, receivers = ([token for token in sequence[start::2] if token is not None] for start in (0, 1))
    found = {}
    for sender in senders if receivers else []:
        similarity = [float(keys[sender] @ keys[receiver]) for receiver in receivers]
        best = max(range(len(receivers)), key=similarity.__getitem__)
        found[sender] = receivers[best], similarity[best]
    return found


@pytest.mark.parametrize("padded", [False, True], ids=["by length", "padded"])
@given(
    seed=seeds, batch=st.integers(1, 9), tokens=st.integers(1, 12), num_prefix=st.integers(0, 5), ragged=st.booleans()
)
def test_every_sender_finds_its_best_receiver(
    padded: bool, seed: int, batch: int, tokens: int, num_prefix: int, ragged: bool
) -> None:
    obs = random_observation(seed, batch, tokens, num_prefix, ragged)
    with pytest.MonkeyPatch.context() as patch:
        if padded:  # as on a GPU
            patch.setattr(matching, "_by_length", matching._padded)
        found = match_bipartite(obs)
    for image in range(batch):
        expected = naive_match(obs, image)
        for token in range(tokens):
            receiver, score = expected.get(token, (token, float("-inf")))
            assert found.sends[image, token] == (token in expected)
            assert found.partner[image, token] == receiver
            assert float(found.score[image, token]) == pytest.approx(score, abs=1e-5)
        senders = int(is_sender(obs)[image].sum())
        assert found.macs[image] == 5 * senders * (int(obs.alive[image].sum()) - senders)


@given(seed=seeds, batch=st.integers(1, 9), tokens=st.integers(1, 12), ragged=st.booleans())
def test_similarities_cost_what_is_said(seed: int, batch: int, tokens: int, ragged: bool) -> None:
    obs = random_observation(seed, batch, tokens, 1, ragged)
    with FlopCounterMode(display=False) as counter:
        macs = match_bipartite(obs).macs
    assert counter.get_total_flops() == 2 * int(macs.sum())


def test_by_hand() -> None:
    """Positions: class 0, then tokens 0 to 4 at 1 to 5. Receivers 0, 2, 4; senders 1, 3."""
    keys = torch.tensor([[[1.0, 0.0], [3.0, 0.3], [0.0, 1.0], [-1.0, -1.0], [0.8, -0.6]]])
    obs = replace(observe(torch.ones(1, 5, dtype=torch.bool), keys), size=torch.tensor([[3.0, 1.0, 1.0, 1.0, 1.0]]))
    found = match_bipartite(obs)
    assert found.sends.tolist() == [[False, True, False, True, False]]
    assert found.partner.tolist() == [[0, 0, 2, 4, 4]]
    assert found.score[0, [1, 3]].tolist() == pytest.approx([3 / 9.09**0.5, -0.2 / 2**0.5])
    assert found.macs.tolist() == [2 * 3 * 2]
    merges = torch.tensor([[False, True, False, False, False]])
    into, weight, order = merge_senders(obs, found, merges)
    assert into.tolist() == [[0, 0, 2, 3, 4]]
    assert weight.tolist() == [[0.75, 0.25, 1, 1, 1]], "the mean counts every patch once"
    left = sorted((0, 2, 3, 4), key=lambda token: int(order[0, token]))
    assert left == [3, 0, 2, 4], "first the sender that is left, then the receivers"


def test_dead_tokens_go_nowhere() -> None:
    alive = torch.tensor([[True, False, True, True], [False, False, False, True]])
    obs = observe(alive, torch.ones(2, 4, 3))
    found = match_bipartite(obs)
    into, weight, order = merge_senders(obs, found, found.sends)
    assert into.tolist() == [[0, -1, 0, 3], [-1, -1, -1, 3]]
    assert weight.tolist() == [[0.5, 0, 0.5, 1], [0, 0, 0, 1]]
    assert order.tolist() == [[4, -1, 1, 6], [-1, -1, -1, 4]]


def test_one_number_for_all_sites_or_one_each() -> None:
    obs = replace(observe(torch.ones(1, 2, dtype=torch.bool), torch.ones(1, 2, 3)), step=1, num_steps=3)
    assert per_site("r", 7, obs) == 7
    assert per_site("r", (1, 2, 3), obs) == 2
    with pytest.raises(ValueError, match=r"r: expected one number or one per site \(3\), got 2 of them"):
        per_site("r", (1, 2), obs)
