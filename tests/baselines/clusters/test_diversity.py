"""The diversity score by hand, and as the minimum that it claims to be."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from helpers import random_images, toy
from ragged import Ragged, ragged_keep
from vitprune_env.baselines import DPCMerge, diversity_score
from vitprune_env.game.rollout import play
from vitprune_env.game.token_game import TokenGame


@dataclass
class Rows:
    """Packed tokens and nothing else."""

    tokens: Tensor
    image: Tensor
    batch_size: int


def test_by_hand() -> None:
    # Image 0: channels 0 1 5 (median 1: 1 + 4) and 2 2 -4 (median 2: 6). Image 1 has one token, image 2 none,
    # image 3 the channels 1 3 (2) and 0 -8 (8).
    tokens = torch.tensor([[0.0, 2.0], [1.0, 2.0], [5.0, -4.0], [7.0, 7.0], [1.0, 0.0], [3.0, -8.0]])
    packed = Rows(tokens, torch.tensor([0, 0, 0, 1, 3, 3]), 4)
    torch.testing.assert_close(diversity_score(packed), torch.tensor([11.0, 0.0, 0.0, 10.0]))


@given(seed=st.integers(0, 2**31), count=st.integers(1, 9))
def test_no_other_vector_is_closer(seed: int, count: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(count, 5, generator=generator)
    score = diversity_score(Rows(tokens, torch.zeros(count, dtype=torch.int64), 1))
    others = torch.cat([torch.randn(50, 5, generator=generator), tokens, tokens.mean(dim=0, keepdim=True)])
    distances = (tokens[None] - others[:, None]).abs().sum(dim=(1, 2))
    assert (distances >= score - 1e-5).all()


def test_of_a_ragged_game_that_has_ended() -> None:
    backbone = toy("deit_tiny_patch16_224")
    policy = DPCMerge(0.5)
    game = TokenGame(backbone, ("1", "2.attn"), needs=policy.needs)
    images, keep = random_images(backbone, 8), ragged_keep(backbone, 8, seed=2)
    play(game, Ragged(keep, policy), images)
    state = game.state
    together = diversity_score(state)
    for image in range(8):
        tokens = state.tokens[state.image == image]
        alone = diversity_score(Rows(tokens, torch.zeros(len(tokens), dtype=torch.int64), 1))
        torch.testing.assert_close(together[image : image + 1], alone)
