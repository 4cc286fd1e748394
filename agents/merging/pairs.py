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
LEAST = 1e-4  # below, a dissimilarity is rounding error


@dataclass(frozen=True)
class Pairs:
    """The P tokens that could merge at a site, each with the token that it would go into."""

    image: Tensor  # [P] int64
    token: Tensor  # [P] int64, patch number of the token that decides
    features: Tensor  # [P, F], see `FEATURES`
    matching: Matching

    @classmethod
    def of(cls, obs: Observation, weight: Tensor, bias: Tensor) -> Pairs:
        """Match the alive tokens, and look at the pairs.

        Importance is what a linear look at the standardised token says. Dissimilarity is the logarithm of 1 minus the
        cosine similarity of the keys. Sizes, the number of alive tokens, and the token's attention from the class
        token relative to the mean are logarithms, too.

        Args:
            obs: what the policy sees, with the evidence `keys` and, for the last feature, `cls_attention`.
            weight: `[D]`, of the look.
            bias: `[]`, of the look.
        """
        matching = match_bipartite(obs)
        rows = as_index(obs.gather(matching.sends))
        image, token = obs.image[rows], obs.token[rows]
        tokens = obs.tokens[rows].float()
        number = obs.num_alive[image].float()
        columns = [
            F.layer_norm(tokens, tokens.shape[1:]) @ weight + bias,
            (1 - matching.score[image, token].float()).clamp(min=LEAST).log(),
            obs.size[image, token].log(),
            obs.size[image, matching.partner[image, token]].log(),
            (number / obs.num_agents).log(),
        ]
        if "cls_attention" in obs.evidence:
            columns.append((obs.evidence["cls_attention"][rows].float() * number + LEAST).log())
        return cls(image, token, torch.stack(columns, dim=1), matching)
