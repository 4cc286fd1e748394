"""From training to a model that answers: train, save, load, prune, save the model, serve, export.

    python examples/deploy.py

The deployed model is an ordinary `nn.Module` from images to logits. It needs no game, no reward and no dataset.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from vitprune_env import PrunedViT, load_backbone, load_policy
from vitprune_env.agents import RunConfig, Share, train
from vitprune_env.cli import explained
from vitprune_env.cli.flags import CommonFlags, read_flags
from vitprune_env.data import Digits
from vitprune_env.deploy.export import export_program


@dataclass(frozen=True)
class Args(CommonFlags):
    """Where to."""

    output: Path = Path("runs/deploy")
    """Folder for everything; made if it does not exist."""


def main(argv: Sequence[str] | None = None) -> None:
    """Every step from a network to an exported program."""
    args = read_flags(Args, argv, __doc__)
    args.prepare(results=("policy.safetensors", "training.safetensors"))

    backbone = load_backbone("vit_digits").to(args.device)
    data = Digits("train", size=64 if args.quick else 2048, seed=args.seed)
    run = RunConfig(2, 16, cache_images=64, calibration_images=64) if args.quick else RunConfig(seed=args.seed)
    train(backbone, data, Share(0.35), run=run, output=args.output, device=args.device, resume=args.resume)

    policy = load_policy(args.output / "policy.safetensors", args.device)
    model = PrunedViT(backbone, policy).eval()  # pruned tokens are gone, later blocks do not compute on them
    model.save_pretrained(args.output / "model")  # safetensors and JSON; push_to_hub works as well

    served = PrunedViT.from_pretrained(args.output / "model").to(args.device)
    count = 32 if args.quick else 256
    images, labels = Digits("test", size=count).batch(range(count))
    images = images.to(args.device)
    seconds: dict[str, float] = {}
    with torch.inference_mode():
        for name, network in (("dense", backbone), ("pruned", served), ("dense", backbone), ("pruned", served)):
            start = time.perf_counter()
            logits = network(images).cpu()  # waits for what a GPU still computes
            seconds[name] = time.perf_counter() - start  # the second run of each counts
    accuracy = float((logits.argmax(dim=1) == labels).float().mean())
    print(f"{accuracy:.1%} correct, {seconds['dense'] / seconds['pruned']:.1f} times as fast as the dense model")

    program = export_program(served, max_batch=1)  # one image at a time, as many tokens as it needs
    torch.export.save(program, args.output / "model.pt2")
    answer = torch.export.load(args.output / "model.pt2").module()(images[:1])
    print(f"exported program: class {int(answer.argmax())}; everything is in {args.output}/")


if __name__ == "__main__":
    with explained():
        main(sys.argv[1:])
