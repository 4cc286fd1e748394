"""The most similar pairs of tokens, no token in two of them."""

from __future__ import annotations

import torch
from torch import Tensor


def match_pairs(similarity: Tensor, valid: Tensor, count: Tensor, most: int) -> Tensor:
    """Take the most similar pair, then the most similar one among the remaining tokens, and so on.

    Args:
        similarity: `[B, M, M]`, symmetric.
        valid: `[B, M]` bool, tokens that may be paired.
        count: `[B]` pairs wanted, at most half the valid tokens.
        most: the largest of `count`.

    Returns:
        The partner of every token, `[B, M]` int64; itself where it has none.
    """
    size = similarity.shape[1]
    upper = torch.ones(size, size, dtype=torch.bool, device=valid.device).triu(1)
    table = similarity.masked_fill(~(upper & valid[:, :, None] & valid[:, None, :]), float("-inf"))
    image = torch.arange(len(valid), device=valid.device)[:, None]
    partner = torch.arange(size, device=valid.device).expand(valid.shape)
    for step in range(most):
        first = table.amax(dim=2).argmax(dim=1, keepdim=True)  # quicker than one argmax over the whole table
        pair = torch.cat([first, table[image, first].argmax(dim=2)], dim=1)
        partner = torch.where(count[:, None] > step, partner.scatter(1, pair, pair.flip(1)), partner)
        table[image, pair] = float("-inf")  # in place: a copy per pair would take most of the time
        table[image, :, pair] = float("-inf")
    return partner
