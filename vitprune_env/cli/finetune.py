"""Fine-tune a network for a policy that prunes it, and say what that gains: dense, pruned, pruned after fine-tuning.

    vitprune finetune                                   # EViT at 25 % of the dense MACs
    vitprune finetune --policy tome --target-share 0.35
    vitprune finetune --checkpoint runs/mappo           # a policy of a training run

The keep rate falls from 1 to its target over the first third, where the policy has one (`--no-schedule`: at once). The
policy stays as it is; blocks before the first site do, too. The output folder holds the fine-tuned weights
(backbone.safetensors, for `load_backbone(name, checkpoint=...)`), checkpoints, history and table.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from vitprune_env.agents import CosineKeepRate, FinetuneConfig, finetune
from vitprune_env.baselines import calibrate, describe
from vitprune_env.benchmarking.measurement import Row, Sites, measure
from vitprune_env.benchmarking.trained import comparison_table
from vitprune_env.cli.flags import TEST_SEED, TUNE_SEED, CommonFlags, ImageFlags, lowered, read_flags
from vitprune_env.deploy.policy_files import load_policy
from vitprune_env.engine.backbone import Backbone
from vitprune_env.files import replace_file
from vitprune_env.game.token_game import TokenGame
from vitprune_env.policy import KeepAll, Policy

TUNE_IMAGES = 64


@dataclass(frozen=True)
class OptimiserFlags:
    """How the network learns."""

    steps: int = FinetuneConfig.steps
    """Gradient steps."""
    batch_size: int = FinetuneConfig.batch_size
    """Images per gradient step."""
    trainable: Literal["after_first_site", "all"] = FinetuneConfig.trainable
    """Which blocks learn. What comes before the first site is the same with and without pruning; left as it is, its
    tokens can be computed once and kept."""
    opt: str = FinetuneConfig.opt
    """Optimiser, by timm's name."""
    lr: float = FinetuneConfig.lr
    """Learning rate after the warm-up."""
    min_lr: float = FinetuneConfig.min_lr
    """Learning rate at the end."""
    sched: str = FinetuneConfig.sched
    """Learning-rate schedule, by timm's name."""
    warmup_steps: int = FinetuneConfig.warmup_steps
    """Steps over which the learning rate rises."""
    weight_decay: float = FinetuneConfig.weight_decay
    """Weight decay of matrices."""
    max_grad_norm: float | None = FinetuneConfig.max_grad_norm
    """Largest norm of the gradient; None: no clipping."""
    label_smoothing: float = FinetuneConfig.label_smoothing
    """Share of the target spread over all classes."""
    distill: float = FinetuneConfig.distill
    """Weight of the dense model's soft labels against the true class, 0 to 1."""
    temperature: float = FinetuneConfig.temperature
    """Softens both sides of the distillation."""
    cache_images: int = FinetuneConfig.cache_images
    """Training images whose tokens up to the first site are kept; 0: none. Not used when all blocks learn."""
    amp: bool = FinetuneConfig.amp
    """Whether the network runs in bfloat16 where that is safe (autocast); weights and losses stay in full precision."""
    checkpoint_every: int = FinetuneConfig.checkpoint_every
    """Steps between checkpoints."""


@dataclass(frozen=True)
class Args:
    """What to fine-tune for, and how."""

    policy: str = "evit"
    """A baseline, by its registry name."""
    checkpoint: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Output folder of a training run whose policy to use instead."""
    target_share: float = 0.25
    """Budget of the baseline, as a share of the dense MACs."""
    schedule: bool = True
    """Whether the keep rate falls from 1 to its target, for policies that have one."""
    split: str = "validation"
    """Held-out images to report on."""
    images: int = 2000
    """How many of them."""
    train_images: int = 4096
    """Images to train on."""
    common: CommonFlags = field(default_factory=lambda: CommonFlags(output=Path("runs/finetune")))
    optimiser: OptimiserFlags = field(default_factory=OptimiserFlags)
    source: ImageFlags = field(default_factory=ImageFlags)

    @property
    def config(self) -> FinetuneConfig:
        """The settings of the training proper."""
        return FinetuneConfig(seed=self.common.seed, **vars(self.optimiser))


def parse(argv: Sequence[str] | None, prog: str | None = None) -> Args:
    """Read the command line."""
    args = read_flags(Args, argv, __doc__, prog)
    if not args.common.quick:
        return args
    optimiser = lowered(args.optimiser, steps=5, batch_size=16, cache_images=32)
    return lowered(replace(args, optimiser=optimiser), train_images=64, images=100)


def pruner(args: Args, backbone: Backbone) -> tuple[Policy, Sites | None]:
    """The policy and its sites; baselines that act at a few sites act at the network's own."""
    if args.checkpoint is not None:
        policy = load_policy(args.checkpoint / "policy.safetensors", args.common.device)
        return policy, policy.default_sites(backbone.depth)
    method = describe(args.policy)  # the error for an unknown name gives the nearest ones
    sites = backbone.default_sites if method.knob.name == "keep_rate" else None
    gmacs = args.target_share * TokenGame(backbone).cost.dense() / 1e9
    tune = args.source.open(backbone, "train", TUNE_IMAGES, TUNE_SEED)
    return calibrate(args.policy, gmacs, backbone, tune, sites=sites), sites


def compare(args: Args, networks: dict[str, Backbone], policy: Policy, sites: Sites | None) -> list[Row]:
    """Each network without pruning and pruned, on held-out images."""
    rows, source = [], args.source
    for name, network in networks.items():
        test = source.batches(network, args.split, args.images, TEST_SEED, 250, args.common.device)
        rows.append(measure(f"dense{name}", network, KeepAll(), test))
        rows.append(measure(f"{args.checkpoint or args.policy}{name}", network, policy, test, sites=sites))
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Calibrate, fine-tune, compare."""
    args = parse(argv, prog="vitprune finetune")
    common, source = args.common, args.source
    common.prepare(built_in=not source.reads_files)
    backbone = source.network(common.seed, common.device)
    policy, sites = pruner(args, backbone)
    keep_rate = getattr(policy, "keep_rate", None)
    result = finetune(
        backbone,
        policy,
        source.open(backbone, "train", args.train_images, common.seed),
        CosineKeepRate(keep_rate) if args.schedule and keep_rate is not None else None,
        args.config,
        sites=sites,
        output=common.output,
        device=common.device,
        resume=common.resume,
    )
    text = comparison_table(compare(args, {"": backbone, ", fine-tuned": result.backbone}, policy, sites))
    replace_file(common.output / "table.md", (text + "\n").encode())
    print(f"\n{text}\n\ntable.md, history and backbone.safetensors are in {common.output}/")
