"""Reload a trained policy and measure it on held-out images.

    python examples/evaluate.py --checkpoint runs/mappo
    python examples/evaluate.py --checkpoint runs/mappo --target-share 0.3    # the same policy at another budget

Prints accuracy, GMACs and measured speed-up beside the dense model, and writes evaluation.json and a figure of the
pruned tokens to the output folder.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from common import CommonArgs, Row, batches_of, measure_speedup, table, versions, write_json
from train_mappo import TEST_SEED, TUNE_SEED, token_figure
from vitprune_env import KeepAll, TokenGame, evaluate, load_backbone
from vitprune_env.agents import calibrate_threshold, load_policy
from vitprune_env.data import Digits


@dataclass(frozen=True)
class Args(CommonArgs):
    """What to evaluate, and on what."""

    checkpoint: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("runs/mappo")
    """Output folder of train_mappo.py, or a policy file."""
    output: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("runs/evaluation")
    """Folder for results; made if it does not exist."""
    split: Literal["train", "validation", "test"] = "test"
    """Which digits."""
    images: int = 2000
    """How many images to classify."""
    batch_size: int = 250
    """Images per batch."""
    target_share: float | None = None
    """Recalibrate the policy's threshold to this share of the dense MACs; None: leave it as trained."""


def main() -> None:
    """Load, play, report."""
    args = tyro.cli(Args, description=__doc__)
    args = replace(args, images=200) if args.quick else args
    args.prepare()
    path = args.checkpoint / "policy.safetensors" if args.checkpoint.is_dir() else args.checkpoint
    policy = load_policy(path, device=args.device)
    backbone = load_backbone(policy.info.get("backbone", "vit_digits")).to(args.device)
    game = TokenGame.for_policy(backbone, policy)
    if args.target_share is not None:
        tune = batches_of(Digits("train", size=512, seed=TUNE_SEED), args.batch_size, args.device)
        target = args.target_share * game.cost.dense()
        policy = calibrate_threshold(game, policy, [images for images, _ in tune], target)
    data = Digits(args.split, size=args.images, seed=TEST_SEED)
    batches = batches_of(data, args.batch_size, args.device)
    images = torch.cat([images for images, _ in batches])[:128]
    pairs = 3 if args.quick else 9
    rows = [
        replace(Row.of("dense", evaluate(game, KeepAll(), batches)), speedup=1.0),
        Row.of("policy", evaluate(game, policy, batches), measure_speedup(backbone, policy, images, pairs)),
    ]
    token_figure(backbone, policy, batches).savefig(args.output / "tokens.png", dpi=150)
    results = {"rows": [asdict(row) for row in rows], "trained": policy.info, "versions": versions()}
    write_json(args.output / "evaluation.json", {**results, "split": args.split, "images": args.images})
    print(f"{table(rows, dense_gmacs=rows[0].gmacs)}\n\nresults and figure are in {args.output}/")


if __name__ == "__main__":
    main()
