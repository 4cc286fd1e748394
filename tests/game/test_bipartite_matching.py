"""Bipartite matching against a plain Python one, over every kind of prefix, raggedness and order."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from matching import naive_match, observe, random_observation
from vitprune_env.baselines.argument_checks import per_site
from vitprune_env.game import bipartite_matching
from vitprune_env.game.bipartite_matching import is_sender, match_bipartite, merge_senders

seeds = st.integers(0, 2**31)


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
            patch.setattr(bipartite_matching, "_by_length", bipartite_matching._padded)
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
