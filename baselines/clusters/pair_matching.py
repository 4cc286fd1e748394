"""Pair matching of decouple and merge (Long et al., 2023): the most similar pairs of tokens, no token in two of them.

`match_pairs` takes pairs greedily from one set of tokens, and `merge_pairs` merges the less attentive token of each
pair into the other. The bipartite matching of ToMe and LTMP (`bipartite_matching`) differs: it matches every sender
with its most similar receiver, and several senders may share one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .token_lists import TokenLists


def match_pairs(similarity: Tensor, valid: Tensor, count: Tensor, most: int) -> Tensor:
    """Take the most similar pair, then the most similar pair of the remaining tokens, and so on.

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
        first = table.amax(dim=2).argmax(dim=1)[:, None, None]  # faster than one argmax over the whole table
        row = table.gather(1, first.expand(-1, 1, size))
        pair = torch.cat([first, row.argmax(dim=2, keepdim=True)], dim=1)  # [B, 2, 1]
        mate = partner.scatter(1, pair[..., 0], pair[..., 0].flip(1))
        partner = torch.where(count[:, None] > step, mate, partner)
        table.scatter_(1, pair.expand(-1, 2, size), float("-inf"))  # in place: copies would take most of the time
        table.scatter_(2, pair.mT.expand(-1, size, 2), float("-inf"))
    return partner


def merge_pairs(lists: TokenLists, attention: Tensor, pairs: Tensor, most: int) -> Tensor:
    """Match listed tokens in pairs by cosine similarity and merge the less attentive token of each into the other.

    Args:
        lists: the tokens.
        attention: `[B, M]`, their class attention; of equally attentive tokens the one with the lower patch number
            stays.
        pairs: `[B]`, pairs wanted.
        most: the largest of `pairs`.

    Returns:
        `[B, M]` int64, place in the list of the token that each token merges into.
    """
    partner = match_pairs(lists.cosines(), lists.valid, pairs, most)
    itself = torch.arange(lists.width, device=partner.device).expand(partner.shape)
    of_partner = attention.gather(1, partner)
    goes = (of_partner > attention) | ((of_partner == attention) & (partner < itself))
    return torch.where(goes, partner, itself)
