"""A timm ViT, unmodified, walked in halves: embed, then attention half and MLP half of each block, then classify.

Nothing of timm is patched or subclassed: the walk calls the model's own modules. Rows of all images are packed into
one `[rows, D]` tensor, image by image; only attention needs to know where an image begins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn

from vitprune_env.engine.attention import Rows
from vitprune_env.engine.execution import PLAIN, Execution, drop_factor
from vitprune_env.engine.masked import classify_soft, run_soft, start_soft
from vitprune_env.engine.parking import recall
from vitprune_env.engine.tokens import TokenState, segment_mean, start_state
from vitprune_env.errors import EvidenceError, UnsupportedBackboneError
from vitprune_env.lazy_fields import on_demand
from vitprune_env.types import EVIDENCE, Observation, Site, parse_sites


class Backbone(nn.Module):
    """A plain timm `VisionTransformer` seen as the board of the game.

    Args:
        model: a timm `VisionTransformer` of `Block`s, with class token or average pooling.
        name: what to call it in logs and checkpoints.
        default_sites: where the game takes its steps unless told otherwise; None: after every quarter of the blocks,
            as the papers do (3, 6, 9 of 12).

    Raises:
        UnsupportedBackboneError: naming the part of the model that the game cannot walk.
    """

    position: Tensor

    def __init__(
        self, model: nn.Module, name: str = "", default_sites: Sequence[int | str | Site] | None = None
    ) -> None:
        super().__init__()
        self.model = check_supported(model)
        self.name = name or type(model).__name__
        self.depth = len(self.model.blocks)
        self.embed_dim = int(self.model.embed_dim)
        self.num_heads = self.block(1).attn.num_heads
        self.num_prefix = int(self.model.num_prefix_tokens)
        self.num_classes = int(self.model.num_classes)
        patch_embed = cast(Any, self.model.patch_embed)
        self.grid_size = (int(patch_embed.grid_size[0]), int(patch_embed.grid_size[1]))
        self.image_size = (int(patch_embed.img_size[0]), int(patch_embed.img_size[1]))
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        axes = [torch.linspace(0, 1, side) for side in self.grid_size]
        grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)
        self.register_buffer("position", grid, persistent=False)  # [N, 2] row and column of each patch, 0 to 1
        self.in_chans = next(int(p.shape[1]) for p in patch_embed.parameters() if p.dim() == 4)
        self.has_class_token = self.model.cls_token is not None
        self.reads_patches = self.model.global_pool == "avg"
        quarters = [round(self.depth * part / 4) for part in (1, 2, 3)]
        self.default_sites = parse_sites(default_sites or sorted({max(1, block) for block in quarters}), self.depth)

    def block(self, number: int) -> Block:
        """Block `number`, 1-based."""
        return cast(Block, self.model.blocks[number - 1])

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
            ValueError: for a wrong number of dimensions, channels, or a wrong size.
            TypeError: for images that are not a floating-point tensor.
        """
        if not isinstance(images, Tensor) or not images.is_floating_point():
            got = images.dtype if isinstance(images, Tensor) else type(images).__name__
            raise TypeError(f"images: expected a floating-point tensor [B, C, H, W], got {got}")
        wanted = (self.in_chans, *self.image_size)
        if images.dim() != 4 or tuple(images.shape[1:]) != wanted or not images.shape[0]:
            raise ValueError(f"images: expected shape [B, {', '.join(map(str, wanted))}], got {list(images.shape)}")

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

    def embed(self, images: Tensor) -> TokenState:
        """Images `[B, C, H, W]` to the token state before the first block."""
        x = self.model.patch_embed(images)
        x = self.model._pos_embed(x)
        return start_state(self.model.norm_pre(self.model.patch_drop(x)), self.num_prefix)

    def run(
        self,
        state: TokenState,
        stop: int,
        needs: frozenset[str] = frozenset(),
        log_size: bool = False,
        execution: Execution = PLAIN,
    ) -> tuple[TokenState, dict[str, Tensor]]:
        """Run on until `stop` half-blocks have run (0-based; even: attention, odd: MLP).

        Args:
            state: the tokens, which know how many half-blocks they have been through.
            stop: one past the last half-block to run.
            needs: evidence to collect in the last attention half of the range.
            log_size: proportional attention, log(size) added to the logits of each key.
            execution: how to compute attention and the parts beside it.

        Returns:
            The tokens afterwards and the evidence of the alive tokens, `[sum n_i, ...]` each.
        """
        rows, x, evidence = Rows(state.groups, lambda: state.row_offsets), state.x, {}
        key_bias = _log_size(state) if log_size and stop > state.half else None
        last_attention = (stop - 1) // 2 * 2
        blocks = tuple(self.model.blocks)  # looking one up in a ModuleList is slow
        for half in range(state.half, stop):
            block = cast(Block, blocks[half // 2])
            if half % 2:
                x = execution.feed_forward(block, x, drop_factor(block.drop_path2, x, rows))
                continue
            wanted = needs if half == last_attention else frozenset()
            x, by_row = execution.attend(block, x, rows, wanted, key_bias)
            if wanted:
                evidence = {name: value[state.patch_rows] for name, value in by_row.items()}
        return state.with_rows(x, stop), evidence

    def observe(
        self, state: TokenState, site: Site, step: int, num_steps: int, evidence: Mapping[str, Tensor]
    ) -> Observation:
        """What a policy sees of the tokens at a site.

        Args:
            state: the tokens.
            site: where they are.
            step: which step of the game this is, from 0.
            num_steps: T.
            evidence: of the alive tokens, `[sum n_i, ...]` each.
        """
        return Observation(
            tokens=state.tokens,
            image=on_demand(getattr, state, "image"),
            token=on_demand(getattr, state, "token"),
            offsets=on_demand(getattr, state, "offsets"),
            cls=self.cls(state),
            alive=state.alive,
            size=on_demand(getattr, state, "size"),
            order=on_demand(getattr, state, "order"),
            position=self.position,
            site=site,
            step=step,
            num_steps=num_steps,
            depth=self.depth,
            evidence=evidence,
            count=state.count,
            num_prefix=self.num_prefix,
            parked=state.waiting,
        )

    def cls(self, state: TokenState) -> Tensor:
        """What stands for the image: its class token, or the mean of its alive tokens, `[B, D]`."""
        if self.has_class_token:
            return state.prefix[:, 0]
        return segment_mean(state.tokens, state.image, state.batch_size)

    def classify(self, state: TokenState) -> Tensor:
        """Logits `[B, classes]` from the tokens that leave the last block and those that wait."""
        state = recall(state) if self.reads_patches else state
        prefix = self.model.norm(state.prefix)
        if not self.reads_patches:
            return self.model.forward_head(prefix)
        mean = segment_mean(self.model.norm(state.tokens), state.image, state.batch_size)
        # The mean of one token is itself: timm's own pooling then sees what it would see on the whole sequence.
        return self.model.forward_head(torch.cat([prefix, mean[:, None]], dim=1))

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
        state = start_soft(self, images)
        for number, weights in enumerate(key_weights[: self.depth], start=1):
            state, _ = run_soft(self, state, 2 * number, weights)
        return classify_soft(self, state, key_weights[-1]), state.x


def check_needs(needs: frozenset[str], backbone: Backbone) -> None:
    """Refuse evidence that nobody knows or that this backbone cannot give.

    Raises:
        EvidenceError: naming the evidence.
    """
    for name in sorted(needs):
        if name not in EVIDENCE:
            raise EvidenceError(f"needs: unknown evidence {name!r}; known: {', '.join(EVIDENCE)}")
    if "cls_attention" in needs and not backbone.has_class_token:
        raise EvidenceError(f"needs: 'cls_attention' asks for a class token, and {backbone.name} has none")


def check_supported(model: nn.Module) -> VisionTransformer:
    """Return the model if the game can walk it.

    Raises:
        UnsupportedBackboneError: naming the part that it cannot.
    """

    def refuse(why: str) -> None:
        raise UnsupportedBackboneError(f"model: expected a plain timm VisionTransformer, got {why}")

    if not isinstance(model, VisionTransformer):
        refuse(type(model).__name__)
    model = cast(VisionTransformer, model)
    for block in model.blocks:
        if type(block) is not Block:
            refuse(f"a block of type {type(block).__name__} (only Block is walked)")
        if type(block.attn) is not Attention:
            refuse(f"attention of type {type(block.attn).__name__} (only Attention is walked)")
    if getattr(model, "attn_pool", None) is not None or model.global_pool not in ("token", "avg"):
        refuse(f"global_pool={model.global_pool!r} (only 'token' and 'avg' read ragged tokens)")
    if getattr(model, "pool_include_prefix", False):
        refuse("pooling over the prefix tokens (pool_include_prefix)")
    if getattr(model, "dynamic_img_size", False):
        refuse("dynamic_img_size=True (the number of agents must be fixed)")
    if not isinstance(getattr(model, "patch_drop", nn.Identity()), nn.Identity):
        refuse("patch_drop_rate > 0 (the number of agents must be fixed)")
    if model.num_classes <= 0:
        refuse("no classifier (num_classes=0)")
    return model


def _log_size(state: TokenState) -> Tensor:
    """Log of the patches that each row stands for, `[rows]`; 0 for prefix tokens."""
    bias = state.x.new_zeros(state.x.shape[0])
    return bias.index_copy(0, state.patch_rows, state.size[state.image, state.token].log().to(bias))
