"""Measure a policy on held-out images: a trained one, or one of the papers' on any network.

    vitprune evaluate --checkpoint runs/mappo
    vitprune evaluate --checkpoint runs/mappo --target-share 0.3    # the same policy at another budget
    vitprune evaluate --data-dir /data/imagenet --preset evit-deit-s-0.7
    vitprune evaluate --data-dir DIR --model deit_small_patch16_224 --pretrained --policy evit --keep-rate 0.7
    vitprune evaluate --data-dir DIR --model deit_small_patch16_224 --pretrained --policy tome --target-share 0.5
    vitprune evaluate --policy my_policy.py:KeepLoud

Every baseline that `vitprune info` lists can be named. With a budget it is calibrated on training images. What it has
to train is trained on them first, and kept as policy.safetensors in the output folder, which --checkpoint loads.
Prints top-1 and top-5 accuracy, GMACs and measured speed-up beside the dense model, and writes evaluation.json and a
figure of the pruned tokens to the output folder.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, cast

import tyro

from vitprune_env.cli.flags import TEST_SEED, TUNE_SEED, ImageFlags, ResumableFlags, lowered, named_sites, read_flags

if TYPE_CHECKING:
    from vitprune_env.benchmarking.images import Batches
    from vitprune_env.benchmarking.measurement import Row
    from vitprune_env.data import Digits, ImageFiles, RandomViews
    from vitprune_env.engine.backbone import Backbone
    from vitprune_env.policy import Policy

POLICY_FILE, FIT = "policy.safetensors", "fit"  # a policy that was trained, and the folder of its training


@dataclass(frozen=True)
class Args:
    """What to evaluate, and on what."""

    checkpoint: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("runs/mappo")
    """Output folder of a training run, or a policy file; used unless a policy is named."""
    policy: str | None = None
    """A baseline (evit, tome, dynamicvit, ...; `vitprune info` lists them), instead of a checkpoint; with parameters
    if it reads topk:leave=merge; or a policy of your own, FILE.py:NAME or package.module:NAME."""
    keep_rate: float | None = None
    """Fraction of the tokens that the named policy keeps at every site, if it has one; None: 0.7, or by the budget."""
    preset: str | None = None
    """A method on a stock network, such as evit-deit-s-0.7 (keep rate), tome-deit-s-3.0 (printed GMACs) or
    ats-dinov2-s-half (half of dense); `vitprune info` lists them. Flags given beside it win."""
    target_share: float | None = None
    """A budget as a share of the dense MACs: what an adaptive policy is asked for, or what any other is calibrated to;
    None: as trained."""
    target_gmacs: float | None = None
    """The same in GMACs per image."""
    sites: tuple[str, ...] = ("backbone",)
    """Where a named policy acts: `backbone` for the network's own sites, and inside every block for methods that are
    made to act there; `published` for those of its paper, as presets of printed numbers have it; or sites, such as
    3 6 9. A saved policy acts where it was trained."""
    split: str | None = None
    """Which images; None: test of the built-in task, validation of image files."""
    images: int | None = None
    """How many images to classify; None: 2000 of the built-in task, all image files."""
    batch_size: int = 250
    """Images per batch."""
    amp: Literal["off", "auto", "bf16", "fp16"] = "off"
    """Precision of the matrix products; auto: bf16 where the processor has units for it."""
    common: ResumableFlags = field(default_factory=lambda: ResumableFlags(output=Path("runs/evaluation")))
    source: ImageFlags = field(default_factory=ImageFlags)

    @property
    def run_name(self) -> str:
        """Of what."""
        return "evaluation" if self.policy is None else f"evaluation-{name_of(self.policy)}"

    @property
    def fits(self) -> bool:
        """Whether a policy is trained first."""
        return self.policy is not None and is_trained(self.policy)

    @property
    def budgeted(self) -> bool:
        """Whether the flags name a budget."""
        return self.target_share is not None or self.target_gmacs is not None

    def prepare(self) -> None:
        """Make the output folder, unless a policy would be trained where another one was."""
        self.common.prepare(not self.source.reads_files, (POLICY_FILE, FIT) if self.fits else ())

    def tuning(self, backbone: Backbone) -> Batches:
        """Training images to calibrate on, as random views of them; none is reported on or trained on."""
        from vitprune_env.data import Digits, RandomViews

        images = self._apart(backbone)[0]
        return self._batches(images if isinstance(images, Digits) else RandomViews(images, count=1, seed=TUNE_SEED))

    def training(self, backbone: Backbone) -> Digits | ImageFiles:
        """Training images to fit on."""
        return self._apart(backbone)[2]

    def held_out(self, backbone: Backbone, calibrated: bool) -> Batches:
        """Images to report on, apart from those to calibrate on where something was calibrated."""
        if calibrated:
            return self._batches(self._apart(backbone)[1])
        return self._batches(self.source.open(backbone, *self._reported))

    @property
    def _reported(self) -> tuple[str, int | None, int]:
        return self.source.held_out_split(self.split), self.images, TEST_SEED

    def _apart(self, backbone: Backbone) -> list[Digits | ImageFiles]:
        tune = ("train", 32 if self.common.quick else 512, TUNE_SEED)
        train = ("train", None if self.source.reads_files else 4096, self.common.seed)
        return self.source.open_apart(backbone, tune, self._reported, train)

    def _batches(self, images: Digits | ImageFiles | RandomViews) -> Batches:
        import torch

        from vitprune_env.benchmarking.images import as_batches

        return as_batches(images, self.batch_size, torch.device(self.common.device))


A = TypeVar("A", bound=Args)


def parse(
    argv: Sequence[str] | None, prog: str | None = None, flags: type[A] = Args, description: str | None = __doc__
) -> A:
    """Read the command line; `--preset` decides the defaults of the other flags.

    Args:
        argv: command line; None: that of the process.
        prog: name of the command; None: that of the process.
        flags: these flags, or those of a command that has them and more.
        description: shown above the flags by `--help`.

    Raises:
        SettingsError: for a preset that does not exist, or flags that nothing would hear.
    """
    default = flags()
    args = read_flags(flags, argv, description, prog)
    if args.preset is not None:
        from vitprune_env.benchmarking.presets import PUBLISHED
        from vitprune_env.errors import SettingsError

        if args.preset not in PUBLISHED:
            raise SettingsError(f"preset: expected one of {', '.join(PUBLISHED)}, got {args.preset!r}")
        found = PUBLISHED[args.preset]
        network = ImageFlags(model=found.model, pretrained=found.pretrained, img_size=found.img_size)
        budget = None if found.keep_rate is not None else found.gmacs
        default = flags(
            sites=("backbone",) if found.share is not None else ("published",),
            policy=found.policy,
            keep_rate=found.keep_rate,
            target_gmacs=budget,
            target_share=found.share,
            source=network,
        )
        args = read_flags(flags, argv, description, prog, default)
    args = _with_one_budget(args, default)
    check_fits(args)
    return lowered(args, images=100) if args.common.quick else args


def _with_one_budget(args: A, default: A) -> A:
    """The flag that sets the cost in place of what a preset has for the others.

    Raises:
        SettingsError: for several of these flags.
    """
    from vitprune_env.errors import SettingsError

    names = ("keep_rate", "target_gmacs", "target_share")
    given = [name for name in names if getattr(args, name) != getattr(default, name)]
    if len(given) > 1:
        raise SettingsError(f"{', '.join(given)}: expected one of them, got {len(given)}")
    return replace(args, **{name: None for name in names if given and name not in given})


def check_fits(args: Args) -> None:
    """Refuse flags about training where nothing is trained.

    Raises:
        SettingsError: naming the flag.
    """
    from vitprune_env.errors import SettingsError

    for name in ("resume", "overwrite"):
        if getattr(args.common, name) and not args.fits:
            got = args.policy or args.checkpoint
            raise SettingsError(f"{name}: expected a policy that is trained first, such as dynamicvit, got {got}")


def is_trained(policy: str) -> bool:
    """Whether a baseline, with parameters or without, has something to train; False for what is no baseline."""
    from vitprune_env.baselines import available, parsed

    return policy.partition(":")[0] in available() and parsed(policy)[0].recipe is not None


def load(args: Args) -> tuple[Policy, Backbone]:
    """The policy and the network of the flags.

    Raises:
        BudgetError: for a budget that the named policy cannot meet.
        CheckpointError: for a policy file that cannot be read.
        SettingsError: for a policy and a network that do not fit, a named policy without a budget, or flags of a named
            policy beside a saved one.
    """
    from vitprune_env.deploy.policy_files import load_policy
    from vitprune_env.errors import CheckpointError, SettingsError

    source, common = args.source, args.common
    if args.policy is not None:
        backbone = source.network(common.seed, common.device)
        return named_policy(args, args.policy, backbone), backbone
    for name in ("keep_rate", "sites"):
        if (given := getattr(args, name)) != getattr(Args, name):
            raise SettingsError(f"{name}: expected none beside a saved policy, which brings its own, got {given}")
    path = args.checkpoint / POLICY_FILE if args.checkpoint.is_dir() else args.checkpoint
    if not path.exists():
        raise CheckpointError(
            f"{path}: expected a policy file, found none; `vitprune train` writes one, and --policy names a baseline"
        )
    policy = load_policy(path, device=common.device)
    info = getattr(policy, "info", {})  # of trained policies: where they come from
    if info.get("finetune", "off") != "off" and source.weights is None:
        source = replace(source, weights=path.with_name("backbone.safetensors"))  # the run wrote it beside the policy
    backbone = source.network(common.seed, common.device, info.get("backbone", "vit_digits"))
    width = getattr(policy, "width", backbone.embed_dim)
    if width != backbone.embed_dim:
        raise SettingsError(
            f"model: the policy was trained on {info.get('backbone')} (width {width}), "
            f"{backbone.name} has width {backbone.embed_dim}"
        )
    budget = budget_of(args, backbone)
    return (policy if budget is None else at_budget(args, policy, backbone, budget)), backbone


def budget_of(args: Args, backbone: Backbone) -> float | None:
    """The budget of the flags in GMACs; None: there is none."""
    from vitprune_env.engine.cost import CostModel

    if args.target_share is None:
        return args.target_gmacs
    return args.target_share * CostModel.of(backbone).dense() / 1e9


def sites_of(args: Args) -> Any:
    """Where the policy of the flags acts, as games and models take it; None: where the policy says."""
    sites = named_sites(args.sites, "backbone", "published")
    return None if args.policy is None or sites == "backbone" else sites


def name_of(policy: str) -> str:
    """What `--policy` names, without the file that it is in."""
    from vitprune_env.benchmarking.contestants import label_of

    return label_of(policy)


def own_policy(args: Args, text: str, backbone: Backbone) -> Policy:
    """A policy of the user's own at the keep rate or the budget of the flags: an object, or what makes one.

    Raises:
        SettingsError: for a keep rate or a budget of a policy that has nothing to turn, or for what is no policy.
    """
    from vitprune_env.baselines import calibrate
    from vitprune_env.benchmarking.contestants import load_object
    from vitprune_env.errors import SettingsError
    from vitprune_env.policy import Policy

    made, budget = load_object(text), budget_of(args, backbone)
    maker = cast(Any, made if callable(made) and (isinstance(made, type) or not isinstance(made, Policy)) else None)
    if maker is not None and inspect.signature(maker).parameters:
        if budget is not None:
            return calibrate(maker, budget, backbone, cast(Any, args.tuning(backbone)), sites_of(args))
        return maker(0.7 if args.keep_rate is None else args.keep_rate)
    if args.keep_rate is not None:
        raise SettingsError(f"keep_rate: expected none, as {text} is not made from one, got {args.keep_rate}")
    policy = made if maker is None else maker()
    if not isinstance(policy, Policy):
        raise SettingsError(f"policy: expected a policy, or a class or function that makes one, got {text}")
    return policy if budget is None else at_budget(args, policy, backbone, budget)


def named_policy(args: Args, name: str, backbone: Backbone) -> Policy:
    """A policy of the user's own or a baseline at the keep rate or the budget of the flags.

    A baseline that has something to train is trained first.
    """
    import torch

    from vitprune_env.baselines import calibrate, fit, parsed
    from vitprune_env.benchmarking.contestants import is_own
    from vitprune_env.deploy.policy_files import save_policy
    from vitprune_env.errors import SettingsError

    if is_own(name):
        return own_policy(args, name, backbone)
    (method, parameters), budget, common = parsed(name), budget_of(args, backbone), args.common
    sites = sites_of(args)
    if budget is None:
        if method.recipe is not None or method.knob.name != "keep_rate":
            raise SettingsError(f"target_share: {name} needs a budget, --target-share or --target-gmacs; got none")
        return method(**{"keep_rate": 0.7 if args.keep_rate is None else args.keep_rate, **parameters})
    if method.recipe is None:
        return calibrate(method.name, budget, backbone, cast(Any, args.tuning(backbone)), sites, **parameters)
    if other := sorted(set(parameters) - {"leave"}):
        raise SettingsError(f"policy: expected no parameter but leave of {method.name}, which is trained, got {other}")
    config = method.fit_config()
    with torch.autocast(torch.device(common.device).type, enabled=False):
        policy: Any = fit(
            method,
            backbone,
            args.training(backbone),
            budget,
            config=config.quick() if common.quick else config,
            sites=sites,
            seed=common.seed,
            output=common.output / FIT,
            resume=common.resume,
        )
    policy = policy.leaving(**parameters) if parameters else policy
    policy = calibrate(policy.at, budget, backbone, cast(Any, args.tuning(backbone)), sites, knob=method.fitted_knob)
    save_policy(policy, common.output / POLICY_FILE)
    return policy


def at_budget(args: Args, policy: Policy, backbone: Backbone, budget: float) -> Policy:
    """A saved policy at another budget, in GMACs.

    Raises:
        SettingsError: for a policy that has nothing to turn.
    """
    from vitprune_env.agents import AdaptivePolicy, MergePolicy, TokenPolicy, calibrate_threshold
    from vitprune_env.baselines import calibrate
    from vitprune_env.baselines.registry import knob_of
    from vitprune_env.errors import SettingsError
    from vitprune_env.game.token_game import TokenGame

    if isinstance(policy, TokenPolicy | MergePolicy):
        game = TokenGame.for_policy(backbone, policy)
        if isinstance(policy, AdaptivePolicy):
            return policy.at(1e9 * budget / game.cost.dense())
        return calibrate_threshold(game, policy, [images for images, _ in args.tuning(backbone)], 1e9 * budget)
    knob = knob_of(type(policy))
    make = getattr(policy, "at", None) or knob.turner(policy)
    if make is None:
        kind = type(policy).__name__
        raise SettingsError(f"target_share: expected a policy that can be brought to a budget, got {kind}")
    return calibrate(make, budget, backbone, cast(Any, args.tuning(backbone)), knob=knob)


def main(argv: Sequence[str] | None = None) -> None:
    """Load, play, report."""
    args = parse(argv, prog="vitprune evaluate")
    args.prepare()
    from vitprune_env.agents import AdaptivePolicy
    from vitprune_env.benchmarking.measurement import Timing, measure
    from vitprune_env.benchmarking.trained import figure_of_tokens
    from vitprune_env.engine.kernels import autocast
    from vitprune_env.policy import KeepAll

    with autocast(args.common.device, args.amp):
        policy, backbone = load(args)
        test = args.held_out(backbone, args.budgeted and not isinstance(policy, AdaptivePolicy))
        timing = Timing(3, 16) if args.common.quick else Timing(9, args.batch_size)
        dense = replace(measure("dense", backbone, KeepAll(), test), speedup=1.0)
        sites = sites_of(args)
        pruned = measure(name_of(args.policy or "policy"), backbone, policy, test, sites=sites, timing=timing)
        figure = figure_of_tokens(backbone, policy, test, sites)
    figure.savefig(args.common.output / "tokens.png", dpi=150)
    report(args, [dense, pruned], policy, list(getattr(test, "skipped", [])))


def report(args: Args, rows: Sequence[Row], policy: Policy, skipped: Sequence[str]) -> None:
    """Write and print what was measured."""
    from vitprune_env.benchmarking.store import versions, write_json
    from vitprune_env.benchmarking.trained import comparison_table

    results = {
        "rows": [row.numbers() for row in rows],
        "trained": getattr(policy, "info", None),
        "skipped": skipped,
        "versions": versions(),
        "settings": {name: str(value) for name, value in {**vars(args), **vars(args.source)}.items()},
    }
    write_json(args.common.output / "evaluation.json", results)
    print(comparison_table(rows))
    print(f"{rows[-1].name}: tokens leave at {', '.join(rows[-1].sites)}")
    for row in rows:
        print(f"{row.name}: top-1 {100 * row.accuracy:.2f} %, top-5 {100 * row.top5:.2f} %")
    if skipped:
        print(f"{len(skipped)} unreadable images were left out: {', '.join(skipped)}")
    print(f"results and figure are in {args.common.output}/")
