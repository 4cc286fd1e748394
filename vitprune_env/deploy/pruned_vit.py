"""The policy as a model: images in, logits out, pruned tokens really gone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelHubMixin, snapshot_download
from torch import Tensor, nn

from vitprune_env.deploy.pretrained import (
    CONFIG,
    MODEL_CARD,
    WEIGHTS,
    build_backbone,
    build_policy,
    describe_backbone,
    describe_policy,
    read_folder,
    write_folder,
)
from vitprune_env.engine.backbone import Backbone
from vitprune_env.engine.evidence import check_needs
from vitprune_env.engine.halves import AttendPacked, Compiled, Execution
from vitprune_env.engine.kernels import kernel
from vitprune_env.engine.reduction import recall
from vitprune_env.engine.tokens import TokenState
from vitprune_env.engine.walk import Arrival, Packed, Walk
from vitprune_env.errors import CheckpointError
from vitprune_env.policy import Policy
from vitprune_env.types import Decision, Site, parse_sites


class PrunedViT(nn.Module, ModelHubMixin, library_name="vitprune_env"):
    """A ViT that drops the tokens that its policy prunes.

    Decides and classifies exactly as `play(TokenGame.for_policy(backbone, policy), policy, images)` does, without the
    bookkeeping of a game: no reward, no count of MACs, no check of decisions. Dense until the first site; from then on
    rows of all images are packed, each image as long as it is. On a GPU the host waits once per site, for the numbers
    of tokens, and not at all if the policy knows them (`Decision.count`).

    Gradients flow through the tokens, so that the network can be fine-tuned as it will be deployed. With
    `torch.no_grad` or `torch.inference_mode` nothing is recorded.

    Args:
        backbone: the network to prune.
        policy: who decides; a `Module` among policies moves and saves along with the network.
        sites: where to prune; None: where the policy wants to, else the backbone's own.
        execution: how ragged images attend: `"packed"` (CPU), `"varlen"` (CUDA, half precision), `"nested"`,
            `"flex"`, `"masked"` (slow, to compare with), or `"auto"` to choose by device and dtype at every call.

    `save_pretrained(folder)`, `push_to_hub(repository)` and `from_pretrained(folder_or_repository)` keep and share the
    model: weights of network and policy as safetensors, the rest as JSON, see `pretrained`.

    Raises:
        SiteError: for sites outside the network.
        EvidenceError: if the policy needs evidence that the backbone cannot give.
        UnknownNameError: for an unknown execution.
    """

    _hub_mixin_config = {}  # this class writes its own; the mixin would guess one from the arguments

    def __init__(
        self,
        backbone: Backbone,
        policy: Policy,
        sites: Sequence[int | str | Site] | None = None,
        execution: str = "auto",
    ) -> None:
        super().__init__()
        check_needs(policy.needs, backbone)
        wanted = policy.default_sites(backbone.depth) if sites is None else sites
        self.backbone = backbone
        self.policy = policy
        self.sites = parse_sites(backbone.default_sites if wanted is None else wanted, backbone.depth)
        self.execution = execution
        self._how = Execution(AttendPacked(kernel(execution)))

    def forward(self, images: Tensor) -> Tensor:
        """Images `[B, C, H, W]` to logits `[B, classes]`."""
        return self.forward_head(self.forward_features(images))

    def forward_features(
        self, images: Tensor, on_decision: Callable[[Decision, Site], object] | None = None
    ) -> TokenState:
        """The tokens that leave the last block, before the final norm.

        Args:
            images: `[B, C, H, W]` as the model wants them (normalised).
            on_decision: told every decision, and the site where it was taken.

        Returns:
            Packed rows, and for every image which tokens are `alive` and where every patch went (`source`).

        Raises:
            ValueError: for images that do not fit the model.
        """
        self.backbone.check_images(images)
        self.policy.reset(images.shape[0], self.backbone.num_patches)
        medium = Packed(self.backbone, self.policy.attention_bias == "log_size", self._how)
        walk = Walk(medium, self.sites, self.policy.needs)

        def decide(arrival: Arrival[TokenState]) -> TokenState:
            decision = self.policy.decide(medium.observe(arrival, len(self.sites)))
            if on_decision is not None:
                on_decision(decision, arrival.site)
            return medium.reduce(arrival, decision)

        return recall(walk.through(self.backbone.embed(images), decide))

    def forward_head(self, features: TokenState) -> Tensor:
        """What `forward_features` returned to logits `[B, classes]`."""
        return self.backbone.classify(features)

    def compile_parts(self, **options: Any) -> PrunedViT:
        """Put `torch.compile` around everything but attention, in place; returns the model.

        The same few graphs serve all blocks, and dynamic shapes all numbers of tokens: nothing is compiled anew when
        other images keep other tokens. `model.compile()` would break at every attention and policy instead.

        Args:
            **options: passed to `torch.compile`.
        """
        parts = Compiled.of(self.backbone.family, **options)
        self._how = Execution(AttendPacked(kernel(self.execution)), parts)
        return self

    def _save_pretrained(self, save_directory: Path) -> None:
        """Hook of the mixin's `save_pretrained` and `push_to_hub`."""
        sites = [site.label for site in self.sites]
        config = {
            "backbone": describe_backbone(self.backbone),
            "policy": describe_policy(self.policy),
            "sites": sites,
            "execution": self.execution,
        }
        height, width = self.backbone.image_size
        card = MODEL_CARD.format(
            backbone=self.backbone.name,
            policy=type(self.policy).__name__,
            sites=f"blocks {', '.join(sites)}",
            channels=self.backbone.in_chans,
            height=height,
            width=width,
        )
        write_folder(save_directory, config, self.state_dict(), card)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **options: Any) -> PrunedViT:
        """Hook of the mixin's `from_pretrained`."""
        folder = Path(model_id)
        if not folder.is_dir():
            known = ("revision", "cache_dir", "force_download", "local_files_only", "token")
            wanted = {name: options[name] for name in known if name in options}
            folder = Path(snapshot_download(model_id, allow_patterns=[CONFIG, WEIGHTS], **wanted))
        config, tensors = read_folder(folder / CONFIG, folder / WEIGHTS)
        try:
            parts = build_backbone(config["backbone"]), build_policy(config["policy"])
            model = cls(*parts, sites=config["sites"], execution=config["execution"])
            model.load_state_dict(tensors)
        except (KeyError, TypeError, RuntimeError) as error:
            raise CheckpointError(f"{model_id}: a model whose content does not fit together ({error})") from error
        return model.eval()

    def extra_repr(self) -> str:
        """Sites, execution, and the policy where it is not a module."""
        policy = "" if isinstance(self.policy, nn.Module) else f", policy={self.policy}"
        return f"sites={[site.label for site in self.sites]}, execution={self.execution!r}{policy}"
