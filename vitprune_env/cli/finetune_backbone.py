r"""Make a network that bears missing tokens, from pretrained weights and photographs in class folders.

    vitprune finetune-backbone --model vit_small_patch14_dinov2.lvd142m --pretrained --img-size 140 \
        --data-dir photographs --output runs/backbone

First a new linear head is fitted to the frozen network's features. Then the last blocks learn while tokens are dropped
at random, in every batch at other sites and rates. The folders under `train` are learnt from. Those under `val` say how
good the network is, in between and in the end: with all tokens, and with tokens dropped at random after each quarter of
the blocks. The output folder holds backbone.safetensors, which knows its classes and its image size, table.md, history,
settings and checkpoints. Then:

    vitprune benchmark --model vit_small_patch14_dinov2.lvd142m --weights runs/backbone/backbone.safetensors \
        --data-dir photographs
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from tqdm import tqdm

from vitprune_env.agents import BackboneConfig, TokenDropping, finetune_backbone
from vitprune_env.agents.finetuning.loop import STATE_FILE, WEIGHTS_FILE
from vitprune_env.baselines import RandomDrop, calibrate
from vitprune_env.benchmarking.images import Batches
from vitprune_env.benchmarking.measurement import measure
from vitprune_env.benchmarking.trained import FEW, comparison_table
from vitprune_env.cli.flags import ImageFlags, ResumableFlags, own_network, read_flags
from vitprune_env.data import ImageFiles, batches_of, names_of, open_source
from vitprune_env.engine.backbone import Backbone
from vitprune_env.engine.kernels import Amp
from vitprune_env.errors import BudgetError, SettingsError
from vitprune_env.files import replace_file
from vitprune_env.game.token_game import TokenGame
from vitprune_env.models.load import folder_of, load_backbone
from vitprune_env.policy import KeepAll

SHARES = (0.7, 0.5, 0.35)  # of the dense MACs, in the table
WATCHED = 0.5  # and during training
BATCH = 100  # photographs that are classified at once


@dataclass(frozen=True)
class RecipeFlags:
    """How the network learns."""

    epochs: float = BackboneConfig.epochs
    """Passes over the photographs while blocks learn; each pass sees other views of them."""
    steps: int | None = BackboneConfig.steps
    """Gradient steps instead of passes; None: as many as the passes take."""
    batch_size: int = BackboneConfig.batch_size
    """Photographs per gradient step."""
    blocks: int | None = BackboneConfig.blocks
    """How many of the last blocks learn; None: the later two thirds."""
    lr: float = BackboneConfig.lr
    """Learning rate of the head after the warm-up."""
    layer_decay: float = BackboneConfig.layer_decay
    """Factor between the learning rates of a block and the one behind it."""
    weight_decay: float = BackboneConfig.weight_decay
    """Weight decay of matrices."""
    label_smoothing: float = BackboneConfig.label_smoothing
    """Share of the target spread over all classes."""
    view_scale: tuple[float, float] = BackboneConfig.view_scale
    """Smallest and largest part of a photograph's area that a view shows."""
    head_views: int = BackboneConfig.head_views
    """Views of every photograph that the head is fitted on, before the blocks learn."""
    amp: Amp = BackboneConfig.amp
    """Precision: auto is bf16 where that is faster, bf16 always, off never."""
    checkpoint_every: int = BackboneConfig.checkpoint_every
    """Steps between checkpoints."""


@dataclass(frozen=True)
class DroppingFlags:
    """Which tokens are missing while the network learns."""

    dense: float = TokenDropping.dense
    """Share of the batches that keep all tokens."""
    most_sites: int = TokenDropping.most_sites
    """Largest number of sites of a batch."""
    keep_rates: tuple[float, float] = TokenDropping.keep_rates
    """Smallest and largest keep rate of a site."""


@dataclass(frozen=True)
class Args:
    """From which weights and photographs, and how."""

    drop_path: float = 0.1
    """Largest rate of stochastic depth, that of the last block; rates rise linearly."""
    validate_every: int = 200
    """Steps between validations."""
    validate_images: int = 300
    """Photographs of a validation, evenly from all classes; the table in the end is measured on all."""
    common: ResumableFlags = field(default_factory=lambda: ResumableFlags(output=Path("runs/backbone")))
    recipe: RecipeFlags = field(default_factory=RecipeFlags)
    dropping: DroppingFlags = field(default_factory=DroppingFlags)
    source: ImageFlags = field(default_factory=ImageFlags)

    @property
    def config(self) -> BackboneConfig:
        """The settings of the training proper."""
        dropping = TokenDropping(**vars(self.dropping))
        return BackboneConfig(seed=self.common.seed, dropping=dropping, **vars(self.recipe))


def parse(argv: Sequence[str] | None, prog: str | None = None) -> Args:
    """Read the command line."""
    args = read_flags(Args, argv, __doc__, prog)
    if not args.common.quick:
        return args
    recipe = replace(args.recipe, steps=4, batch_size=8, head_views=1)
    return replace(args, recipe=recipe, validate_every=2, validate_images=20)


def new_network(args: Args) -> Backbone:
    """The pretrained network with a head for the classes of the photographs.

    Raises:
        SettingsError: for flags without which there is nothing to learn from.
    """
    source = args.source
    if not source.reads_files:
        raise SettingsError("data_dir: expected a folder of photographs to learn from, got none")
    if source.model is None:
        raise SettingsError("model: expected a ViT of timm, such as vit_small_patch14_dinov2.lvd142m, got none")
    own = own_network(source.model)
    if not source.pretrained and source.weights is None and own is None and folder_of(source.model) is None:
        raise SettingsError("weights: expected pretrained ones (--pretrained, or --weights FILE), got none")
    names = names_of(open_source(source.data_dir, "train", source.dataset, source.class_map, source.download))
    classes = source.num_classes if names is None else len(names)
    if classes is None:
        raise SettingsError("num_classes: expected their number for a dataset that does not name them, got none")
    sizes: dict[str, Any] = {} if source.img_size is None else {"img_size": source.img_size}
    torch.manual_seed(args.common.seed)  # of the head's random weights, which the fit replaces
    if own is not None:  # its function makes the head
        return load_backbone(own, checkpoint=source.weights, class_names=names, new_head=True)
    return load_backbone(
        source.model,
        source.pretrained and source.weights is None,
        source.weights,
        class_names=names,
        new_head=True,
        num_classes=classes,
        drop_path_rate=args.drop_path,
        **sizes,
    )


class Validation:
    """Accuracy with all tokens, and with tokens dropped at random at half of the MACs, on photographs not learnt from.

    Args:
        backbone: a network of the shape that is trained.
        images: the photographs, which are kept in memory.
        every: steps between two validations.
        last: the last step, after which there is one in any case.
        args: the command line.
    """

    def __init__(self, backbone: Backbone, images: ImageFiles, every: int, last: int, args: Args) -> None:
        self.every, self.last = every, last
        self.batches = batches_of(images, BATCH, args.common.device)
        self.random = random_drop(backbone, WATCHED, self.batches, args.common.seed)

    def __call__(self, step: int, backbone: Backbone) -> Mapping[str, float]:
        """The accuracies, if they are due after this step."""
        if step % self.every and step != self.last:
            return {}
        random = replace(self.random)  # draws from its seed again
        sites = backbone.default_sites
        dense, dropped = (
            measure("", backbone, each, self.batches, sites=sites).accuracy for each in (KeepAll(), random)
        )
        tqdm.write(f"step {step}: dense {100 * dense:.1f} %, random at {WATCHED:.0%} of the MACs {100 * dropped:.1f} %")
        return {"validation/dense": dense, "validation/random": dropped}


def random_drop(backbone: Backbone, share: float, batches: Batches, seed: int) -> RandomDrop:
    """Dropping at random at a share of the dense MACs, by equal rates at the network's own sites."""
    images, labels = next(iter(batches))
    gmacs = share * TokenGame(backbone).cost.dense() / 1e9
    few = [(images[:FEW], labels[:FEW])]
    return calibrate(lambda rate: RandomDrop(rate, seed), gmacs, backbone, few, sites=backbone.default_sites)


def report(backbone: Backbone, images: Batches, args: Args) -> str:
    """Dense, and tokens dropped at random, on all photographs that were not learnt from."""
    sites, notes = backbone.default_sites, ""
    rows = [measure("dense", backbone, KeepAll(), images, sites=sites)]
    for share in SHARES:
        try:
            policy = random_drop(backbone, share, images, args.common.seed)
        except BudgetError as error:  # the blocks before the first site and the other tokens cost more than that
            notes += f"\n\nNot at {share:.0%} of the MACs: {error}."
            continue
        rows.append(measure(f"random at {share:.0%} of the MACs", backbone, policy, images, sites=sites))
    return comparison_table(rows) + notes


def some_of(files: ImageFiles, count: int, seed: int) -> ImageFiles:
    """That many of the photographs, evenly from all classes, or all where there are no more."""
    return files.split(count, seed)[0] if count < len(files) else files


def main(argv: Sequence[str] | None = None) -> None:
    """Fit the head, let the blocks learn, report."""
    args = parse(argv, prog="vitprune finetune-backbone")
    common, source, config = args.common, args.source, args.config
    common.prepare(False, ("table.md", WEIGHTS_FILE, STATE_FILE))
    backbone = new_network(args)
    parts = (source.held_out_split(None), None, common.seed), ("train", None, common.seed)
    held_out, train = (cast(ImageFiles, part) for part in source.open_apart(backbone, *parts))
    few = some_of(held_out, args.validate_images, common.seed)
    steps = config.training(len(train), backbone.depth, common.device).steps
    result = finetune_backbone(
        backbone,
        train,
        config,
        output=common.output,
        device=common.device,
        resume=common.resume,
        after_step=Validation(backbone.to(common.device), few, args.validate_every, steps, args),
    )
    images = (some_of(held_out, 100, common.seed) if common.quick else held_out).batches(BATCH, common.device)
    text = report(result.backbone, images, args)
    replace_file(common.output / "table.md", (text + "\n").encode())
    print(f"\n{text}\n\n{WEIGHTS_FILE}, settings.json, table.md and history.jsonl are in {common.output}/")
