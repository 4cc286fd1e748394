"""Noise that is a function of where it is used, not of the order in which it is drawn (a counter-based generator).

Noise from a stream of random numbers would depend on how images are spread over processes or split into batches. Here
it is a function of the seed, the game's number, the step and the token.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10

Counter = tuple[Tensor, Tensor, Tensor, Tensor]


def philox(counter: Counter, key: tuple[int, int]) -> Counter:
    """Philox4x32-10 (Salmon et al., 2011, "Parallel random numbers: as easy as 1, 2, 3"), elementwise.

    Args:
        counter: four `[rows]` int64 of 32 bits each.
        key: two words of 32 bits.

    Returns:
        Four `[rows]` int64, random words of 32 bits.
    """
    a, b, c, d = counter
    first, second = key
    for _ in range(ROUNDS):
        # The product fills 64 bits: as int64 it may come out negative, its bits are right.
        low, high = a * MULTIPLIERS[0], c * MULTIPLIERS[1]
        a, b, c, d = (high >> 32 & WORD) ^ b ^ first, high & WORD, (low >> 32 & WORD) ^ d ^ second, low & WORD
        first, second = first + KEY_STEPS[0] & WORD, second + KEY_STEPS[1] & WORD
    return a, b, c, d


def exploration_noise(seed: int, game: Tensor, step: int, token: Tensor) -> Tensor:
    """Uniform numbers in [0, 1), the same on every device and however the games are spread over processes.

    Args:
        seed: of the run.
        game: `[rows]` int64, the number of each row's game in the run.
        step: of the game, from 0.
        token: `[rows]` int64, each row's patch.

    Returns:
        `[rows]` float32, multiples of 2 ** -24.
    """
    counter = (token, torch.full_like(token, step), game & WORD, game >> 32 & WORD)
    word = philox(counter, (seed & WORD, seed >> 32 & WORD))[0]
    return (word >> 8).to(torch.float32) * 2.0**-24
