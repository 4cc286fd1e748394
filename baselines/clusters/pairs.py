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
    partner = torch.arange(size, device=valid.device).expand(valid.shape)
    for step in range(most):
        first = table.amax(dim=2).argmax(dim=1)[:, None, None]  # quicker than one argmax over the whole table
        row = table.gather(1, first.expand(-1, 1, size))
        pair = torch.cat([first, row.argmax(dim=2, keepdim=True)], dim=1)  # [B, 2, 1]
        mate = partner.scatter(1, pair[..., 0], pair[..., 0].flip(1))
        partner = torch.where(count[:, None] > step, mate, partner)
        table.scatter_(1, pair.expand(-1, 2, size), float("-inf"))  # in place: copies would take most of the time
        table.scatter_(2, pair.mT.expand(-1, size, 2), float("-inf"))
    return partner
