"""`converted_vit`: a timm `VisionTransformer` whose sizes are JSON values that it remembers.

Models that come from elsewhere (see `hugging_face`) become one of these, and can be saved and built again without what
they came from.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from timm.layers.mlp import Mlp, SwiGLUPacked
from timm.models import generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

ARCHITECTURE = "converted_vit"
TIMMS_OWN = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")  # what timm passes to every architecture


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _is_count(value: Any) -> bool:
    return _is_number(value) and isinstance(value, int)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


OPTIONS: dict[str, Callable[[Any], bool]] = {  # that a file may give, beside those of every architecture
    "patch_size": lambda value: isinstance(value, list) and len(value) == 2 and all(map(_is_count, value)),
    **dict.fromkeys(("embed_dim", "depth", "num_heads"), _is_count),
    **dict.fromkeys(("mlp_ratio", "norm_eps", "init_values"), _is_number),
    **dict.fromkeys(
        ("qkv_bias", "swiglu", "has_head", "pre_norm", "class_token", "no_embed_class", "final_norm", "fc_norm"),
        _is_flag,
    ),
    "reg_tokens": lambda value: isinstance(value, int) and value >= 0,
    "act": lambda value: isinstance(value, str),
}


class ConvertedViT(VisionTransformer):
    """A timm ViT of given sizes that remembers them.

    Args:
        embed_dim: width of the tokens.
        norm_eps: epsilon of the norms.
        act: activation of the MLPs, by timm's name.
        swiglu: whether the MLPs are gated.
        has_head: whether there is a linear head; without one, the pooled features stand for logits.
        global_pool: as in timm, or `"token_and_mean"`, for a head that reads the class token and the mean of the patch
            tokens side by side, as DINOv2's does.
        num_classes: width of the head; without a head it can only be that of the features, or None.
        **options: of `VisionTransformer`, as JSON values.

    Raises:
        ValueError: for a number of classes without a head, or a head without one.
    """

    def __init__(
        self,
        embed_dim: int,
        norm_eps: float = 1e-6,
        act: str = "gelu",
        swiglu: bool = False,
        has_head: bool = True,
        global_pool: str = "token",
        num_classes: int | None = None,
        **options: Any,
    ) -> None:
        both = global_pool == "token_and_mean"
        width = embed_dim * (2 if both else 1)
        if not has_head and num_classes not in (None, width):
            raise ValueError(
                f"num_classes: expected {width}, the features of a network without a head, got {num_classes}"
            )
        if has_head and num_classes is None:
            raise ValueError("num_classes: expected the width of the head, got None")
        classes = width if num_classes is None else num_classes
        super().__init__(
            embed_dim=embed_dim,
            norm_layer=partial(nn.LayerNorm, eps=norm_eps),  # pyright: ignore[reportArgumentType]  # timm takes any
            act_layer=act,  # pyright: ignore[reportArgumentType]  # timm resolves names here
            mlp_layer=cast(Any, SwiGLUPacked if swiglu else Mlp),
            global_pool="token" if both else global_pool,  # pyright: ignore[reportArgumentType]
            num_classes=classes if has_head and not both else 0,
            **options,
        )
        if both:
            self.global_pool: Any = global_pool
            self.head = nn.Linear(width, classes) if has_head else nn.Identity()
        self.num_classes = classes
        own = {"embed_dim": embed_dim, "norm_eps": norm_eps, "act": act, "swiglu": swiglu, "has_head": has_head}
        self.options = {name: value for name, value in {**own, **options}.items() if name in OPTIONS}
        """What the constructor is to be called with again, beside image size, channels, pooling and classes."""

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """As timm's, and the class token beside the mean of the patch tokens, `[B, 2 D]`."""
        if self.global_pool != "token_and_mean":
            return super().pool(x, pool_type)
        return torch.cat([x[:, 0], x[:, self.num_prefix_tokens :].mean(dim=1)], dim=1)


default_cfgs = generate_default_cfgs({ARCHITECTURE: {"first_conv": "patch_embed.proj", "classifier": "head"}})


@register_model
def converted_vit(pretrained: bool = False, **options: Any) -> ConvertedViT:
    """A `ConvertedViT` by a name of timm, for files that describe one.

    Raises:
        ValueError: for `pretrained`, or without sizes, since the name alone has neither.
    """
    if pretrained:
        raise ValueError(f"pretrained: expected False, got True; the weights of {ARCHITECTURE} come from a file")
    if "embed_dim" not in options:
        raise ValueError(f"checkpoint: expected a file that gives the sizes of {ARCHITECTURE}, got none")
    model = ConvertedViT(**{name: value for name, value in options.items() if name not in TIMMS_OWN})
    cast(Any, model).pretrained_cfg = default_cfgs[ARCHITECTURE].default.to_dict()
    return model
