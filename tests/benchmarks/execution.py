"""Is packed execution the right choice here? Times it against pad-to-longest, and the game against the plain model.

    python tests/benchmarks/execution.py                  # one thread, CPU time, medians over runs in turn

Not a test: nothing is asserted about time but the last line, which says whether the lower quartile of the game's
overhead exceeds what is allowed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import tyro
from torch import Tensor

from vitprune_env import Backbone, KeepAll, PrunedViT, TokenGame, load_backbone, play
from vitprune_env.benchmarking.speed import ScriptedCounts
from vitprune_env.engine.tokens import TokenState

OVERHEAD = 1.03  # of a game in which everybody stays, over the plain forward pass


@dataclass(frozen=True)
class Args:
    """What to time."""

    model: str = "deit_tiny_patch16_224"
    """Name of a plain timm ViT."""
    batch_sizes: tuple[int, ...] = (8, 32)
    """Images per batch for packed against padded."""
    pairs: int = 31
    """Runs of each, in turn."""
    seed: int = 0
    """Of images and script."""


class PaddedViT(PrunedViT):
    """The same pruned model, every image padded to the longest one and the padding masked: what packing replaces."""

    def _run(
        self, state: TokenState, stop: int, needs: frozenset[str] = frozenset()
    ) -> tuple[TokenState, dict[str, Tensor]]:
        lengths = torch.tensor(state.lengths)
        place = torch.arange(int(lengths.max()))
        there = place < lengths[:, None]
        rows = state.first_row[:, None] + torch.where(there, place, 0)
        x = state.x[rows]
        mask = None if there.all() else torch.zeros(there.shape).masked_fill(~there, float("-inf"))[:, None, None]
        for half in range(state.half, stop):
            block = self.backbone.block(half // 2 + 1)
            branch = block.mlp(block.norm2(x)) if half % 2 else block.attn(block.norm1(x), attn_mask=mask)
            x = x + (block.ls2 if half % 2 else block.ls1)(branch)
        packed = torch.empty_like(state.x)
        packed[rows[there]] = x[there]
        return state.with_rows(packed, stop), {}


def seconds(run: Callable[[], object]) -> float:
    """CPU time of a run."""
    start = time.process_time()
    run()
    return time.process_time() - start


def ratios(slow: Callable[[], object], fast: Callable[[], object], pairs: int) -> list[float]:
    """Time of one over time of the other, pair by pair."""
    for _ in range(2):
        slow()
        fast()
    return [seconds(slow) / seconds(fast) for _ in range(pairs)]


@torch.inference_mode()
def against_padding(backbone: Backbone, batch: int, args: Args) -> float:
    """Median of padded over packed."""
    images = torch.randn(batch, backbone.in_chans, *backbone.image_size)
    packed, padded = (
        kind(backbone, ScriptedCounts((0.70, 0.49, 0.34), 0.2, args.seed)).eval() for kind in (PrunedViT, PaddedViT)
    )
    torch.testing.assert_close(packed(images), padded(images), atol=1e-4, rtol=1e-4)
    return statistics.median(ratios(lambda: padded(images), lambda: packed(images), args.pairs))


@torch.inference_mode()
def overhead(backbone: Backbone, batch: int, args: Args) -> list[float]:
    """Quartiles of a game in which everybody stays over the plain forward pass."""
    images = torch.randn(batch, backbone.in_chans, *backbone.image_size)
    game = TokenGame.for_policy(backbone, KeepAll())
    found = ratios(lambda: play(game, KeepAll(), images), lambda: backbone(images), args.pairs)
    return statistics.quantiles(found, n=4)


def main() -> None:
    """Time and report."""
    args = tyro.cli(Args, description=__doc__)
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    backbone = load_backbone(args.model)
    low, median, high = overhead(backbone, 8, args)
    verdict = "too much" if low > OVERHEAD else "fine"
    print(f"keep-all game / plain forward, batch 8: {median:.3f} ({low:.3f} to {high:.3f}), {verdict}", flush=True)
    for batch in args.batch_sizes:
        print(f"padded / packed, batch {batch}: {against_padding(backbone, batch, args):.2f}", flush=True)


if __name__ == "__main__":
    main()
