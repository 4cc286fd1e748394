"""What an agent sees when it decides whether to merge: a few numbers about itself and the token most like it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...game.bipartite_matching import Matching, match_bipartite
from ...types import Observation, as_index

FEATURES = ("importance", "dissimilarity", "size", "partner size", "alive", "class attention")
"""What is seen of a pair, in this order; the last only in networks with a class token."""
LEAST = 1e-4  # below, a dissimilarity is rounding error; an attention of 0 has a logarithm as well


@dataclass(frozen=True)
class Pairs:
    """The P tokens that could merge at a site, each with the token that it would go into."""

    image: Tensor  # [P] int64
    token: Tensor  # [P] int64, patch number of the token that decides
    features: Tensor  # [P, F], see `FEATURES`
    matching: Matching

    @classmethod
    def of(cls, obs: Observation, look: Tensor, class_attention: bool = True) -> Pairs:
        """Match the alive tokens, and look at the pairs.

        Importance is what a linear look at the standardised token says. Dissimilarity is the logarithm of 1 minus the
        cosine similarity of the keys. Sizes, the share of tokens that are alive, and the token's attention from the
        class token, times the number of alive tokens, are logarithms, too.

        Args:
            obs: what the policy sees, with the evidence `keys` and, for the last feature, `cls_attention`.
            look: `[D + 1]`, weights and bias.
            class_attention: whether to see the last feature.
        """
        matching = match_bipartite(obs)
        rows = as_index(obs.gather(matching.sends))
        image, token = obs.image[rows], obs.token[rows]
        tokens = obs.tokens[rows].float()
        number = obs.num_alive[image].float()
        columns = [
            F.layer_norm(tokens, tokens.shape[1:]) @ look[:-1] + look[-1],
            (1 - matching.score[image, token].float()).clamp(min=LEAST).log(),
            obs.size[image, token].log(),
            obs.size[image, matching.partner[image, token]].log(),
            (number / obs.num_agents).log(),
        ]
        if class_attention:
            columns.append((obs.evidence["cls_attention"][rows].float() * number + LEAST).log())
        return cls(image, token, torch.stack(columns, dim=1), matching)
