"""LV-ViT-S (Jiang et al., "All Tokens Matter", NeurIPS 2021), built from timm's `VisionTransformer` and `Block`.

What distinguishes it from DeiT: four convolutions instead of one patchify, MLPs three times as wide as the tokens, no
bias on queries, keys and values, residual branches divided by a constant (`skip_lam`), and a second head that gives
every patch token a class while training (token labelling). The sizes are those of the authors' code; its weights load
by name. Their evaluation adds half of the largest token logit of each class to the class token's logits; the game, and
the papers that prune this model, classify by the class token.

Methods that act in blocks 4, 7 and 10 of a DeiT act in blocks 5, 9 and 13 of these 16. Long et al., 2023, print layers
4, 8 and 12, and GMACs that only 5, 9 and 13 give; docs/baselines.md has both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from timm.layers.conv_bn_act import ConvNormAct
from timm.layers.hybrid_embed import HybridEmbed
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn


@dataclass(frozen=True)
class LvVitPreset:
    """Sizes of an LV-ViT; lengths in pixels."""

    stem_channels: int
    stem_kernels: tuple[int, ...]
    stem_strides: tuple[int, ...]
    patch_size: int  # of the stem's feature map
    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float
    skip_lam: float  # residual branches are divided by it


LV_VIT_S = LvVitPreset(
    stem_channels=64,
    stem_kernels=(7, 3, 3),
    stem_strides=(2, 1, 1),
    patch_size=8,
    embed_dim=384,
    depth=16,
    num_heads=6,
    mlp_ratio=3.0,
    skip_lam=2.0,
)


class ResidualScale(nn.Module):
    """Multiplies a residual branch by a constant: timm's `LayerScale` with nothing to learn."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """Scale `[..., D]`."""
        return x * self.factor


class LvVit(VisionTransformer):
    """A timm ViT with constant residual scales and, if asked for, a head for token labels.

    Args:
        skip_lam: what residual branches are divided by.
        token_labels: whether to have the auxiliary head `aux_head`.
        **options: of `VisionTransformer`.
    """

    def __init__(self, skip_lam: float = 1.0, token_labels: bool = False, **options: Any) -> None:
        super().__init__(**options)
        for block in self.blocks:
            block.ls1, block.ls2 = ResidualScale(1 / skip_lam), ResidualScale(1 / skip_lam)
        self.aux_head = nn.Linear(self.embed_dim, self.num_classes) if token_labels else None

    def forward_token_labels(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What token labelling trains on: class logits `[B, C]` and the logits of every patch token `[B, N, C]`.

        Raises:
            ValueError: for a model without the auxiliary head.
        """
        if self.aux_head is None:
            raise ValueError("token_labels: this model was made without its auxiliary head; pass token_labels=True")
        tokens = self.forward_features(images)
        return self.forward_head(tokens), self.aux_head(tokens[:, self.num_prefix_tokens :])


def conv_stem(preset: LvVitPreset, in_chans: int = 3) -> nn.Sequential:
    """The convolutions before the last one, which makes the patches; each with batch norm and ReLU."""
    layers, channels = [], in_chans
    for kernel, stride in zip(preset.stem_kernels, preset.stem_strides, strict=True):
        layers.append(ConvNormAct(channels, preset.stem_channels, kernel, stride))
        channels = preset.stem_channels
    return nn.Sequential(*layers)


def token_label_loss(
    logits: Tensor, token_logits: Tensor, labels: Tensor, token_labels: Tensor, weight: float = 0.5
) -> Tensor:
    """Cross-entropy of the image's class plus `weight` times the mean one of its patches.

    Args:
        logits: `[B, C]`.
        token_logits: `[B, N, C]`.
        labels: `[B]` int64, or soft `[B, C]`.
        token_labels: soft `[B, N, C]`, which class is where in the image.
        weight: of the token labels; 0.5 in the paper.
    """
    dense = nn.functional.cross_entropy(token_logits.flatten(0, 1), token_labels.flatten(0, 1))
    return nn.functional.cross_entropy(logits, labels) + weight * dense


def filter_checkpoint(state: Mapping[str, Any], model: LvVit) -> dict[str, Tensor]:
    """Weights under the authors' names, or our own, fitted to a model: size of the image, with or without aux head."""
    state = state.get("state_dict", state.get("model", state))
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        stem, _, rest = name.removeprefix("patch_embed.").partition(".")
        if name.startswith("patch_embed.") and stem[:-1] in ("conv", "bn"):
            kind, number = stem[:-1], int(stem[-1]) - 1
            name = f"patch_embed.backbone.{number}.{kind}.{rest}"
        if model.aux_head is not None or not name.startswith("aux_head."):
            renamed[name] = value
    return checkpoint_filter_fn(renamed, model)


default_cfgs = generate_default_cfgs(
    {
        "lv_vit_s": {
            "url": "",
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "pool_size": None,
            "crop_pct": 0.9,
            "interpolation": "bicubic",
            "fixed_input_size": True,
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "first_conv": "patch_embed.backbone.0.conv",
            "classifier": "head",
            "license": "apache-2.0",
        }
    }
)


@register_model
def lv_vit_s(pretrained: bool = False, **options: Any) -> LvVit:
    """LV-ViT-S: 16 blocks of width 384 behind four convolutions, 83.3 % top-1 on ImageNet as published."""
    preset = LV_VIT_S
    sizes = {
        "patch_size": preset.patch_size,
        "embed_dim": preset.embed_dim,
        "depth": preset.depth,
        "num_heads": preset.num_heads,
        "mlp_ratio": preset.mlp_ratio,
        "qkv_bias": False,
        "skip_lam": preset.skip_lam,
        "norm_layer": nn.LayerNorm,  # torch's epsilon of 1e-5, not timm's 1e-6
        "embed_layer": partial(HybridEmbed, backbone=conv_stem(preset, options.get("in_chans", 3))),
    }
    model = build_model_with_cfg(
        LvVit, "lv_vit_s", pretrained, pretrained_filter_fn=filter_checkpoint, **{**sizes, **options}
    )
    return cast(LvVit, model)
