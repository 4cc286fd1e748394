"""A timm ViT, unmodified: its sizes, images in, logits out.

Nothing of timm is patched or subclassed: the model's own modules are called. What differs between families of models
is in `families`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from vitprune_env.engine.families import family_of
from vitprune_env.engine.reduction import recall
from vitprune_env.engine.tokens import TokenState, segment_mean, start_state
from vitprune_env.errors import NumericalError, UnsupportedBackboneError
from vitprune_env.policy import Policy, published_sites
from vitprune_env.types import Site, parse_sites, quarter_sites


class Network(nn.Module):
    """A timm ViT, with what the game needs to know of it.

    Args:
        model: a timm `VisionTransformer` or `Eva` of plain blocks, with class token or average pooling.
        name: what to call it in logs and checkpoints.
        default_sites: where the game takes its steps unless other sites are given; None: after every quarter of the
            blocks, as the papers do (3, 6, 9 of 12).
        class_names: names of the head's classes in its order; None: unknown. Images that name their classes are
            numbered by them.

    Raises:
        UnsupportedBackboneError: naming the part of the model that cannot be walked.
        ValueError: for class names that are not different strings, one for each class of the head.
    """

    position: Tensor

    def __init__(
        self,
        model: nn.Module,
        name: str = "",
        default_sites: Sequence[int | str | Site] | None = None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self.family = family_of(model)
        self.model: Any = model
        self.name = name or type(model).__name__
        self.depth = len(self.model.blocks)
        if not self.depth:
            raise UnsupportedBackboneError("depth: expected a network of 1 block or more, got 0")
        self.embed_dim = int(self.model.embed_dim)
        self.num_heads = int(self.block(1).attn.num_heads)
        self.num_prefix = int(self.model.num_prefix_tokens)
        self.num_classes = int(self.model.num_classes)
        patch_embed = self.model.patch_embed
        self.grid_size = (int(patch_embed.grid_size[0]), int(patch_embed.grid_size[1]))
        self.image_size = (int(patch_embed.img_size[0]), int(patch_embed.img_size[1]))
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        if not self.num_patches:
            raise UnsupportedBackboneError(
                f"img_size: expected images of a patch or more, got {self.image_size} pixels"
            )
        axes = [torch.linspace(0, 1, side) for side in self.grid_size]
        grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)
        self.register_buffer("position", grid, persistent=False)  # [N, 2] row and column of each patch, 0 to 1
        self.in_chans = next(int(p.shape[1]) for p in patch_embed.parameters() if p.dim() == 4)
        self.has_class_token = self.model.cls_token is not None
        self.reads_patches = self.model.global_pool != "token"
        self.default_sites = parse_sites(
            quarter_sites(self.depth) if default_sites is None else default_sites, self.depth
        )
        self.class_names = class_names

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the head's classes in its order; None: unknown."""
        return self._class_names

    @class_names.setter
    def class_names(self, names: Sequence[str] | None) -> None:
        names = names if names is None or isinstance(names, str) else tuple(names)
        wanted = f"class_names: expected {self.num_classes} different strings, one for each class of {self.name}"
        if isinstance(names, str) or not all(isinstance(name, str) for name in names or ()):
            raise ValueError(f"{wanted}, got {names!r}")
        if names is not None and (len(names) != self.num_classes or len(set(names)) != len(names)):
            raise ValueError(f"{wanted}, got {len(names)}, {len(set(names))} of them different")
        self._class_names = names

    def sites_for(
        self, policy: Policy, sites: Sequence[int | str | Site] | Literal["published"] | None = None
    ) -> tuple[Site, ...]:
        """Where a policy acts in this network: the one answer for games, deployed models and calibration.

        Args:
            policy: the policy.
            sites: the sites that are asked for; "published": those of the policy's paper, at the same share of the
                depth; None: where the policy itself is made to act, else the network's own (`default_sites`).

        Raises:
            SiteError: for sites outside the network.
        """
        if sites is None or sites == "published":
            where = policy.default_sites if sites is None else lambda depth: published_sites(policy, depth)
            sites = where(self.depth)
        return parse_sites(self.default_sites if sites is None else sites, self.depth)

    def block(self, number: int) -> Any:
        """Block `number`, 1-based."""
        return cast(Any, self.model.blocks)[number - 1]

    @property
    def needs_patches(self) -> bool:
        """Whether an image must keep at least one patch token."""
        return self.reads_patches or self.num_prefix == 0

    def forward(self, images: Tensor) -> Tensor:
        """The dense model's own forward: images `[B, C, H, W]` to logits `[B, classes]`."""
        return self.model(images)

    def check_images(self, images: Tensor) -> None:
        """Refuse images that do not fit the model.

        Raises:
            ValueError: for a wrong number of dimensions, channels, a wrong size, no images, or another device.
            TypeError: for images that are not a floating-point tensor, or of another precision than the network.
        """
        if not isinstance(images, Tensor) or not images.is_floating_point():
            got = images.dtype if isinstance(images, Tensor) else type(images).__name__
            raise TypeError(f"images: expected a floating-point tensor [B, C, H, W], got {got}")
        wanted = (self.in_chans, *self.image_size)
        taken, place = next((p.dtype, p.device) for p in self.model.patch_embed.parameters() if p.dim() == 4)
        if images.device != place and place.type != "meta":  # there only MACs are counted
            raise ValueError(f"images: expected them on {place}, where the network is, got {images.device}")
        if images.dtype != taken and not torch.is_autocast_enabled(images.device.type):
            raise TypeError(f"images: expected {taken}, as the network has (or autocast), got {images.dtype}")
        if images.dim() != 4 or tuple(images.shape[1:]) != wanted:
            raise ValueError(f"images: expected shape [B, {', '.join(map(str, wanted))}], got {list(images.shape)}")
        if not images.shape[0]:
            raise ValueError(f"images: expected at least one, got a batch of shape {list(images.shape)}")

    def check_labels(self, labels: Tensor, batch_size: int) -> None:
        """Refuse labels that do not fit the images or the classes.

        Raises:
            TypeError: for something that is not a tensor.
            ValueError: for a wrong shape or dtype, or labels outside the classes.
        """
        if not isinstance(labels, Tensor):
            raise TypeError(f"labels: expected an int64 tensor of shape [{batch_size}], got {type(labels).__name__}")
        if labels.shape != (batch_size,) or labels.dtype != torch.int64:
            raise ValueError(
                f"labels: expected int64 of shape [{batch_size}], got {labels.dtype} of {list(labels.shape)}"
            )
        last = self.num_classes - 1
        if labels.min() < 0 or labels.max() > last:
            raise ValueError(f"labels: expected 0 to {last}, got {int(labels.min())} to {int(labels.max())}")

    def check_logits(self, logits: Tensor) -> None:
        """Refuse logits that are no answer, as weights or images that hold NaN give them.

        Raises:
            NumericalError: for NaN or infinity.
        """
        if not torch.isfinite(logits).all():
            bad = int((~torch.isfinite(logits)).any(dim=1).sum())
            raise NumericalError(
                f"logits: expected finite numbers, got NaN or infinity in {bad} of {len(logits)} images"
            )

    def embed(self, images: Tensor) -> TokenState:
        """Images `[B, C, H, W]` to the token state before the first block."""
        return start_state(self.family.embed(self.model, images), self.num_prefix, images=images)

    def cls(self, state: TokenState) -> Tensor:
        """What stands for the image: its class token, or the mean of its alive tokens, `[B, D]`."""
        if self.has_class_token:
            return state.prefix[:, 0]
        return segment_mean(state.tokens, state.image, state.batch_size)

    def classify(self, state: TokenState) -> Tensor:
        """Logits `[B, classes]` from the tokens that leave the last block and those that wait."""
        state = recall(state) if self.reads_patches else state
        if self.model.global_pool == "map":  # attention pooling, of equally long images together
            parts = self.model.norm(state.x).split([images * rows for images, rows in state.groups])
            read = [
                self.model.forward_head(part.view(*group, -1)) for group, part in zip(state.groups, parts, strict=True)
            ]
            return state.in_order(torch.cat(read))
        prefix = self.model.norm(state.prefix)
        if not self.reads_patches:
            return self.model.forward_head(prefix)
        mean = segment_mean(self.model.norm(state.tokens), state.image, state.batch_size)
        # The mean of one token is itself: timm's own pooling then sees what it would see on the whole sequence.
        return self.model.forward_head(torch.cat([prefix, mean[:, None]], dim=1))
