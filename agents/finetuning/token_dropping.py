"""Make a network that bears missing tokens: a new linear head first, then the last blocks, tokens dropped at random.

A network that has always seen all tokens loses much when some are gone, whichever they are. Here every batch is pruned
at other sites and by other rates, so that no policy, site or budget is singled out; in some batches nothing is dropped,
so that the dense network stays good.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from math import ceil
from pathlib import Path

import torch

from ...data import ImageFiles, RandomViews
from ...engine.backbone import Backbone
from ...engine.kernels import AMP, Amp, autocast, multiplies_bf16
from ...errors import CheckpointError
from ...files import PathLike, make_way, prepare_folder, replace_file
from ...policy import BasePolicy, keep_top
from ...types import Decision, Observation
from ..shared.settings import as_json, check, check_numbers, differences
from .head import fit_head, linear_head
from .loop import RESULTS, STATE_FILE, FinetuneResult, finetune
from .settings import FinetuneConfig, LastBlocks

SETTINGS_FILE = "settings.json"
CHANGEABLE = frozenset({"recipe.checkpoint_every"})  # what a resumed run may change


@dataclass(frozen=True)
class TokenDropping:
    """Which tokens are missing while the network learns; every batch draws anew.

    With probability `dense` a batch keeps all tokens. Otherwise it has 1 to `most_sites` sites, any number as likely as
    any other, drawn without repetition from the ends of the blocks of the first three quarters; later, dropping hardly
    saves anything. Each site has a keep rate of its own, uniform in `keep_rates`.
    """

    dense: float = 0.25
    """Share of the batches that keep all tokens."""
    most_sites: int = 4
    """Largest number of sites of a batch."""
    keep_rates: tuple[float, float] = (0.3, 0.9)
    """Smallest and largest keep rate of a site."""

    def __post_init__(self) -> None:
        check_numbers(self)
        check(self, "dense", 0 <= self.dense <= 1, "0 to 1")
        check(self, "most_sites", self.most_sites >= 1, "at least 1")
        low, high = self.keep_rates
        check(self, "keep_rates", 0 < low <= high <= 1, "two rates above 0 and at most 1, the smaller first")


@dataclass
class RandomSites(BasePolicy):
    """Drops tokens at random; every batch has sites and keep rates of its own.

    At a site with keep rate r stay `ceil(r * n)` of the n alive tokens of an image, drawn uniformly.

    Args:
        dropping: what is drawn from.
        depth: blocks of the network.
        generator: of sites, rates and tokens.

    Attributes:
        rates: keep rate by block of the current batch; no entry: nothing is dropped there.
    """

    dropping: TokenDropping
    depth: int
    generator: torch.Generator
    rates: dict[int, float] = field(init=False, default_factory=dict)

    def default_sites(self, depth: int) -> range:
        """All sites that may be drawn: after each block of the first three quarters."""
        return range(1, max(1, 3 * depth // 4) + 1)

    def reset(self, batch_size: int, num_agents: int) -> None:
        """Draw sites and rates."""
        possible = self.default_sites(self.depth)
        kind, number = torch.rand(2, generator=self.generator).tolist()
        count = 0 if kind < self.dropping.dense else 1 + int(number * min(self.dropping.most_sites, len(possible)))
        places = torch.randperm(len(possible), generator=self.generator)[:count].tolist()
        low, high = self.dropping.keep_rates
        rates = low + (high - low) * torch.rand(count, generator=self.generator, dtype=torch.float64)
        self.rates = dict(zip([possible[place] for place in places], rates.tolist(), strict=True))

    def decide(self, obs: Observation) -> Decision:
        """Draw the tokens that stay; all of them where the batch has no site."""
        rate = self.rates.get(obs.site.block)
        if rate is None:
            return Decision(keep=obs.present, count=obs.count)
        scores = torch.rand(len(obs.image), generator=self.generator).to(obs.tokens.device)
        known = None if obs.count is None else ceil(obs.count * rate)
        return Decision(keep=keep_top(obs, scores, (obs.num_alive.double() * rate).ceil()), count=known)


@dataclass(frozen=True)
class BackboneConfig:
    """Settings of `finetune_backbone`; the defaults suit some thousand photographs and a pretrained ViT."""

    epochs: float = 14.0
    """Passes over the images while blocks learn; each pass sees other views of them."""
    steps: int | None = None
    """Gradient steps instead of passes; None: as many as `epochs` take."""
    batch_size: int = 32
    """Images per gradient step."""
    blocks: int | None = None
    """How many of the last blocks learn; None: the later two thirds."""
    layer_decay: float = 0.8
    """Factor between the learning rates of a block and the one behind it."""
    lr: float = 1e-4
    """Learning rate of the head after the warm-up, a tenth of the steps; it falls along a half cosine."""
    weight_decay: float = 0.05
    """Weight decay of matrices (AdamW)."""
    label_smoothing: float = 0.1
    """Share of the target spread over all classes."""
    view_scale: tuple[float, float] = (0.35, 1.0)
    """Smallest and largest part of a photograph's area that a view shows; see `RandomViews`."""
    head_views: int = 1
    """Views of every image that the head is fitted on before the blocks learn."""
    head_decay: float = 1e-3
    """Weight of the squared weights of the head in that fit."""
    amp: Amp = "auto"
    """Precision: "auto" is bf16 where that is faster than single precision, "bf16" always, "off" never."""
    checkpoint_every: int = 100
    """Steps between checkpoints."""
    seed: int = 0
    """Of views, their order, dropped tokens and stochastic depth."""
    dropping: TokenDropping = field(default_factory=TokenDropping)
    """Which tokens are missing."""

    def __post_init__(self) -> None:
        check_numbers(self)
        check(self, "epochs", self.epochs > 0, "above 0")
        check(self, "steps", self.steps is None or self.steps >= 1, "at least 1 or None")
        check(self, "blocks", self.blocks is None or self.blocks >= 1, "at least 1 or None")
        for name in ("batch_size", "head_views", "checkpoint_every"):
            check(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("head_decay", "weight_decay"):
            check(self, name, getattr(self, name) >= 0, "at least 0")
        check(self, "lr", self.lr > 0, "above 0")
        check(self, "layer_decay", 0 < self.layer_decay <= 1, "above 0 and at most 1")
        check(self, "label_smoothing", 0 <= self.label_smoothing <= 1, "0 to 1")
        check(self, "view_scale", 0 < self.view_scale[0] <= self.view_scale[1] <= 1, "parts of 1, the smaller first")
        check(self, "dropping", isinstance(self.dropping, TokenDropping), "a TokenDropping")
        # Half precision of 16 bits loses small gradients unless losses are scaled, which fine-tuning does not do.
        check(self, "amp", self.amp in AMP and self.amp != "fp16", "off, auto or bf16")

    def training(self, images: int, depth: int, device: str | torch.device) -> FinetuneConfig:
        """The settings of the gradient steps, on so many images, for a network of so many blocks.

        Raises:
            ValueError: for more blocks than the network has, or settings that `FinetuneConfig` refuses.
        """
        if self.blocks is not None and self.blocks > depth:
            raise ValueError(f"blocks: expected at most {depth}, the blocks of the network, got {self.blocks}")
        steps = self.steps or max(1, round(self.epochs * images / self.batch_size))
        return FinetuneConfig(
            steps=steps,
            batch_size=self.batch_size,
            trainable=LastBlocks(self.blocks or max(1, round(depth * 2 / 3)), self.layer_decay),
            lr=self.lr,
            min_lr=self.lr / 100,
            warmup_steps=steps // 10,
            weight_decay=self.weight_decay,
            label_smoothing=self.label_smoothing,
            cache_images=0,
            amp=self.amp == "bf16" or (self.amp == "auto" and multiplies_bf16(device)),
            checkpoint_every=self.checkpoint_every,
            seed=self.seed,
        )


def finetune_backbone(
    backbone: Backbone,
    images: ImageFiles,
    config: BackboneConfig | None = None,
    *,
    output: PathLike | None = None,
    device: str | torch.device = "cpu",
    progress: bool = True,
    resume: bool = False,
    overwrite: bool = False,
    after_step: Callable[[int, Backbone], Mapping[str, float]] | None = None,
) -> FinetuneResult:
    """Fit the head of a network to labelled images, then fine-tune its last blocks while tokens are missing.

    First the frozen network's features of a few views of every image are computed once, and a linear head is fitted to
    them (`fit_head`). Then the last blocks learn on fresh views with `RandomSites` (`finetune`).

    Args:
        backbone: the network, with a head of as many classes as the images have; left as it is.
        images: to train on.
        config: settings; None: the defaults.
        output: folder for checkpoints, `history.jsonl` and, in the end, `backbone.safetensors`; None: nothing is
            written. With it, SIGTERM and Ctrl-C let the current step finish and save.
        device: where to train.
        progress: whether to show progress bars.
        resume: whether to go on from the checkpoint in `output`. An interruption before the first checkpoint costs the
            head's fit, which then starts again.
        overwrite: whether to replace a run that is in `output`, which is refused otherwise.
        after_step: called with the number of steps done and the network; what it returns joins the step's row of the
            history. Zero steps: the head is fitted, the blocks are as they were; there is no row yet.

    Returns:
        The fine-tuned copy, in evaluation mode, and the history: one row per gradient step.

    Raises:
        UnsupportedBackboneError: for a head that is not one linear layer.
        ValueError: for more blocks than the network has, `resume` without `output`, or an `output` that holds a run.
        CheckpointError: for a run with other settings to resume, or a checkpoint that cannot be read.
        TrainingStopped, StorageError, NumericalError: as in `finetune`.
    """
    config = BackboneConfig() if config is None else config
    training = config.training(len(images), backbone.depth, device)
    linear_head(backbone)  # refuses other heads before time is spent
    policy = RandomSites(config.dropping, backbone.depth, torch.Generator().manual_seed(config.seed + 1))
    if resume and output is None:
        raise ValueError("resume: expected an output folder to resume from, got output=None")
    if output is not None:
        prepare_folder(Path(output))
        if not resume:
            make_way(Path(output), RESULTS, overwrite)
        _note_settings(Path(output) / SETTINGS_FILE, config, backbone, len(images), resume)
    student, seed, scale = deepcopy(backbone), config.seed, config.view_scale
    if not (resume and output is not None and (Path(output) / STATE_FILE).exists()):
        few = RandomViews(images, config.head_views, scale, seed=seed)
        amp = "bf16" if training.amp else "off"
        fit_head(student, few, config.head_decay, config.batch_size, device, progress, partial(autocast, device, amp))
        if after_step is not None:
            after_step(0, student)
    passes = -(-training.steps * config.batch_size // len(images))
    views = RandomViews(images, passes, scale, seed=seed + 1)
    return finetune(
        student, policy, views, config=training, output=output, device=device, progress=progress, resume=resume,
        after_step=after_step,
    )  # fmt: skip


def _note_settings(path: Path, config: BackboneConfig, backbone: Backbone, images: int, resume: bool) -> None:
    """Write the settings beside the checkpoint, or compare them with those of the run that is resumed.

    Raises:
        CheckpointError: for a run with other settings; it says what differs.
    """
    settings = {"recipe": as_json(config), "network": backbone.name, "classes": backbone.num_classes, "images": images}
    if resume and path.exists():
        changed = differences(settings, json.loads(path.read_text("utf-8")), CHANGEABLE)
        if changed:
            raise CheckpointError(
                f"{path}: expected a run with the same settings to resume; {', '.join(changed.values())}"
            )
    replace_file(path, (json.dumps(settings, indent=2) + "\n").encode())
