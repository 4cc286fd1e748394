"""The network of the game: it runs ragged token states from half-block to half-block.

Rows of all images are packed into one `[rows, D]` tensor, image by image; only attention needs to know where an image
begins.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from vitprune_env.engine.attention import Rows
from vitprune_env.engine.evidence import from_attention, image_evidence
from vitprune_env.engine.halves import PLAIN, Execution, run_halves
from vitprune_env.engine.masked import classify_masked, run_masked, start_masked
from vitprune_env.engine.network import Network
from vitprune_env.engine.tokens import TokenState, of_patches
from vitprune_env.lazy_fields import on_demand
from vitprune_env.types import Observation, Site


class Backbone(Network):
    """A plain timm ViT that runs packed, ragged tokens; arguments and errors are those of `Network`."""

    def run(
        self,
        state: TokenState,
        stop: int,
        needs: Collection[str] = frozenset(),
        log_size: bool = False,
        execution: Execution = PLAIN,
    ) -> tuple[TokenState, dict[str, Tensor]]:
        """Run on until `stop` half-blocks have run (0-based; even: attention, odd: MLP).

        Args:
            state: the tokens, which know how many half-blocks they have been through.
            stop: one past the last half-block to run.
            needs: evidence to collect, from attention in the last attention half of the range.
            log_size: proportional attention, log(size) added to the logits of each key.
            execution: how to compute attention and the parts beside it.

        Returns:
            The tokens afterwards and the evidence of the alive tokens, `[sum n_i, ...]` each.
        """
        rows = Rows(state.groups, lambda: state.row_offsets, lambda: state.row_patches)
        key_bias = _log_size(state) if log_size and stop > state.half else None
        halves = range(state.half, stop)
        wanted = from_attention(needs)
        x, by_row = run_halves(self.model, self.family, state.x, rows, halves, wanted, key_bias, execution)
        evidence = {name: value[state.patch_rows] for name, value in by_row.items()}
        for name, values in image_evidence(needs, state.images, self.grid_size).items():
            evidence[name] = of_patches(values, state)
        return state.with_rows(x, stop), evidence

    def observe(
        self, state: TokenState, site: Site, step: int, num_steps: int, evidence: Mapping[str, Tensor]
    ) -> Observation:
        """What a policy sees of the tokens at a site: copies, so that one that changes them in place changes nothing.

        Args:
            state: the tokens.
            site: where they are.
            step: which step of the game this is, from 0.
            num_steps: T.
            evidence: of the alive tokens, `[sum n_i, ...]` each.
        """
        return Observation(
            tokens=state.tokens,
            image=on_demand(_copied, state, "image"),
            token=on_demand(_copied, state, "token"),
            offsets=on_demand(_copied, state, "offsets"),
            cls=self.cls(state).clone(),
            alive=state.alive.clone(),
            size=on_demand(_copied, state, "size"),
            order=on_demand(_copied, state, "order"),
            position=on_demand(_copied, self, "position"),
            site=site,
            step=step,
            num_steps=num_steps,
            depth=self.depth,
            evidence=evidence,
            count=state.count,
            num_prefix=self.num_prefix,
            parked=None if state.waiting is None else state.waiting.clone(),
        )

    def forward_soft(self, images: Tensor, key_weights: Tensor) -> tuple[Tensor, Tensor]:
        """Masked execution: every token stays, its weight says how much others attend to it.

        The reference that real removal is tested against, and what fitted baselines train with. Differentiable in
        `key_weights`, also at 0 and 1.

        Args:
            images: `[B, C, H, W]`.
            key_weights: `[depth, B, N]` in 0..1, factor on the softmax numerators of each patch token in each block.
                Average-pooling models weigh the final mean with the last block's factors, or with an optional extra
                entry `[depth + 1, B, N]`.

        Returns:
            Logits `[B, classes]` and the tokens that leave the last block, `[B, P + N, D]`.
        """
        self.check_images(images)
        expected = (len(images), self.num_patches)
        if tuple(key_weights.shape[1:]) != expected or len(key_weights) not in (self.depth, self.depth + 1):
            raise ValueError(f"key_weights: expected [{self.depth}, B, N] with B, N = {expected}, "
                             f"got {list(key_weights.shape)}")  # fmt: skip
        state = start_masked(self, images)
        for number, weights in enumerate(key_weights[: self.depth], start=1):
            state, _ = run_masked(self, state, 2 * number, weights)
        return classify_masked(self, state, key_weights[-1]), state.x


def as_backbone(model: Backbone | nn.Module) -> Backbone:
    """A `Backbone` as it is; any other model as `load_backbone` takes it, which puts it in evaluation mode.

    Raises:
        TypeError: for something that is no model.
        UnsupportedBackboneError: for a model that the game cannot walk.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"backbone: expected a timm model or a Backbone, such as load_backbone() gives, got {model!r}")
    if isinstance(model, Backbone):
        return model
    return Backbone(model).to(next(model.parameters()).device).eval()


def _log_size(state: TokenState) -> Tensor:
    """Log of the patches that each row stands for, `[rows]`; 0 for prefix tokens."""
    bias = state.x.new_zeros(state.x.shape[0])
    return bias.index_copy(0, state.patch_rows, state.size[state.image, state.token].log().to(bias))


def _copied(owner: Any, name: str) -> Tensor:
    return getattr(owner, name).clone()
