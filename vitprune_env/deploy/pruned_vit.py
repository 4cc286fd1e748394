"""The policy as a model: images in, logits out, pruned tokens really gone."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import ModelHubMixin, snapshot_download
from torch import Tensor, nn

from vitprune_env.deploy.policy_files import build, describe, read_policy_file
from vitprune_env.deploy.pretrained import CONFIG, MODEL_CARD, WEIGHTS, read_folder, write_folder
from vitprune_env.engine.backbone import Backbone, as_backbone
from vitprune_env.engine.evidence import check_needs
from vitprune_env.engine.halves import AttendPacked, Compiled, Execution
from vitprune_env.engine.kernels import kernel
from vitprune_env.engine.reduction import recall
from vitprune_env.engine.tokens import TokenState
from vitprune_env.engine.walk import Arrival, Packed, Walk
from vitprune_env.errors import CheckpointError
from vitprune_env.files import PathLike
from vitprune_env.policy import Policy, check_members
from vitprune_env.types import Decision, Site

HUB_OPTIONS = ("revision", "cache_dir", "force_download", "local_files_only", "token")


class PrunedViT(nn.Module, ModelHubMixin, library_name="vitprune_env"):
    """A ViT that drops the tokens that its policy prunes.

    Decides and classifies exactly as `play(TokenGame.for_policy(backbone, policy), policy, images)` does, without the
    bookkeeping of a game: no reward, no count of MACs, no check of decisions. Dense until the first site; from then on
    rows of all images are packed, each image as long as it is. On a GPU the host waits once per site, for the numbers
    of tokens, and not at all if the policy knows them (`Decision.count`).

    Gradients flow through the tokens, so that the network can be fine-tuned as it will be deployed. With
    `torch.no_grad` or `torch.inference_mode` nothing is recorded.

    Args:
        backbone: the network to prune, a `Backbone` or a timm model.
        policy: decides; a `Module` among policies moves and saves along with the network.
        sites: where to prune; None: where the policy is made to act, else the backbone's own; "published": where its
            paper has it (see `Backbone.sites_for`).
        execution: how ragged images attend: `"packed"` (CPU), `"varlen"` (CUDA, half precision), `"nested"`,
            `"flex"`, `"masked"` (slow, to compare with), or `"auto"` to choose by device and dtype at every call.

    `save_pretrained(folder)`, `push_to_hub(repository)` and `from_pretrained(folder_or_repository)` keep and share the
    model; `load_pruned(path)` also reads a file that `save_policy(policy, path, backbone)` wrote.

    Raises:
        TypeError: for a policy that lacks a member of the protocol.
        SiteError: for sites outside the network.
        EvidenceError: if the policy needs evidence that the backbone cannot give.
        UnknownNameError: for an unknown execution.
    """

    _hub_mixin_config = {}  # this class writes its own; the mixin would guess one from the arguments

    def __init__(
        self,
        backbone: Backbone | nn.Module,
        policy: Policy,
        sites: Sequence[int | str | Site] | Literal["published"] | None = None,
        execution: str = "auto",
    ) -> None:
        super().__init__()
        check_members(policy)
        backbone = as_backbone(backbone)
        check_needs(policy.needs, backbone)
        self.backbone = backbone
        self.policy = policy
        self.sites = backbone.sites_for(policy, sites)
        self.execution = execution
        self._how = Execution(AttendPacked(kernel(execution)))

    def forward(self, images: Tensor) -> Tensor:
        """Images `[B, C, H, W]` to logits `[B, classes]`.

        Raises:
            ValueError: for images that do not fit the model.
            NumericalError: for logits that are NaN or infinite. Not on a GPU, where the host would have to wait for
                them, and not in a compiled or exported model.
        """
        logits = self.forward_head(self.forward_features(images))
        if logits.device.type == "cpu" and not torch.compiler.is_compiling():
            self.backbone.check_logits(logits)
        return logits

    def forward_features(
        self, images: Tensor, on_decision: Callable[[Decision, Site], object] | None = None
    ) -> TokenState:
        """The tokens that leave the last block, before the final norm.

        Args:
            images: `[B, C, H, W]` as the model wants them (normalised).
            on_decision: called with every decision, and the site where it was taken.

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

    def save_pretrained(
        self, save_directory: PathLike, *, repo_id: str | None = None, push_to_hub: bool = False, **options: Any
    ) -> str | None:
        """Write the model to a folder: weights as safetensors, the rest as JSON, and a model card.

        `model.safetensors` holds the whole model and is replaced atomically, so that a folder has the old model or the
        new one whatever interrupts; `config.json` repeats what it says of policy and network. A model that cannot be
        saved leaves the folder as it was.

        Args:
            save_directory: the folder.
            repo_id: repository on the hub; None: named like the folder.
            push_to_hub: whether to upload the model as well.
            **options: passed to `push_to_hub`.

        Returns:
            Address of the commit on the hub; None without `push_to_hub`.

        Raises:
            CheckpointError: for a policy or network that could not be loaded again, see `save_policy`.
            StorageError: if a file cannot be written.
        """
        description, tensors = describe(self.policy, self.backbone)
        sites = [site.label for site in self.sites]
        height, width = self.backbone.image_size
        card = MODEL_CARD.format(
            backbone=self.backbone.name,
            policy=type(self.policy).__name__,
            sites=f"blocks {', '.join(sites)}",
            channels=self.backbone.in_chans,
            height=height,
            width=width,
        )
        folder = Path(save_directory)
        write_folder(folder, {**description, "sites": sites, "execution": self.execution}, tensors, card)
        return self.push_to_hub(repo_id or folder.name, **options) if push_to_hub else None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: PathLike, **options: Any) -> PrunedViT:
        """Read a model that `save_pretrained` or `push_to_hub` wrote.

        Args:
            pretrained_model_name_or_path: a folder, or a repository of the Hugging Face hub, `owner/name`.
            **options: for the hub: `revision`, `cache_dir`, `force_download`, `local_files_only`, `token`.

        Raises:
            CheckpointError: for a path without a folder, which is not looked for on the hub, or files that are missing,
                damaged or something else.
            TypeError: for other options.
        """
        if unknown := options.keys() - HUB_OPTIONS:
            raise TypeError(f"options: expected some of {', '.join(HUB_OPTIONS)}, got {', '.join(sorted(unknown))}")
        name = os.fspath(pretrained_model_name_or_path)
        folder = Path(name)
        if not folder.is_dir():
            if isinstance(pretrained_model_name_or_path, Path) or not _is_repository(name):
                raise CheckpointError(f"{name}: expected a folder or a repository (owner/name), found no such folder")
            folder = Path(snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS], **options))
        return _assemble(*read_folder(folder), name)

    def extra_repr(self) -> str:
        """Sites, execution, and the policy where it is not a module."""
        policy = "" if isinstance(self.policy, nn.Module) else f", policy={self.policy}"
        return f"sites={[site.label for site in self.sites]}, execution={self.execution!r}{policy}"


def load_pruned(path: PathLike, device: str | torch.device = "cpu") -> PrunedViT:
    """Read a policy together with its network, as a model in evaluation mode.

    Args:
        path: a file that `save_policy(policy, path, backbone=...)` wrote, or a folder of `save_pretrained`.
        device: where to put it.

    Raises:
        CheckpointError: if it is missing, damaged or something else, holds no network, or its policy or network is
            not registered.
    """
    read = read_folder if Path(path).is_dir() else read_policy_file
    return _assemble(*read(Path(path)), path).to(device)


def _is_repository(name: str) -> bool:
    """Whether a name is one of the hub's, rather than a path with a typing error."""
    owner, _, rest = name.partition("/")
    is_path = owner.startswith((".", "~")) or "/" in rest or "\\" in name or Path(owner).exists()
    return bool(owner and rest) and not is_path


def _assemble(description: Mapping[str, Any], tensors: Mapping[str, Tensor], origin: PathLike) -> PrunedViT:
    """A model from what `read_folder` or `read_policy_file` returned."""
    policy, backbone = build(description, tensors, origin)
    if backbone is None:
        raise CheckpointError(f"{origin}: expected a policy with its network, got a policy alone; see load_policy")
    try:
        sites = description.get("sites", "published")  # files without sites are older: policies acted there
        return PrunedViT(backbone, policy, sites, description.get("execution", "auto")).eval()
    except TypeError as error:
        raise CheckpointError(f"{origin}: expected sites and execution of a model, got others ({error})") from error
