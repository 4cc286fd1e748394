"""Adaptive token sampling against the golden vectors, and by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from helpers import golden
from vitprune_env.baselines import ATS, ats
from vitprune_env.baselines.ats import sample_tokens
from vitprune_env.engine.backbone import Backbone
from vitprune_env.game.rollout import play
from vitprune_env.game.token_game import TokenGame


def test_golden(golden_backbone: Backbone, golden_images: Tensor) -> None:
    file, policy = golden("ats_alone_b369"), ATS()
    blocks = file["sites"].tolist()
    game = TokenGame.for_policy(golden_backbone, policy, sites=[f"{block + 1}.attn" for block in blocks])
    episode = play(game, policy, golden_images)
    torch.testing.assert_close(episode.outcome.logits, file["logits"], atol=1e-4, rtol=0)
    for step, block in enumerate(blocks):
        for image, tokens in enumerate(file[f"token_ids_{block}"]):
            assert episode.keep[step, image].nonzero()[:, 0].tolist() == sorted(tokens[tokens >= 0].tolist())


def test_published_sites() -> None:
    assert ATS().published_sites(12) == [f"{block}.attn" for block in range(4, 13)]
    assert ATS().published_sites(4) == ["2.attn", "3.attn", "4.attn"]


def test_by_hand() -> None:
    # Sorted 1, 2, 3, 4 (tokens 2, 0, 3, 1): cumulated 1, 3, 6, 10, scaled 0, 2/9, 5/9, 1.
    scores, alive = torch.tensor([[2.0, 4.0, 1.0, 3.0]]), torch.ones(1, 4, dtype=torch.bool)
    taken = {samples: sample_tokens(scores, alive, samples)[0].nonzero()[:, 0].tolist() for samples in range(1, 6)}
    # Heights: 1; 2/9 1; 2/9 5.5/9 1; 2/9 4.33/9 6.67/9 1; five of them add nobody.
    assert taken == {1: [1], 2: [0, 1], 3: [0, 1, 3], 4: [0, 1, 3], 5: [0, 1, 3]}


def test_equal_scores_keep_all_but_the_lowest() -> None:
    scores, alive = torch.full((1, 4), 0.5), torch.ones(1, 4, dtype=torch.bool)
    assert sample_tokens(scores, alive, 4).sum() == 3, "the cumulated score of one of them is scaled to 0"


@given(data=st.data(), alive=st.integers(0, 9), samples=st.integers(1, 30), seed=st.integers(0, 2**31))
def test_dead_tokens_do_not_count(data: st.DataObject, alive: int, samples: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(9, generator=generator) * data.draw(st.sampled_from([0.0, 1.0, 1e-30]))
    there = torch.randperm(9, generator=generator) < alive
    keep = sample_tokens(scores[None] * there, there[None], samples)[0]
    assert not (keep & ~there).any()
    assert min(alive, 1) <= keep.sum() <= min(samples, alive)
    if alive:
        alone = sample_tokens(scores[there][None], torch.ones(1, alive, dtype=torch.bool), samples)[0]
        assert torch.equal(keep[there], alone)


def test_more_heights_keep_more(golden_backbone: Backbone, golden_images: Tensor) -> None:
    kept = []
    for samples in (2, 8, 16, 32, 64, 640):
        policy = ATS(samples)
        game = TokenGame.for_policy(golden_backbone, policy, sites=["4.attn", "7.attn"])
        kept.append(play(game, policy, golden_images).outcome.n_kept.float().mean().item())
    assert kept == sorted(kept)
    assert kept[0] <= 2
    assert kept[-1] > 61, "nearly everybody"


def test_heights_per_site(golden_backbone: Backbone, golden_images: Tensor) -> None:
    policy = ATS([64, 3])
    game = TokenGame.for_policy(golden_backbone, policy, sites=["4.attn", "7.attn"])
    n_kept = play(game, policy, golden_images).outcome.n_kept
    assert (n_kept[:, 0] > 10).all()
    assert (n_kept[:, 1] <= 3).all()
    with pytest.raises(ValueError, match=r"samples: expected one number or one per site \(12\), got 2"):
        play(TokenGame.for_policy(golden_backbone, policy), policy, golden_images)


@pytest.mark.parametrize("samples", [0, -3, 2.5, [], [3, 0], True], ids=str)
def test_bad_samples_are_refused(samples: Any) -> None:
    with pytest.raises(ValueError, match=r"^samples: expected"):
        ATS(samples)


def test_many_heights_are_placed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.rand(3, 20, generator=torch.Generator().manual_seed(0)) ** 4
    alive = torch.rand(3, 20, generator=torch.Generator().manual_seed(1)) < 0.8
    whole = sample_tokens(scores, alive, 50)
    monkeypatch.setattr(ats, "HEIGHTS", 7)
    assert torch.equal(sample_tokens(scores, alive, 50), whole)
    assert 1 < whole.sum() < alive.sum()
