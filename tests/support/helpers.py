"""Small backbones, fixed decisions, and a deliberately naive forward pass to compare with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from places import GOLDEN
from vitprune_env.engine.backbone import Backbone
from vitprune_env.engine.tokens import TokenState
from vitprune_env.files import read_tensors
from vitprune_env.policy import BasePolicy
from vitprune_env.types import Decision, Observation, Site, parse_sites


def everyday(cases: Iterable[Any], *chosen: Any) -> list[Any]:
    """Cases of a test of which only the chosen ones are not slow."""
    return [case if case in chosen else pytest.param(case, marks=pytest.mark.slow) for case in cases]


@cache
def golden(name: str) -> dict[str, Tensor]:
    """One file of golden vectors."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def golden_model() -> VisionTransformer:
    """The small ViT of the golden vectors, 64 patches, 12 blocks, 10 classes."""
    norm = partial(nn.LayerNorm, eps=1e-6)
    model = VisionTransformer(
        img_size=64, patch_size=8, embed_dim=48, depth=12, num_heads=3, num_classes=10, norm_layer=cast(Any, norm)
    )
    model.load_state_dict(golden("backbone"))
    return model.eval()


SMALL = {"embed_dim": 48, "num_heads": 3, "depth": 4, "num_classes": 7, "img_size": 64}
# name in timm -> what to change so that it is small; every kind of ViT that the game supports is there once
TIMM_MODELS: dict[str, dict[str, Any]] = {
    "deit_tiny_patch16_224": {},
    "deit_tiny_distilled_patch16_224": {},
    "vit_tiny_patch16_224": {"patch_size": 8, "img_size": 40},
    "deit3_small_patch16_224": {},
    "vit_small_patch14_reg4_dinov2": {"img_size": 56},
    "vit_giant_patch14_dinov2": {"img_size": 56},  # SwiGLU
    "vit_medium_patch16_gap_240": {},  # average pooling, no class token
    "vit_base_patch16_224": {"global_pool": "avg"},  # average pooling beside a class token, as MAE fine-tunes
    "vit_base_patch16_clip_224": {},  # norm before the blocks
    "vit_base_patch16_siglip_224": {},  # attention pooling, no class token
    "eva02_tiny_patch14_224": {"img_size": 56},  # rotary positions, separate projections, SwiGLU, average pooling
    "vit_small_patch16_rope_mixed_224": {"global_pool": "token"},  # learnt angles per head and block
    "vit_small_patch16_224": {"qk_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True, "reg_tokens": 2},
}

# Rotary positions belong to places, so that permuting embedded tokens is another image for these.
ROTARY = {name for name in TIMM_MODELS if name.startswith("eva02") or "rope" in name}


def rewrite(path: Path, old: bytes, new: bytes) -> None:
    """Replace a part of a file of ours, which then has no checksum, as files of earlier versions."""
    tensors, metadata = read_tensors(path)
    save_file(tensors, path, metadata)
    path.write_bytes(path.read_bytes().replace(old, new))


@cache
def toy(name: str) -> Backbone:
    """A shrunk timm model in evaluation mode, with weights that make every part of it matter."""
    if name == "golden":
        return Backbone(golden_model(), name="golden")
    return Backbone(make_model(name), name=name)


def make_model(name: str, **changes: Any) -> VisionTransformer:
    """A shrunk timm model with random weights; layer scales and position embeddings are far from zero."""
    model = timm.create_model(name, **cast(Any, SMALL | TIMM_MODELS.get(name, {}) | changes)).eval()
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_gain = parameter.dim() == 1 and not key.endswith("bias")
            spread = 0.5 if key.endswith(("pos_embed", "token")) else 0.15
            parameter.copy_(1 + 0.2 * noise if is_gain else spread * noise)
    if getattr(model, "attn_pool", None) is not None:  # torch's counter of MACs fails on a view of a parameter
        cast(Any, model).attn_pool.latent.requires_grad_(False)
    return cast(VisionTransformer, model)


def random_images(backbone: Backbone, batch: int, seed: int = 0) -> Tensor:
    """Random images that fit a backbone."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, backbone.in_chans, *backbone.image_size, generator=generator)


@dataclass
class Fixed(BasePolicy):
    """Plays given decisions, whatever it sees."""

    decisions: Sequence[Decision]
    needs: frozenset[str] = frozenset()
    attention_bias: Any = None
    seen: list[Observation] = field(default_factory=list)

    def decide(self, obs: Observation) -> Decision:
        """The next decision of the list."""
        self.seen.append(obs)
        return self.decisions[obs.step]


def random_keeps(steps: int, batch: int, tokens: int, seed: int, least: int = 0) -> list[Tensor]:
    """Nested random keeps, each `[B, N]` bool; counts spread from nearly nothing to nearly everything."""
    generator = torch.Generator().manual_seed(seed)
    rate = torch.linspace(0.0, 1.0, batch)[torch.randperm(batch, generator=generator), None]
    alive, keeps = torch.ones(batch, tokens, dtype=torch.bool), []
    for _ in range(steps):
        chance = torch.rand(batch, tokens, generator=generator)
        strongest = chance.masked_fill(~alive, 2.0).argsort(dim=1).argsort(dim=1) < least
        alive = alive & ((chance < rate.sqrt()) | strongest)
        keeps.append(alive)
    return keeps


def random_merge(alive: Tensor, generator: torch.Generator, least: int = 0) -> Decision:
    """A random valid decision with drops, merges, weights, and targets that are themselves not kept."""
    batch, tokens = alive.shape
    itself = torch.arange(tokens).expand(batch, tokens)
    chance = torch.rand(batch, tokens, generator=generator).masked_fill(~alive, 2.0)
    rank = chance.argsort(dim=1).argsort(dim=1)
    centres = ((rank < least) | (torch.rand(batch, tokens, generator=generator) < 0.4)) & alive
    target = torch.full((batch, tokens), -1)
    for image in range(batch):
        options = centres[image].nonzero()[:, 0]
        for token in alive[image].nonzero()[:, 0].tolist():
            if centres[image, token]:
                target[image, token] = token
            elif len(options) and torch.rand((), generator=generator) < 0.7:
                target[image, token] = options[torch.randint(len(options), (), generator=generator)]
    keep = (target == itself) & ((rank < least) | (torch.rand(batch, tokens, generator=generator) < 0.8))
    weight = 0.2 + torch.rand(batch, tokens, generator=generator)
    return Decision(keep=keep, merge_into=target, weight=weight)


def evidence_of(backbone: Backbone) -> frozenset[str]:
    """All evidence that a backbone can give."""
    names = {"mean_attention", "keys", "value_norms"}
    return frozenset(names | {"cls_attention"} if backbone.has_class_token else names)


def spread_keeps(backbone: Backbone, sites: list[str], batch: int, seed: int) -> list[Tensor]:
    """Nested keeps from nearly nothing to everything; nothing only where the model has a class token to read."""
    return random_keeps(len(sites), batch, backbone.num_patches, seed, least=int(backbone.needs_patches))


def random_merges(backbone: Backbone, steps: int, batch: int, seed: int) -> list[Decision]:
    """A game's worth of random drops and merges."""
    generator = torch.Generator().manual_seed(seed)
    alive, decisions = torch.ones(batch, backbone.num_patches, dtype=torch.bool), []
    for _ in range(steps):
        decisions.append(random_merge(alive, generator, least=int(backbone.needs_patches)))
        alive = decisions[-1].keep
    return decisions


def permuted(state: TokenState, order: Tensor) -> TokenState:
    """The same game with patch token `order[j]` in place j."""
    x = torch.cat([state.prefix, state.tokens.unflatten(0, state.alive.shape)[:, order]], dim=1)
    return state.with_rows(x.flatten(0, 1))


@dataclass
class NaiveImage:
    """How one image left the network in the naive pass."""

    logits: Tensor  # [C]
    tokens: list[int]  # numbers of the patch tokens that are there at the end
    members: dict[int, set[int]]  # token -> original patches that are in it


@torch.no_grad()
def naive_pass(
    backbone: Backbone, image: Tensor, sites: Sequence[int | str | Site], decisions: Sequence[Decision], row: int,
    log_size: bool = False,
) -> NaiveImage:  # fmt: skip
    """One image through timm's own modules, its tokens removed and merged one by one in Python.

    Args:
        backbone: the network.
        image: `[C, H, W]`.
        sites: where the decisions are taken.
        decisions: one per site.
        row: which row of the decisions belongs to the image.
        log_size: proportional attention.
    """
    model, prefix = cast(Any, backbone.model), backbone.num_prefix
    embedded = model._pos_embed(model.patch_embed(image[None]))
    x = model.norm_pre(embedded[0] if isinstance(model, Eva) else embedded)[0]
    front, rows = x[:prefix], {token: x[prefix + token] for token in range(backbone.num_patches)}
    members, waiting = {token: {token} for token in rows}, {}
    at = {site.half: decision for site, decision in zip(parse_sites(sites, backbone.depth), decisions, strict=True)}
    for half in range(2 * backbone.depth):
        block, order = cast(Any, model.blocks[half // 2]), sorted(rows)
        x = torch.stack([*front, *(rows[token] for token in order)])[None]
        if half % 2:
            x = x + _scaled(block, 2, block.mlp(block.norm2(x)))
        else:
            sizes = [1.0] * prefix + [float(len(members[token])) for token in order]
            bias = torch.tensor(sizes).log().view(1, 1, 1, -1) if log_size else None
            turned = {"rope": _angles(model, half // 2)[..., order, :]} if isinstance(model, Eva) else {}
            x = x + _scaled(block, 1, block.attn(block.norm1(x), attn_mask=bias, **turned))
        front, rows = x[0, :prefix], {token: x[0, prefix + i] for i, token in enumerate(order)}
        if half + 1 in at:
            rows, members = _naive_reduce(rows | waiting, members, at[half + 1], row)
            park = at[half + 1].park
            waiting = {token: rows.pop(token) for token in list(rows) if park is not None and park[row, token]}
    rows |= waiting
    pooled = model.norm(torch.stack([*front, *(rows[token] for token in sorted(rows))])[None])
    return NaiveImage(model.forward_head(pooled)[0], sorted(rows), members)


def _scaled(block: Any, half: int, branch: Tensor) -> Tensor:
    """A block's branch times its layer scale, a module in ViTs and a parameter in Eva."""
    if hasattr(block, f"ls{half}"):
        return getattr(block, f"ls{half}")(branch)
    gamma = getattr(block, f"gamma_{half}")
    return branch if gamma is None else gamma * branch


def _angles(model: Eva, block: int) -> Tensor:
    """timm's own rotary table for one block, `[..., N, 2 * head dim]`."""
    table = cast(Any, model.rope).get_embed()
    return table[block] if model.rope_mixed else table


def _naive_reduce(
    rows: dict[int, Tensor], members: dict[int, set[int]], decision: Decision, image: int
) -> tuple[dict[int, Tensor], dict[int, set[int]]]:
    """One decision, applied to one image token by token."""

    def target(token: int) -> int:
        return token if decision.merge_into is None else int(decision.merge_into[image, token])

    def weight(token: int) -> float:
        return 1.0 if decision.weight is None else float(decision.weight[image, token])

    new_rows, new_members = {}, {}
    for token in rows:
        if not decision.keep[image, token] or target(token) != token:
            continue
        group = [other for other in rows if other == token or (target(other) == token)]
        if decision.merge_into is None:
            group = [token]
        new_rows[token] = torch.stack([weight(other) * rows[other] for other in group]).sum(dim=0)
        new_members[token] = set().union(*(members[other] for other in group))
    return new_rows, new_members


def keeps_to_decisions(keeps: Sequence[Tensor]) -> list[Decision]:
    """Plain pruning decisions."""
    return [Decision(keep=keep) for keep in keeps]


def key_weights(backbone: Backbone, sites: Sequence[int | str | Site], keeps: Sequence[Tensor]) -> Tensor:
    """The masks `[depth + 1, B, N]` under which masked execution plays the same game."""
    alive, table = torch.ones_like(keeps[0]), []
    at = {site.half: keep for site, keep in zip(parse_sites(sites, backbone.depth), keeps, strict=True)}
    for half in range(2 * backbone.depth + 1):
        alive = at.get(half, alive)
        if half % 2 == 0:
            table.append(alive)
    return torch.stack(table).float()
