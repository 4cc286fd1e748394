"""Published methods written down as their codes have them, one image and one list of tokens at a time.

The same settings as the other public vectors of these methods have: layer-wise Evo-ViT, ToMe at its limit, without
proportional attention and with a decreasing schedule, LTMP that only merges, EViT with and without its fused token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil, inf
from typing import Any

import pytest
import torch
from torch import Tensor

from vitprune_env.baselines import LTMP, EViT, EvoViT, ToMe, read_from_patches
from vitprune_env.engine.backbone import Backbone
from vitprune_env.game.rollout import play
from vitprune_env.game.token_game import TokenGame
from vitprune_env.policy import Policy

Pass = Callable[[Any, Tensor], tuple[Tensor, list[int]]]  # model and image to logits and tokens left, class included


def attend(block: Any, x: Tensor, bias: Tensor | float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Output of the attention branch `[n, D]`, attention `[heads, n, n]`, keys `[heads, n, d]`."""
    q, k, v = block.attn.qkv(block.norm1(x)).view(len(x), 3, block.attn.num_heads, -1).permute(1, 2, 0, 3)
    attention = (q @ k.mT * block.attn.scale + bias).softmax(dim=-1)
    return block.attn.proj((attention @ v).transpose(0, 1).flatten(1)), attention, k


def embed(model: Any, image: Tensor) -> Tensor:
    return model._pos_embed(model.patch_embed(image[None]))[0]


def classify(model: Any, token: Tensor) -> Tensor:
    return model.head(model.norm(token))


def evit(rate: float, fuse: bool) -> Pass:
    def run(model: Any, image: Tensor) -> tuple[Tensor, list[int]]:
        x, counts = embed(model, image), []
        for number, block in enumerate(model.blocks):
            y, attention, _ = attend(block, x)
            x = x + y
            if number in (3, 6, 9):
                score = attention.mean(dim=0)[0, 1:]
                order = score.argsort(descending=True)
                kept, rest = order.tensor_split([ceil(rate * len(order))])
                extra = [score[rest] @ x[1:][rest]] if fuse else []
                x = torch.stack([x[0], *x[1:][kept], *extra])
                counts.append(len(x))
            x = x + block.mlp(block.norm2(x))
        return classify(model, x[0]), counts

    return run


def evo_vit(rate: float, pooled: bool) -> Pass:
    """Layer-wise: everybody is ranked anew before each block from the fifth on."""

    def run(model: Any, image: Tensor) -> tuple[Tensor, list[int]]:
        x, counts, score = embed(model, image), [], torch.empty(0)
        slow = int(rate * (len(x) - 1))
        for number, block in enumerate(model.blocks):
            going = len(x) - 1 if number < 4 else slow
            order = torch.arange(len(x) - 1) if number < 4 else score.argsort(descending=True)
            patches = x[1:][order]
            front = torch.cat([x[:1], patches[:going]])
            y, attention, _ = attend(block, front)
            front = front + y
            front = front + block.mlp(block.norm2(front))
            x = torch.cat([front, patches[going:]])
            found = attention[:, 0, 1:].sum(dim=0)
            old = score[order] if number >= 4 else found
            score = torch.cat([0.5 * old[:going] + 0.5 * found, old[going:]])
            counts.append(len(front))
        return classify(model, x[1:].mean(dim=0) if pooled else x[0]), counts[4:]

    return run


def merging(pairs: Callable[[int, Tensor], int | None], proportional: bool) -> Pass:
    """ToMe and LTMP: `pairs` says how many merge in a block, given how similar each sender is to its best receiver."""

    def run(model: Any, image: Tensor) -> tuple[Tensor, list[int]]:
        x, counts = embed(model, image), []
        size = torch.ones(len(x), 1)
        for number, block in enumerate(model.blocks):
            y, _, keys = attend(block, x, size[:, 0].log() if proportional else 0.0)
            x = x + y
            metric = torch.nn.functional.normalize(keys.mean(dim=0), dim=1)
            similarity = metric[::2] @ metric[1::2].T
            similarity[0] = -inf
            best, into = similarity.max(dim=1)
            count = pairs(number, best)
            if count is not None:
                merged, rest = best.argsort(descending=True).tensor_split([count])
                rest = rest.sort().values
                total, size = (
                    torch.cat([z[::2][rest], z[1::2].index_add(0, into[merged], z[::2][merged])])
                    for z in (x * size, size)
                )
                x = total / size
            x = x + block.mlp(block.norm2(x))
            counts.append(len(x))
        return classify(model, x[0]), counts

    return run


def tome(schedule: Sequence[int], proportional: bool = True) -> Pass:
    """At most half of the tokens, the class token not among them; no pairs, no new order."""
    return merging(lambda block, best: min(schedule[block], len(best) - 1) or None, proportional)


def ltmp_merge(thresholds: Sequence[float]) -> Pass:
    """Every similarity above the block's threshold; the order is new even where there is none."""
    return merging(lambda block, best: int((best > thresholds[block]).sum()), proportional=True)


FALLING = [8, 7, 6, 5, 5, 4, 3, 2, 2, 1, 0, 0]
THRESHOLDS = [0.95, 0.9, 0.85, 0.8, 0.8, 0.75, 0.99, 0.8, 0.75, 0.7, 0.7, 0.6]
CASES: dict[str, tuple[Policy, Pass]] = {
    "evit 0.7 dropped": (EViT(0.7, fuse=False), evit(0.7, fuse=False)),
    "evit 0.5 fused": (EViT(0.5), evit(0.5, fuse=True)),
    "evo layer-wise": (EvoViT(0.5, layer_wise=True), evo_vit(0.5, pooled=False)),
    "evo layer-wise, pooled": (EvoViT(0.5, layer_wise=True), evo_vit(0.5, pooled=True)),
    "tome 8": (ToMe(8), tome([8] * 12)),
    "tome 8 not proportional": (ToMe(8, proportional_attention=False), tome([8] * 12, proportional=False)),
    "tome 4 decreasing": (ToMe(4, inflect=-1.0), tome(FALLING)),
    "ltmp merging": (LTMP(THRESHOLDS), ltmp_merge(THRESHOLDS)),
}


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_it_is_what_the_code_does(name: str, golden_backbone: Backbone, golden_images: Tensor) -> None:
    policy, plain = CASES[name]
    backbone = read_from_patches(golden_backbone) if "pooled" in name else golden_backbone
    outcome = play(TokenGame.for_policy(backbone, policy, sites="published"), policy, golden_images).outcome
    for image in range(len(golden_images)):
        logits, counts = plain(golden_backbone.model, golden_images[image])
        torch.testing.assert_close(outcome.logits[image], logits, atol=1e-4, rtol=0)
        left = (outcome.n_kept[image] + 1).tolist()
        assert left == counts[: len(left)]
