"""Some of each image's tokens as padded lists, with distances and similarities, for clustering and pair matching."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...types import Observation, as_index


@dataclass(frozen=True)
class TokenLists:
    """For every image a list of at most M of its alive tokens, in patch order."""

    token: Tensor  # [B, M] int64, patch numbers; N where a list is shorter
    valid: Tensor  # [B, M] bool, False where a list is shorter
    features: Tensor  # [B, M, D], zeros where a list is shorter
    num_tokens: int  # N
    is_uniform: bool  # whether all lists are known to be M long, without a device synchronisation

    @classmethod
    def of(cls, obs: Observation, members: Tensor, count: int | None = None) -> TokenLists:
        """List the tokens in `members`.

        Args:
            obs: the observation that they belong to.
            members: `[B, N]` bool, alive tokens.
            count: members of every image, where all have equally many and the number is known beforehand.
        """
        width = int(members.sum(dim=1).max()) if count is None else count
        num_tokens = obs.num_agents
        number = torch.arange(num_tokens, device=members.device)
        token = torch.where(members, number, num_tokens).sort(dim=1).values[:, :width]
        valid = token < num_tokens
        row = obs.offsets[:-1, None] + obs.alive.cumsum(dim=1) - 1
        row = row.gather(1, token.clamp(max=num_tokens - 1)).clamp(min=0)
        features = obs.tokens[row].masked_fill(~valid[..., None], 0)
        return cls(token, valid, features, num_tokens, count is not None)

    @property
    def width(self) -> int:
        """M."""
        return self.token.shape[1]

    @property
    def length(self) -> Tensor:
        """Tokens of each list, `[B]` int64."""
        return self.valid.sum(dim=1)

    def gather(self, values: Tensor) -> Tensor:
        """Pick the listed tokens' values `[B, M]` out of `[B, N]`; undefined where a list is shorter."""
        return values.gather(1, self.token.clamp(max=self.num_tokens - 1))

    def scatter(self, values: Tensor, into: Tensor) -> Tensor:
        """Write one value per listed token `[B, M]` into a copy of `[B, N]`."""
        padded = torch.cat([into, into[:, :1]], dim=1)  # lists that are shorter write into the extra column
        return padded.scatter(1, self.token, values)[:, :-1]

    def rows(self, values: Tensor, obs: Observation) -> Tensor:
        """The alive tokens as packed rows `[sum n_i, D]`, the listed ones replaced by `values` `[B, M, D]`."""
        dense = torch.cat([obs.dense(), values.new_zeros(obs.batch_size, 1, values.shape[2])], dim=1)
        return obs.gather(dense.scatter(1, self.token[..., None].expand_as(values), values.to(dense)))

    def inner_products(self, features: Tensor) -> Tensor:
        """Inner products of all pairs of `features` `[B, M, D]`, `[B, M, M]`.

        Equally long lists are multiplied together. Padding is left out: it would cost MACs, and the result of an image
        would depend on its batch.
        """
        if self.is_uniform:
            return features @ features.mT
        products = features.new_zeros(*self.valid.shape, self.width)
        for length in self.length.unique().tolist():
            images = as_index(self.length == length)
            part = features[images, :length]
            products[images, :length, :length] = part @ part.mT
        return products

    def inner_product_macs(self) -> Tensor:
        """MACs of `inner_products` for each image, `[B]` float64."""
        return self.length.double().square() * self.features.shape[2]

    def squared_distances(self) -> Tensor:
        """Squared Euclidean distances of all pairs, `[B, M, M]`; infinite where a list is shorter."""
        # A shift does not change distances, and products of centred features have smaller rounding errors.
        features = self.features.detach()
        mean = features.sum(dim=1, keepdim=True) / self.length.clamp(min=1)[:, None, None]
        products = self.inner_products((features - mean).masked_fill(~self.valid[..., None], 0))
        squares = products.diagonal(dim1=1, dim2=2)
        distances = (squares[:, :, None] + squares[:, None, :] - 2 * products).clamp(min=0)
        return distances.masked_fill(~(self.valid[:, :, None] & self.valid[:, None, :]), float("inf"))

    def cosines(self) -> Tensor:
        """Cosine similarities of all pairs, `[B, M, M]`; undefined where a list is shorter."""
        return self.inner_products(torch.nn.functional.normalize(self.features.detach(), dim=2))
