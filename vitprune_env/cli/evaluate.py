"""Measure a policy on held-out images: a trained one, or one of the papers' on any network.

    vitprune evaluate --checkpoint runs/mappo
    vitprune evaluate --checkpoint runs/mappo --target-share 0.3    # the same policy at another budget
    vitprune evaluate --data-dir /data/imagenet --preset evit-deit-s-0.7
    vitprune evaluate --data-dir DIR --model deit_small_patch16_224 --pretrained --policy evit --keep-rate 0.7

Prints top-1 and top-5 accuracy, GMACs and measured speed-up beside the dense model, and writes evaluation.json and a
figure of the pruned tokens to the output folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from vitprune_env.cli.flags import TEST_SEED, TUNE_SEED, CommonFlags, ImageFlags, lowered, read_flags

if TYPE_CHECKING:
    from torch import Tensor

    from vitprune_env.agents import TokenPolicy
    from vitprune_env.benchmarking.images import Batches
    from vitprune_env.benchmarking.measurement import Row
    from vitprune_env.engine.backbone import Backbone
    from vitprune_env.policy import Policy


@dataclass(frozen=True)
class Args:
    """What to evaluate, and on what."""

    checkpoint: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("runs/mappo")
    """Output folder of a training run, or a policy file; used unless a policy is named."""
    policy: str | None = None
    """A baseline without training that has a keep rate (evit, topk, random, ...), instead of a checkpoint."""
    keep_rate: float = 0.7
    """Fraction of the tokens that the named policy keeps at every site."""
    preset: str | None = None
    """Settings of a paper, such as evit-deit-s-0.7; flags given beside it win."""
    target_share: float | None = None
    """Another budget, as a share of the dense MACs: what an adaptive policy is asked for, or what the threshold of any
    other is calibrated to anew; None: as trained."""
    split: str | None = None
    """Which images; None: test of the built-in task, validation of image files."""
    images: int | None = None
    """How many images to classify; None: 2000 of the built-in task, all image files."""
    batch_size: int = 250
    """Images per batch."""
    amp: Literal["off", "bf16", "fp16"] = "off"
    """Precision of the matrix products."""
    common: CommonFlags = field(default_factory=lambda: CommonFlags(output=Path("runs/evaluation")))
    source: ImageFlags = field(default_factory=ImageFlags)

    def batches(self, backbone: Backbone, calibrate: bool) -> tuple[Batches, Sequence[tuple[Tensor, Tensor]]]:
        """Images to report on and, if a threshold is to be calibrated, other ones for that."""
        import torch

        from vitprune_env.benchmarking.images import as_batches

        tune = [("train", 32 if self.common.quick else 512, TUNE_SEED)] if calibrate else []
        report = (self.source.held_out_split(self.split), self.images, TEST_SEED)
        parts = self.source.open_apart(backbone, *tune, report)
        device = torch.device(self.common.device)
        *others, test = [as_batches(part, self.batch_size, device) for part in parts]
        return test, [batch for part in others for batch in part]


def parse(argv: Sequence[str] | None, prog: str | None = None) -> Args:
    """Read the command line; `--preset` decides the defaults of the other flags.

    Raises:
        SettingsError: for a preset that does not exist.
    """
    args = read_flags(Args, argv, __doc__, prog)
    if args.preset is not None:
        from vitprune_env.benchmarking.presets import PUBLISHED
        from vitprune_env.errors import SettingsError

        if args.preset not in PUBLISHED:
            raise SettingsError(f"preset: expected one of {', '.join(PUBLISHED)}, got {args.preset!r}")
        found = PUBLISHED[args.preset]
        network = ImageFlags(model=found.model, pretrained=True)
        default = Args(policy=found.policy, keep_rate=found.keep_rate, source=network)
        args = read_flags(Args, argv, __doc__, prog, default)
    return lowered(args, images=100) if args.common.quick else args


def load(args: Args) -> tuple[Policy, Backbone]:
    """The policy and the network of the flags.

    Raises:
        CheckpointError: for a policy file that cannot be read.
        SettingsError: for a policy and a network that do not fit.
    """
    from vitprune_env.baselines import make
    from vitprune_env.deploy.policy_files import load_policy
    from vitprune_env.errors import SettingsError

    source, common = args.source, args.common
    if args.policy is not None:
        return make(args.policy, keep_rate=args.keep_rate), source.network(common.seed, common.device)
    path = args.checkpoint / "policy.safetensors" if args.checkpoint.is_dir() else args.checkpoint
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
    return policy, backbone


def to_calibrate(policy: Policy, share: float | None) -> bool:
    """Whether another budget needs images to calibrate a threshold on.

    Raises:
        SettingsError: for another budget of a policy that has no threshold.
    """
    from vitprune_env.agents import AdaptivePolicy, TokenPolicy
    from vitprune_env.errors import SettingsError

    if share is not None and not isinstance(policy, TokenPolicy):
        raise SettingsError("target_share: expected a trained policy, whose threshold can be moved; got a keep rate")
    return share is not None and not isinstance(policy, AdaptivePolicy)


def at_share(policy: Any, backbone: Backbone, share: float, tune: Sequence[tuple[Tensor, Tensor]]) -> TokenPolicy:
    """A trained policy at another budget; its threshold is calibrated on `tune`, unless it serves many budgets."""
    from vitprune_env.agents import AdaptivePolicy, calibrate_threshold
    from vitprune_env.game.token_game import TokenGame

    if isinstance(policy, AdaptivePolicy):
        return policy.at(share)
    game = TokenGame.for_policy(backbone, policy)
    return calibrate_threshold(game, policy, [images for images, _ in tune], share * game.cost.dense())


def main(argv: Sequence[str] | None = None) -> None:
    """Load, play, report."""
    args = parse(argv, prog="vitprune evaluate")
    args.common.prepare(built_in=not args.source.reads_files)
    policy, backbone = load(args)
    import torch

    from vitprune_env.benchmarking.measurement import Timing, measure
    from vitprune_env.benchmarking.trained import figure_of_tokens
    from vitprune_env.policy import KeepAll

    test, tune = args.batches(backbone, to_calibrate(policy, args.target_share))
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.amp)
    with torch.autocast(torch.device(args.common.device).type, dtype, enabled=dtype is not None):
        if args.target_share is not None:
            policy = at_share(policy, backbone, args.target_share, tune)
        timing = Timing(3, 16) if args.common.quick else Timing(9, args.batch_size)
        dense = replace(measure("dense", backbone, KeepAll(), test), speedup=1.0)
        pruned = measure(args.policy or "policy", backbone, policy, test, timing=timing)
        figure = figure_of_tokens(backbone, policy, test)
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
    for row in rows:
        print(f"{row.name}: top-1 {100 * row.accuracy:.2f} %, top-5 {100 * row.top5:.2f} %")
    if skipped:
        print(f"{len(skipped)} unreadable images were left out: {', '.join(skipped)}")
    print(f"results and figure are in {args.common.output}/")
