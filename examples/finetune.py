"""Fine-tune a network for the policy that prunes it, and see what that gains.

    python examples/finetune.py                       # EViT at 25 % of the dense MACs
    python examples/finetune.py --policy tome --target-share 0.35
    python examples/finetune.py --policy life_regression

What has to be trained of a policy is trained first. The keep rate falls from 1 to its target over the first third,
where the policy has one. `vitprune finetune` does the same on image files and for trained policies, with all settings
as flags.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vitprune_env import TokenGame, evaluate, load_backbone
from vitprune_env.agents import CosineKeepRate, FinetuneConfig, finetune
from vitprune_env.baselines import calibrate, describe, fit
from vitprune_env.cli import explained
from vitprune_env.cli.flags import TEST_SEED, TUNE_SEED, ResumableFlags, read_flags
from vitprune_env.data import Digits, batches_of


@dataclass(frozen=True)
class Args(ResumableFlags):
    """What to fine-tune for."""

    output: Path = Path("runs/finetune")
    """Folder for checkpoints, history and backbone.safetensors."""
    policy: str = "evit"
    """A baseline, by its registry name."""
    target_share: float = 0.25
    """Its budget, as a share of the dense MACs."""


def main(argv: Sequence[str] | None = None) -> None:
    """Calibrate, fine-tune, compare."""
    args = read_flags(Args, argv, __doc__)
    args.prepare(results=("backbone.safetensors", "finetuning.safetensors"))
    backbone = load_backbone("vit_digits").to(args.device)
    method, train = describe(args.policy), Digits("train", size=64 if args.quick else 4096, seed=args.seed)
    sites = method.sites(backbone)
    budget = args.target_share * TokenGame(backbone).cost.dense() / 1e9  # GMACs per image
    if method.recipe is None:
        policy = calibrate(args.policy, budget, backbone, Digits("train", size=64, seed=TUNE_SEED), sites=sites)
    else:
        config = method.recipe.config.quick() if args.quick else None
        output, seed, resume = args.output / "fit", args.seed, args.resume
        policy = fit(
            method, backbone, train, budget, config=config, sites=sites, seed=seed, output=output, resume=resume
        )

    keep_rate = getattr(policy, "keep_rate", None)
    result = finetune(
        backbone,
        policy,
        train,
        None if keep_rate is None else CosineKeepRate(keep_rate),
        FinetuneConfig(steps=5, batch_size=16, cache_images=32) if args.quick else FinetuneConfig(seed=args.seed),
        sites=sites,
        output=args.output,
        device=args.device,
        resume=args.resume,
    )

    test = batches_of(Digits("validation", size=100 if args.quick else 2000, seed=TEST_SEED), 250, args.device)
    for name, network in (("before", backbone), ("after", result.backbone)):
        found = evaluate(TokenGame.for_policy(network, policy, sites=sites), policy, test)
        print(f"{args.policy}, {name} fine-tuning: {100 * found.accuracy:.1f} % correct, {found.gmacs:.5f} GMACs")


if __name__ == "__main__":
    with explained(Args):
        main(sys.argv[1:])
