"""Load a trained policy and measure it on images that it has never seen.

    python examples/evaluate.py --checkpoint runs/mappo
    python examples/evaluate.py --checkpoint runs/mappo --target-share 0.3    # the same policy at another budget

`vitprune evaluate` does the same on image files, with networks of timm and with the methods of the papers.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vitprune_env import KeepAll, TokenGame, evaluate, load_backbone
from vitprune_env.agents import calibrate_threshold, load_policy
from vitprune_env.cli import explained
from vitprune_env.cli.flags import TEST_SEED, TUNE_SEED, CommonFlags, read_flags
from vitprune_env.data import Digits, batches_of


@dataclass(frozen=True)
class Args(CommonFlags):
    """What to evaluate."""

    checkpoint: Path = Path("runs/mappo")
    """Output folder of train_mappo.py."""
    target_share: float | None = None
    """Another budget, as a share of the dense MACs, that the threshold is calibrated to; None: as trained."""


def main(argv: Sequence[str] | None = None) -> None:
    """Load, calibrate if asked to, play."""
    args = read_flags(Args, argv, __doc__)
    policy = load_policy(args.checkpoint / "policy.safetensors", args.device)
    backbone = load_backbone("vit_digits").to(args.device)
    game = TokenGame.for_policy(backbone, policy)  # the policy's sites, and the evidence that it needs

    if args.target_share is not None:
        count = 32 if args.quick else 256
        images, _ = Digits("train", size=count, seed=TUNE_SEED).batch(range(count))
        budget = args.target_share * game.cost.dense()  # MACs per image, the policy's own included
        policy = calibrate_threshold(game, policy, [images.to(args.device)], budget)

    test = batches_of(Digits("test", size=100 if args.quick else 2000, seed=TEST_SEED), 250, args.device)
    dense = evaluate(TokenGame(backbone), KeepAll(), test)
    pruned = evaluate(game, policy, test)
    for name, found in (("dense", dense), ("pruned", pruned)):
        kept = " / ".join(f"{100 * rate:.0f}" for rate in found.keep_per_site)
        print(f"{name}: {100 * found.accuracy:.1f} % correct, {found.gmacs:.5f} GMACs, {kept} % of the tokens kept")


if __name__ == "__main__":
    with explained(Args):
        main(sys.argv[1:])
