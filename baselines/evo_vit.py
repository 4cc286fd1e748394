"""Evo-ViT (Xu et al., 2022): informative tokens go through the blocks, the others wait and come back unchanged."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..engine.backbone import Backbone
from ..errors import UnsupportedBackboneError
from ..policy import BasePolicy, check_keep_rate
from ..types import Decision, Observation, Site
from .argument_checks import check_flag, check_range


@dataclass
class EvoViT(BasePolicy):
    """The `int(keep_rate * N)` tokens with the largest global class attention go on, all others wait.

    Slow-fast token evolution (section 3.3) as the authors' DeiT code has it. The global class attention g starts as the
    class attention of the block before the first selection. Each later block changes it, for the tokens that it
    updates, to `(1 - momentum) * g + momentum * attention` (Eq. 3); waiting tokens keep their g. Waiting tokens (the
    paper's placeholders) stay in the game: at the next selection all N tokens are ranked again, and all of them come
    back before the image is classified. The authors' code departs from the paper, and we follow the code: it has no
    representative token that aggregates the waiting ones, and hence no fast update.

    Stage-wise, the tokens for blocks 5 to 8 of 12 are selected after block 4 and those for blocks 9 to 12 after block 8
    (thirds of any other depth); at the sites in between the policy only updates g. Layer-wise, tokens are selected
    before every block from the 5th on. The published network reads its class from the mean of all patch tokens
    (`read_from_patches`); a stock network reads it as before.

    Args:
        keep_rate: fraction of the tokens that go on, above 0 and at most 1; 0.5 is published.
        layer_wise: whether to select before every block, as in the authors' first 200 epochs of training.
        momentum: weight of the newest attention, above 0 and at most 1.
    """

    keep_rate: float
    layer_wise: bool = False
    momentum: float = 0.5
    _score: Tensor | None = field(default=None, init=False, repr=False, compare=False)  # [B, N] g, of this batch
    _total: int | None = field(default=None, init=False, repr=False, compare=False)  # tokens of every image, if known
    needs = frozenset({"cls_attention"})

    def __post_init__(self) -> None:
        check_keep_rate(self.keep_rate)
        check_flag("layer_wise", self.layer_wise)
        check_range("momentum", self.momentum, 0, 1, open_low=True)

    def published_sites(self, depth: int) -> Sequence[int | str | Site] | None:
        """After blocks 4 to 8 of 12, layer-wise 4 to 11: every block whose attention a later selection uses."""
        first, *later = selecting_blocks(depth, self.layer_wise)
        return range(first, (later[-1] if later else first) + 1)

    def reset(self, batch_size: int, num_agents: int) -> None:
        """Discard g of the last images."""
        self._score, self._total = None, None

    def decide(self, obs: Observation) -> Decision:
        """Update g; where a stage begins, rank all tokens by it."""
        attention = obs.scatter(obs.evidence["cls_attention"].detach())
        if self._score is None or obs.step == 0:
            score, self._total = attention, obs.count if obs.parked is None else None
        else:
            blended = (1 - self.momentum) * self._score + self.momentum * attention
            score = torch.where(obs.alive, blended, self._score)
        self._score = score
        present = obs.alive if obs.parked is None else obs.alive | obs.parked
        # The first selection is made at the first site, whichever block that is.
        if obs.step and obs.site.block not in selecting_blocks(obs.depth, self.layer_wise):
            waiting = None if obs.count is None or self._total is None else self._total - obs.count
            return Decision(keep=present, park=obs.parked, count=obs.count, park_count=waiting)
        wanted = max(1, int(self.keep_rate * obs.num_agents))
        score = score.masked_fill(~present, float("-inf"))  # tokens pruned before the first site come last
        ranks = score.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        count = None if self._total is None else min(wanted, self._total)
        waiting = None if self._total is None or count is None else self._total - count
        return Decision(keep=present, park=(ranks >= wanted) & present, count=count, park_count=waiting)


def selecting_blocks(depth: int, layer_wise: bool) -> Sequence[int]:
    """1-based blocks after which Evo-ViT selects: at one and two thirds of the network, or every one from there on."""
    thirds = sorted({max(1, round(depth * part / 3)) for part in (1, 2)})
    return range(thirds[0], max(thirds[0] + 1, depth)) if layer_wise else thirds


def read_from_patches(backbone: Backbone) -> Backbone:
    """A copy of a network that reads the class from the mean of all patch tokens, as Evo-ViT was trained to.

    The final norm and the head are applied to that mean (timm's `global_pool="avg"`), in a stock network to the class
    token.

    Raises:
        UnsupportedBackboneError: for a distilled network, which has a head for each of its two class tokens.
    """
    if backbone.reads_patches:
        return backbone
    model = deepcopy(backbone.model)
    if hasattr(model, "head_dist"):
        raise UnsupportedBackboneError(f"backbone: expected a network with one head, got {backbone.name} with two")
    model.global_pool = "avg"
    model.norm, model.fc_norm = nn.Identity(), model.norm
    return Backbone(model, backbone.name, backbone.default_sites, backbone.class_names)
