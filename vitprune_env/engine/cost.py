"""Closed-form MACs of a ViT pass from token counts, and the way from a budget to keep rates.

One multiply-accumulate is one MAC; what the token-pruning papers print as GFLOPs are GMACs. Counted are all matrix
products and convolutions (norms, softmax, activations and sorting are not, as in all of those papers).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from timm.layers.patch_embed import PatchEmbed
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vitprune_env.engine.evidence import evidence_macs
from vitprune_env.engine.families.adapter import linear_macs
from vitprune_env.engine.network import Network
from vitprune_env.errors import BudgetError
from vitprune_env.types import Site


@dataclass(frozen=True)
class CostModel:
    """What each part of a backbone costs, in MACs."""

    embed: int  # patch embedding of one image
    head: int  # classifier of one image, and what attention pooling costs whatever it reads
    attention_linear: tuple[int, ...]  # per block: qkv and projection, per row
    attention_width: tuple[int, ...]  # per block: heads * head dim; scores and mixing cost this per pair of rows, each
    mlp: tuple[int, ...]  # per block: per row
    num_prefix: int
    num_patches: int
    pool: int = 0  # attention pooling, per patch token that it reads

    @classmethod
    def of(cls, backbone: Network) -> CostModel:
        """Read the sizes off the modules of a backbone."""
        model, family = backbone.model, backbone.family
        blocks = [backbone.block(number) for number in range(1, backbone.depth + 1)]
        heads = [model.head, getattr(model, "head_dist", None)]
        pool = getattr(model, "attn_pool", None)
        heads += [] if pool is None else [pool.q, pool.proj, pool.mlp]
        return cls(
            embed=_embedding_macs(backbone),
            head=sum(linear_macs(head) for head in heads if head is not None),
            attention_linear=tuple(family.attention_macs(block) for block in blocks),
            attention_width=tuple(family.attention_width(block) for block in blocks),
            mlp=tuple(family.mlp_macs(block) for block in blocks),
            num_prefix=backbone.num_prefix,
            num_patches=backbone.num_patches,
            pool=0 if pool is None else linear_macs(pool.kv) + 2 * pool.num_heads * pool.head_dim,
        )

    @property
    def num_halves(self) -> int:
        """Half-blocks of the network."""
        return 2 * len(self.mlp)

    def half(self, index: int, rows: Tensor) -> Tensor:
        """MACs of half-block `index` (0-based; even: attention) on `rows` rows, prefix included."""
        block, is_mlp = divmod(index, 2)
        if is_mlp:
            return rows * self.mlp[block]
        return rows * self.attention_linear[block] + 2 * rows * rows * self.attention_width[block]

    def forward(self, n_kept: Tensor, sites: Sequence[Site]) -> Tensor:
        """MACs `[B]` (float64) of a pass in which `n_kept` `[B, T]` patch tokens stay after each of the T sites."""
        kept = n_kept.double()
        total = kept.new_full((len(kept),), float(self.embed + self.head))
        bounds = [0, *(site.half for site in sites), self.num_halves]
        for segment, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
            counts = torch.full_like(total, self.num_patches) if segment == 0 else kept[:, segment - 1]
            for index in range(start, stop):
                total = total + self.half(index, counts + self.num_prefix)
        return total + self.pool * kept[:, -1]

    def dense(self) -> float:
        """MACs of the unpruned pass."""
        return float(self.forward(torch.full((1, 1), self.num_patches), [Site(self.num_halves)]))

    def floor(self, sites: Sequence[Site]) -> float:
        """MACs if every patch token leaves at the first site: no budget can be below."""
        return float(self.forward(torch.zeros(1, len(sites)), sites))

    def evidence(self, site: Site, rows: Tensor, needs: frozenset[str]) -> Tensor:
        """MACs of the evidence computed for a site whose attention ran on `rows` rows."""
        return evidence_macs(needs, rows, self.attention_width[site.block - 1])

    def keep_rate_for(self, budget_macs: float, sites: Sequence[Site]) -> float:
        """The keep rate, the same at every site, at which a pass costs `budget_macs` on average.

        Raises:
            BudgetError: if the budget is not above what the prefix tokens cost alone, or above the dense cost.
        """
        check_budget(budget_macs, self.floor(sites), self.dense())

        def cost(rate: float) -> float:
            counts = self.num_patches * rate ** torch.arange(1, len(sites) + 1, dtype=torch.float64)
            return float(self.forward(counts[None], sites))

        return sum(bisect(cost, budget_macs, 0.0, 1.0, steps=60)) / 2


def bisect(
    cost: Callable[[float], float],
    target: float,
    low: float,
    high: float,
    steps: int,
    done: Callable[[float, float], bool] | None = None,
) -> tuple[float, float]:
    """Halve a range until its ends lie close around the point where the cost reaches the target.

    Args:
        cost: never falls on the way from `low` to `high`; evaluated once per halving, in the middle of the range.
        target: the cost to meet.
        low: end of the range where the cost is below the target. It may be the larger number of the two, for a cost
            that falls with the number.
        high: end of the range where the cost is at least the target.
        steps: halvings, at most.
        done: whether the range `(low, high)` is narrow enough to stop early; None: it never is.

    Returns:
        `(low, high)`, the ends of the last range: the cost at `low` is below the target, at `high` it is not.
    """
    for _ in range(steps):
        if done is not None and done(low, high):
            break
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) < target else (low, middle)
    return low, high


def check_budget(budget_macs: float, floor: float, dense: float) -> None:
    """Refuse a budget that no policy can meet.

    Raises:
        BudgetError: if it is not between floor and dense cost, both in MACs.
    """
    if not floor < budget_macs <= dense:
        raise BudgetError(
            f"budget: expected above {floor / 1e9:.5g} GMACs (every patch token pruned at the first site) and at most "
            f"{dense / 1e9:.5g} (dense), got {budget_macs / 1e9:.5g}"
        )


def mlp_macs(sizes: Sequence[int]) -> int:
    """MACs per row of a chain of linear layers with the given widths."""
    return sum(a * b for a, b in zip(sizes, sizes[1:], strict=False))


@torch.no_grad()
def _embedding_macs(backbone: Network) -> int:
    """MACs of the patch embedding: closed form for timm's own, counted once by running any other stem."""
    embed = backbone.model.patch_embed
    if type(embed) is PatchEmbed:
        return backbone.num_patches * embed.proj.weight.numel()
    weight = next(embed.parameters())
    image = weight.new_zeros(1, backbone.in_chans, *backbone.image_size)
    with FlopCounterMode(display=False) as counter:
        embed(image)
    return counter.get_total_flops() // 2
