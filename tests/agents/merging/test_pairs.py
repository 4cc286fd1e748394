"""What an agent sees of itself and the token most like it."""

from __future__ import annotations

from dataclasses import replace
from math import log

import pytest
import torch

from matching import observe
from vitprune_env.agents.merging.pairs import Pairs

KEYS = torch.tensor([[[1.0, 0.0], [3.0, 0.3], [0.0, 1.0], [-1.0, -1.0], [0.8, -0.6], [1.0, 1.0]]])
ALIVE = torch.tensor([[True, True, True, True, True, False]])


def test_features_by_hand() -> None:
    """Tokens 0, 2, 4 receive, 1 and 3 send; 1 is most like 0, and 3 like 4. Token 5 is dead."""
    obs = replace(
        observe(ALIVE, KEYS),
        tokens=torch.tensor([[0.0, 0.0], [3.0, 1.0], [0.0, 0.0], [0.0, 4.0], [0.0, 0.0]]),
        size=torch.tensor([[3.0, 2.0, 1.0, 1.0, 4.0, 0.0]]),
    )
    obs = replace(obs, evidence={**obs.evidence, "cls_attention": torch.tensor([0.3, 0.2, 0.1, 0.0, 0.1])})
    look = torch.tensor([0.5, -0.25, 0.1])  # standardised, the tokens are (1, -1) and (-1, 1)
    pairs = Pairs.of(obs, look)
    assert pairs.image.tolist() == [0, 0]
    assert pairs.token.tolist() == [1, 3]
    alive = log(5 / 6)
    expected = [
        [0.5 + 0.25 + 0.1, log(1 - 3 / 9.09**0.5), log(2), log(3), alive, log(0.2 * 5 + 1e-4)],
        [-0.5 - 0.25 + 0.1, log(1 + 0.2 / 2**0.5), log(1), log(4), alive, log(1e-4)],
    ]
    torch.testing.assert_close(pairs.features, torch.tensor(expected), rtol=1e-4, atol=1e-4)
    fewer = Pairs.of(obs, look, class_attention=False)
    assert torch.equal(fewer.features, pairs.features[:, :5])


def test_equal_keys_have_a_logarithm() -> None:
    pairs = Pairs.of(observe(ALIVE, torch.ones(1, 6, 2)), torch.zeros(3), class_attention=False)
    assert pairs.features[:, 1].tolist() == pytest.approx([log(1e-4)] * 2)


def test_a_token_alone_has_no_pair() -> None:
    alone = torch.tensor([[False, True, False, False, False, False]])
    pairs = Pairs.of(observe(alone, KEYS), torch.zeros(3), class_attention=False)
    assert pairs.features.shape == (0, 5)
    assert not pairs.matching.sends.any()
