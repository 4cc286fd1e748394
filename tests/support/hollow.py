"""Networks of full size whose blocks leave the tokens as they are.

A game on one takes milliseconds. Policies decide at the true width on the true number of tokens, evidence comes from
one head, and the books are those of the real network. Only what the tokens say is noise, on which the numbers of tokens
of the methods that keep a fixed share do not depend.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, cast

import timm
import torch
from torch import Tensor

from vitprune_env import Backbone, Outcome, TokenGame, load_backbone, play
from vitprune_env.engine.families.adapter import Projections
from vitprune_env.engine.families.vit import ViTFamily
from vitprune_env.policy import Policy


class HollowFamily(ViTFamily):
    """Noise in place of embedded images, and blocks that add nothing; norm and classifier are the model's."""

    def embed(self, model: Any, images: Tensor) -> Tensor:
        """Noise `[B, P + N, D]`."""
        tokens = model.num_prefix_tokens + model.patch_embed.num_patches
        generator = torch.Generator().manual_seed(0)
        return torch.randn(len(images), tokens, model.embed_dim, generator=generator)

    def before_attention(self, block: Any, x: Tensor, position: Tensor | None) -> Projections:
        """The first channels of the rows as queries, keys and values of a single head."""
        rows = x[:, None, : block.attn.head_dim]
        return Projections(rows, rows, rows)

    def after_attention(self, block: Any, x: Tensor, y: Tensor, factor: Tensor | None) -> Tensor:
        """The rows as they are."""
        return x

    def feed_forward(self, block: Any, x: Tensor, factor: Tensor | None) -> Tensor:
        """The rows as they are."""
        return x


@cache
def hollow(name: str, image_size: tuple[int, int] = (224, 224)) -> Backbone:
    """A network by timm's name, or `lv_vit_s`; the blocks of timm's have no weights in memory."""
    if name == "lv_vit_s":
        backbone = load_backbone(name)
    else:
        with torch.device("meta"):
            model = cast(Any, timm.create_model(name, img_size=image_size)).eval()
        for part in (model.norm, model.head):
            part.to_empty(device="cpu").reset_parameters()
        backbone = Backbone(model, name)
    backbone.family = HollowFamily()
    return backbone


@torch.no_grad()
def played(
    policy: Policy, name: str, sites: Sequence[int | str] | None = None, image_size: tuple[int, int] = (224, 224)
) -> Outcome:
    """The outcome of one image.

    Args:
        policy: plays.
        name: of the network.
        sites: None: where the policy's paper has it.
        image_size: height and width in pixels.
    """
    backbone = hollow(name, image_size)
    image = torch.zeros(1, backbone.in_chans, *backbone.image_size)
    return play(TokenGame.for_policy(backbone, policy, sites=sites or "published"), policy, image).outcome
