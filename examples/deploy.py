"""From a network of your own to models that answer: train, load, prune, save, serve, export; with two policies.

    python examples/deploy.py

One policy is learnt, the other is a rule of your own. A deployed model is an ordinary `nn.Module` from images to
logits. It needs no game, no reward and no dataset. Files hold names, settings and weights, never code: a program that
loads them registers the same names first, as the top of this one does.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from vitprune_env import (
    BasePolicy,
    Decision,
    Observation,
    PrunedViT,
    check_policy,
    load_backbone,
    load_policy,
    register_backbone,
    register_policy,
)
from vitprune_env.agents import RunConfig, Share, train
from vitprune_env.baselines import calibrate
from vitprune_env.cli import explained
from vitprune_env.cli.flags import ResumableFlags, read_flags
from vitprune_env.data import Digits
from vitprune_env.deploy.export import export_program
from vitprune_env.models.vit_digits import WEIGHTS, create_vit_digits
from vitprune_env.policy import keep_top

SHARE = 0.35  # of the dense MACs


@dataclass(frozen=True)
class Args(ResumableFlags):
    """Where to."""

    output: Path = Path("runs/deploy")
    """Folder for everything; made if it does not exist."""


register_backbone("my_vit", create_vit_digits)  # any function that builds a timm module


@register_policy("my_loudest")
@dataclass(frozen=True)
class Loudest(BasePolicy):
    """Keeps the tokens with the largest features."""

    keep_rate: float

    def decide(self, obs: Observation) -> Decision:
        """Equally many tokens of every image."""
        return Decision(keep=keep_top(obs, obs.tokens.norm(dim=1), (obs.num_alive * self.keep_rate).ceil()))


def seconds_of(network: nn.Module, images: Tensor) -> float:
    """How long a network takes for a batch, the best of three times."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        network(images).cpu()  # waits for what a GPU still computes
        times.append(time.perf_counter() - start)
    return min(times)


def main(argv: Sequence[str] | None = None) -> None:
    """Every step from a network to exported programs."""
    args = read_flags(Args, argv, __doc__)
    args.prepare(results=("policy.safetensors", "training.safetensors"))

    backbone = load_backbone("my_vit", checkpoint=WEIGHTS / "vit_digits.safetensors", sites=(1, 3, 5)).to(args.device)
    data = Digits("train", size=64 if args.quick else 2048, seed=args.seed)
    run = RunConfig(2, 16, cache_images=64, calibration_images=64) if args.quick else RunConfig(seed=args.seed)
    result = train(backbone, data, Share(SHARE), run=run, output=args.output, device=args.device, resume=args.resume)

    few = [tuple(part.to(args.device) for part in data.batch(range(64)))]
    check_policy(Loudest(0.5), backbone, few[0][0][:4])  # shapes, determinism, independence of the rest of the batch
    policies = {
        "learnt": load_policy(args.output / "policy.safetensors", args.device),
        "loudest": calibrate(Loudest, result.target_macs / 1e9, backbone, few),
    }
    count = 32 if args.quick else 256
    images, labels = (part.to(args.device) for part in Digits("test", size=count).batch(range(count)))
    for name, policy in policies.items():
        model = PrunedViT(backbone, policy).eval()  # pruned tokens are gone, later blocks do not compute on them
        model.save_pretrained(args.output / name)  # safetensors and JSON; push_to_hub works as well

        served = PrunedViT.from_pretrained(args.output / name).to(args.device)
        with torch.inference_mode():
            correct = float((served(images).argmax(dim=1) == labels).float().mean())
            dense, pruned = seconds_of(backbone, images), seconds_of(served, images)
        print(f"{name}: {correct:.1%} correct, {dense / pruned:.1f} times as fast as the dense model")

        torch.export.save(export_program(served, max_batch=1), args.output / f"{name}.pt2")  # one image at a time
        answer = torch.export.load(args.output / f"{name}.pt2").module()(images[:1])
        print(f"{name}: the exported program answers class {int(answer.argmax())}")
    print(f"everything is in {args.output}/")


if __name__ == "__main__":
    with explained(Args):
        main(sys.argv[1:])
