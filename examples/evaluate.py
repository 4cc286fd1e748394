"""Measure a policy on held-out images: a trained one, or one of the papers' on any network.

    python examples/evaluate.py --checkpoint runs/mappo
    python examples/evaluate.py --checkpoint runs/mappo --target-share 0.3    # the same policy at another budget
    python examples/evaluate.py --data-dir /data/imagenet --preset evit-deit-s-0.7
    python examples/evaluate.py --data-dir DIR --model deit_small_patch16_224 --pretrained --policy evit --keep-rate 0.7

Prints top-1 and top-5 accuracy, GMACs and measured speed-up beside the dense model, and writes evaluation.json and a
figure of the pruned tokens to the output folder.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from tqdm import tqdm

from common import Batches, CommonArgs, Row, batches_of, measure_speedup, run, table, versions, write_json
from image_task import ImageArgs, first_images, load_network, open_split
from presets import PUBLISHED
from train_mappo import TEST_SEED, TUNE_SEED, token_figure
from vitprune_env import Backbone, KeepAll, Policy, TokenGame, evaluate
from vitprune_env.agents import AdaptivePolicy, TokenPolicy, calibrate_threshold, load_policy
from vitprune_env.baselines import EViT, RandomDrop, TopK
from vitprune_env.data import Digits, ImageBatches

HEURISTICS: dict[str, Callable[[float], Policy]] = {"evit": EViT, "topk": TopK, "random": RandomDrop}
AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Args(ImageArgs, CommonArgs):
    """What to evaluate, and on what."""

    checkpoint: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("runs/mappo")
    """Output folder of train_mappo.py, or a policy file; used unless a policy is named."""
    policy: Literal["evit", "topk", "random"] | None = None
    """A policy without training, instead of a checkpoint."""
    keep_rate: float = 0.7
    """Fraction of the tokens that the named policy keeps at every site."""
    preset: str | None = None
    """Settings of a paper (see presets.py), such as evit-deit-s-0.7; flags given beside it win."""
    output: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("runs/evaluation")
    """Folder for results; made if it does not exist."""
    split: str | None = None
    """Which images; None: test of the built-in task, validation of image files."""
    images: int | None = None
    """How many images to classify; None: 2000 of the built-in task, all image files."""
    batch_size: int = 250
    """Images per batch."""
    amp: Literal["off", "bf16", "fp16"] = "off"
    """Precision of the matrix products."""
    target_share: float | None = None
    """Another budget, as a share of the dense MACs: what an adaptive policy is asked for, or what the threshold of any
    other is calibrated to anew; None: as trained."""


def parse(argv: list[str]) -> Args:
    """Read the command line; `--preset` decides the defaults of the other flags.

    Raises:
        ValueError: for a preset that does not exist.
    """
    args = tyro.cli(Args, args=argv, description=__doc__)
    if args.preset is not None:
        if args.preset not in PUBLISHED:
            raise ValueError(f"preset: expected one of {', '.join(PUBLISHED)}, got {args.preset!r}")
        found = PUBLISHED[args.preset]
        default = Args(model=found.model, policy=found.policy, keep_rate=found.keep_rate)
        args = tyro.cli(Args, args=argv, default=replace(default, pretrained=True), description=__doc__)
    return replace(args, images=200) if args.quick else args


def load(args: Args) -> tuple[Policy, Backbone]:
    """The policy and the network of the flags."""
    if args.policy is not None:
        return HEURISTICS[args.policy](args.keep_rate), load_network(args, "vit_digits", args.seed, args.device)
    path = args.checkpoint / "policy.safetensors" if args.checkpoint.is_dir() else args.checkpoint
    policy = load_policy(path, device=args.device)
    if policy.info.get("finetune", "off") != "off" and args.weights is None:
        args = replace(args, weights=path.with_name("backbone.safetensors"))  # the run wrote it beside the policy
    backbone = load_network(args, policy.info.get("backbone", "vit_digits"), args.seed, args.device)
    if policy.width != backbone.embed_dim:
        trained = f"{policy.info.get('backbone')} (width {policy.width})"
        raise ValueError(f"model: the policy was trained on {trained}, {backbone.name} has width {backbone.embed_dim}")
    return policy, backbone


def batches(args: Args, backbone: Backbone, split: str, count: int | None, seed: int) -> Batches:
    """Labelled images of a split."""
    if args.reads_files:
        return open_split(args, backbone, split, count, seed).batches(args.batch_size, args.device)
    return batches_of(Digits(split, size=count or 2000, seed=seed), args.batch_size, args.device)


def measure(args: Args, policy: Policy, backbone: Backbone, test: Batches) -> list[Row]:
    """The dense network and the policy on the same images."""
    game = TokenGame.for_policy(backbone, policy)
    images, _ = first_images(test, 64 if args.quick else args.batch_size)
    pairs = 3 if args.quick else 9
    dense = Row.of("dense", evaluate(TokenGame(backbone), KeepAll(), tqdm(test, "dense", leave=False)), 1.0)
    pruned = evaluate(game, policy, tqdm(test, "policy", leave=False))
    name = args.policy or "policy"
    return [dense, Row.of(name, pruned, measure_speedup(backbone, policy, images, pairs))]


def main() -> None:
    """Load, play, report."""
    args = parse(sys.argv[1:])
    args.prepare(built_in=not args.reads_files)
    policy, backbone = load(args)
    test = batches(args, backbone, args.split or ("validation" if args.reads_files else "test"), args.images, TEST_SEED)
    device = torch.device(args.device).type
    with torch.autocast(device, AMP[args.amp]) if args.amp != "off" else contextlib.nullcontext():
        if args.target_share is not None:
            policy = recalibrated(args, policy, backbone)
        rows = measure(args, policy, backbone, test)
        token_figure(backbone, policy, test).savefig(args.output / "tokens.png", dpi=150)
    skipped = test.skipped if isinstance(test, ImageBatches) else []
    results = {
        "rows": [asdict(row) for row in rows],
        "trained": policy.info if isinstance(policy, TokenPolicy) else None,
        "skipped": skipped,
        "versions": versions(),
        "settings": {name: str(value) for name, value in vars(args).items()},
    }
    write_json(args.output / "evaluation.json", results)
    print(table(rows, dense_gmacs=rows[0].gmacs))
    for row in rows:
        print(f"{row.name}: top-1 {100 * row.accuracy:.2f} %, top-5 {100 * (row.top5 or 0):.2f} %")
    if skipped:
        print(f"{len(skipped)} unreadable images were left out: {', '.join(skipped)}")
    print(f"results and figure are in {args.output}/")


def recalibrated(args: Args, policy: Policy, backbone: Backbone) -> TokenPolicy:
    """A trained policy at another budget.

    Raises:
        ValueError: for a policy that has no threshold.
    """
    if not isinstance(policy, TokenPolicy):
        raise ValueError("target_share: expected a trained policy, whose threshold can be moved; got a keep rate")
    if isinstance(policy, AdaptivePolicy):
        return policy.at(args.target_share or policy.share)
    game = TokenGame.for_policy(backbone, policy)
    tune = batches(args, backbone, "train", 128 if args.quick else 512, TUNE_SEED)
    target = (args.target_share or 1.0) * game.cost.dense()
    return calibrate_threshold(game, policy, [images for images, _ in tune], target)


if __name__ == "__main__":
    run(main)
