"""Fine-tune a network for a policy that prunes it, and say what that gains: dense, pruned, pruned after fine-tuning.

    vitprune finetune                                   # EViT at 25 % of the dense MACs
    vitprune finetune --policy tome --target-share 0.35         # or --target-gmacs 0.012, or --target-keep 0.6
    vitprune finetune --checkpoint runs/mappo           # a policy of a training run, or a policy file
    vitprune finetune --policy life_regression --scheme two_stages --sharpness 1.5  # Chen et al., Algorithm 1

What has to be trained of a policy is trained first. Then the network learns on the tokens that the policy leaves. The
keep rate falls from 1 to its target over the first third, where the policy has one (`--no-schedule`: at once). The
policy stays as it is; blocks before the first site do, too. The output folder holds the fine-tuned weights
(backbone.safetensors, for `load_backbone(name, checkpoint=...)`), the policy if it was trained (policy.safetensors),
checkpoints, history and table.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from vitprune_env.agents import CosineKeepRate, FinetuneConfig, finetune
from vitprune_env.agents.finetuning.loop import STATE_FILE, WEIGHTS_FILE
from vitprune_env.baselines import LifeConfig, Method, calibrate, describe, fit, train_life_regression
from vitprune_env.benchmarking.images import Batches, as_batches
from vitprune_env.benchmarking.measurement import Row, Sites, measure
from vitprune_env.benchmarking.trained import comparison_table
from vitprune_env.cli.flags import TEST_SEED, TUNE_SEED, ImageFlags, ResumableFlags, TargetFlags, lowered, read_flags
from vitprune_env.data import Digits, ImageFiles
from vitprune_env.deploy.policy_files import load_policy, save_policy
from vitprune_env.engine.backbone import Backbone
from vitprune_env.errors import SettingsError
from vitprune_env.files import replace_file
from vitprune_env.models.load import save_backbone
from vitprune_env.policy import KeepAll, Policy

TUNE_IMAGES = 64
POLICY_FILE = "policy.safetensors"
BUDGET = TargetFlags(target_share=0.25)
LIFE = LifeConfig()


@dataclass(frozen=True)
class OptimiserFlags:
    """How the network learns."""

    steps: int = FinetuneConfig.steps
    """Gradient steps."""
    batch_size: int = FinetuneConfig.batch_size
    """Images per gradient step."""
    trainable: Literal["after_first_site", "all"] = "after_first_site"
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


SHARED = ("steps", "batch_size", "opt", "lr", "weight_decay", "max_grad_norm", "checkpoint_every")
"""Flags of the optimiser that `--scheme` listens to, too."""


@dataclass(frozen=True)
class LifeFlags:
    """For `--policy life_regression`: the training of Chen et al. and its ablations."""

    scheme: Literal["two_stages", "single_stage"] | None = None
    """Train the network in the paper's form, in which lives are soft weights and all blocks learn: after the predictor
    (Algorithm 1), or together with it, for as many steps (Table IV). None: on the tokens that are left, as for any
    other policy."""
    sharpness: float = LIFE.sharpness
    """U, how steeply these weights fall; 1.5 in the paper, 0.5 to 3 in Table V."""
    predictor_steps: int = LIFE.fit.steps or 0
    """Gradient steps of the predictor."""
    predictor_lr: float = LIFE.fit.lr
    """Learning rate of the predictor."""


@dataclass(frozen=True)
class Args:
    """What to fine-tune for, and how."""

    policy: str = "evit"
    """A baseline, by its registry name."""
    checkpoint: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Output folder of a training run, or a policy file, whose policy to use instead."""
    sites: tuple[str, ...] = ()
    """Where the baseline prunes, such as 4 7 10; none: at the network's own sites, or inside every block if it acts
    there."""
    schedule: bool = True
    """Whether the keep rate falls from 1 to its target, for policies that have one."""
    split: str = "validation"
    """Held-out images to report on."""
    images: int = 2000
    """How many of them."""
    train_images: int = 4096
    """Images to train on."""
    common: ResumableFlags = field(default_factory=lambda: ResumableFlags(output=Path("runs/finetune")))
    budget: TargetFlags = BUDGET
    optimiser: OptimiserFlags = field(default_factory=OptimiserFlags)
    life: LifeFlags = field(default_factory=LifeFlags)
    source: ImageFlags = field(default_factory=ImageFlags)

    @property
    def run_name(self) -> str:
        """For which policy."""
        policy = self.policy if self.checkpoint is None else self.checkpoint.stem
        return "finetune" if policy == "evit" else f"finetune-{policy}"

    @property
    def config(self) -> FinetuneConfig:
        """The settings of the training proper."""
        return FinetuneConfig(seed=self.common.seed, **vars(self.optimiser))


def parse(argv: Sequence[str] | None, prog: str | None = None) -> Args:
    """Read the command line.

    Raises:
        SettingsError: for flags that do not go together.
    """
    args = read_flags(Args, argv, __doc__, prog)
    check_checkpoint(args)
    args = replace(args, budget=args.budget.one(BUDGET))
    check_life(args)
    _ = args.config  # refuses its values before time is spent
    if not args.common.quick:
        return args
    optimiser = lowered(args.optimiser, steps=5, batch_size=16, cache_images=32)
    return lowered(replace(args, optimiser=optimiser), train_images=64, images=100)


def check_checkpoint(args: Args) -> None:
    """Refuse flags of a baseline beside a policy that has its budget and its sites.

    Raises:
        SettingsError: naming the flag.
    """
    if args.checkpoint is None:
        return
    usual = {"sites": (), **vars(BUDGET)}
    for name, given in {"sites": args.sites, **vars(args.budget)}.items():
        if given != usual[name]:
            raise SettingsError(f"{name}: expected none beside --checkpoint, whose policy stays as it is, got {given}")


def check_life(args: Args) -> None:
    """Refuse flags that would not be heard.

    Raises:
        SettingsError: naming the flag.
    """
    own = args.checkpoint is None and isinstance(describe(args.policy).fit_config(), LifeConfig)
    if args.life != LifeFlags() and not own:
        raise SettingsError(
            "policy: expected life_regression with --scheme, --sharpness, --predictor-steps or --predictor-lr, got "
            f"{args.checkpoint or args.policy}"
        )
    for flag in fields(OptimiserFlags) if args.life.scheme else ():
        given = getattr(args.optimiser, flag.name)
        if flag.name not in SHARED and given != flag.default:
            raise SettingsError(f"{flag.name}: expected {flag.default!r} with --scheme, got {given!r}")


def fit_config(args: Args, method: Method) -> Any:
    """Settings of the training of a policy that has something to train."""
    assert method.recipe is not None
    config: Any = method.recipe.config
    if isinstance(config, LifeConfig):
        flags, life = args.optimiser, args.life
        config = replace(
            config,
            sharpness=life.sharpness,
            fit=replace(config.fit, steps=life.predictor_steps, lr=life.predictor_lr),
            finetune=replace(
                config.finetune,
                steps=flags.steps,
                batch_size=flags.batch_size,
                optimizer=flags.opt,
                lr=flags.lr,
                weight_decay=flags.weight_decay,
                clip_norm=flags.max_grad_norm,
                checkpoint_every=flags.checkpoint_every,
            ),
        )
    return config.quick() if args.common.quick else config


@dataclass(frozen=True)
class Task:
    """Images to calibrate on, to report on and to train on, none of them for two."""

    tune: Digits | ImageFiles
    test: Batches
    train: Digits | ImageFiles


def open_task(args: Args, backbone: Backbone) -> Task:
    """The images of the flags."""
    tune, test, train = args.source.open_apart(
        backbone,
        ("train", TUNE_IMAGES, TUNE_SEED),
        (args.split, args.images, TEST_SEED),
        ("train", args.train_images, args.common.seed),
    )
    return Task(tune, as_batches(test, 250, torch.device(args.common.device)), train)


def pruner(args: Args, backbone: Backbone, task: Task) -> tuple[Policy, Sites | None]:
    """The policy and its sites; baselines that act at a few sites act at the network's own."""
    if args.checkpoint is not None:
        path = args.checkpoint / POLICY_FILE if args.checkpoint.is_dir() else args.checkpoint
        policy = load_policy(path, args.common.device)
        return policy, policy.default_sites(backbone.depth)
    method, sites = describe(args.policy), args.sites or None
    if method.recipe is not None:
        options = {"seed": args.common.seed, "output": args.common.output / "fit", "resume": args.common.resume}
        config, gmacs = fit_config(args, method), args.budget.gmacs(backbone, args.sites)
        return fit(method, backbone, task.train, gmacs, config=config, sites=sites, **options), sites
    return calibrate(args.policy, args.budget.gmacs(backbone, args.sites), backbone, task.tune, sites=sites), sites


def on_what_is_left(args: Args, backbone: Backbone, task: Task) -> tuple[Policy, Sites | None, Backbone]:
    """The policy, its sites, and the network fine-tuned on the tokens that the policy leaves."""
    policy, sites = pruner(args, backbone, task)
    keep_rate = getattr(policy, "keep_rate", None)
    result = finetune(
        backbone,
        policy,
        task.train,
        CosineKeepRate(keep_rate) if args.schedule and keep_rate is not None else None,
        args.config,
        sites=sites,
        output=args.common.output,
        device=args.common.device,
        resume=args.common.resume,
    )
    return policy, sites, result.backbone


def by_scheme(args: Args, backbone: Backbone, task: Task) -> tuple[Policy, Sites | None, Backbone]:
    """Life regression, its sites, and the network, trained as in the paper."""
    common, sites = args.common, args.sites or None
    assert args.life.scheme is not None
    policy, network = train_life_regression(
        backbone,
        task.train,
        args.budget.gmacs(backbone, args.sites),
        args.life.scheme,
        config=fit_config(args, describe(args.policy)),
        sites=sites,
        seed=common.seed,
        output=common.output,
        resume=common.resume,
        progress=True,
    )
    save_backbone(network, common.output / WEIGHTS_FILE)
    return policy, sites, network


def compare(args: Args, networks: dict[str, Backbone], policy: Policy, sites: Sites | None, test: Batches) -> list[Row]:
    """Each network without pruning and pruned, on held-out images."""
    rows = []
    for name, network in networks.items():
        rows.append(measure(f"dense{name}", network, KeepAll(), test))
        rows.append(measure(f"{args.checkpoint or args.policy}{name}", network, policy, test, sites=sites))
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Calibrate or fit, fine-tune, compare."""
    args = parse(argv, prog="vitprune finetune")
    common, source = args.common, args.source
    common.prepare(not source.reads_files, ("table.md", WEIGHTS_FILE, STATE_FILE, "fit"))
    backbone = source.network(common.seed, common.device)
    task = open_task(args, backbone)
    policy, sites, network = (by_scheme if args.life.scheme else on_what_is_left)(args, backbone, task)
    if args.checkpoint is None and describe(args.policy).recipe is not None:
        save_policy(policy, common.output / POLICY_FILE)
    text = comparison_table(compare(args, {"": backbone, ", fine-tuned": network}, policy, sites, task.test))
    replace_file(common.output / "table.md", (text + "\n").encode())
    print(f"\n{text}\n\ntable.md and backbone.safetensors are in {common.output}/")
