"""Bring your own reward (`python examples/custom_reward.py`): a budget moves its price through the field `price`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vitprune_env import load_backbone
from vitprune_env.agents import RunConfig, Share, train
from vitprune_env.cli import explained
from vitprune_env.cli.flags import ResumableFlags, read_flags
from vitprune_env.data import Digits
from vitprune_env.types import Step


@dataclass(frozen=True)
class Confidence:
    """Pays the probability of the true class to all agents; a token kept late costs more than one kept early."""

    price: float = 0.01  # where training starts

    def score(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Probability of the true class, `[B]`."""
        return logits.softmax(dim=1).gather(1, labels[:, None]).squeeze(1)

    def immediate(self, step: Step) -> Tensor:
        """The price of the blocks up to the next site, times the site's number of blocks, `[B, N]`."""
        return -self.price * step.share * step.site.block * step.carried.float()

    def deferred(self, steps: Sequence[Step], score: Tensor) -> Tensor:
        """The score in the last step that each agent acted in, `[T, B, N]`."""
        last = [step.acted & ~step.kept for step in steps[:-1]] + [steps[-1].acted]
        return torch.stack(last) * score[None, :, None]


def main(argv: Sequence[str] | None = None) -> None:
    """Train with it to 35 % of the dense MACs, and print how the price moves."""
    args = read_flags(ResumableFlags, argv, __doc__)
    args.prepare(results=("policy.safetensors", "training.safetensors"))
    run = RunConfig(seed=args.seed)
    if args.quick:
        run = RunConfig(4, 16, args.seed, cache_images=64, calibration_images=64)
    data = Digits("train", size=64 if args.quick else 2048, seed=args.seed)
    place = {"output": args.output, "resume": args.resume, "device": args.device}
    result = train(load_backbone("vit_digits"), data, Share(0.35), reward=Confidence(), run=run, **place)
    print("price:", *(round(row["price"], 4) for row in result.history[:: 1 if args.quick else 10]))
    print(f"accuracy {result.train_accuracy:.1%}, {result.train_macs / result.target_macs:.1%} of the budget")


if __name__ == "__main__":
    with explained(ResumableFlags):
        main(sys.argv[1:])
