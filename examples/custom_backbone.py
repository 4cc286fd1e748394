"""Bring your own network: any timm module that the game can walk, trained by you, pruned, saved and loaded again.

    python examples/custom_backbone.py

The builder is registered under a name. A saved file holds the name and the weights, never code: a program that loads
the file registers the same name first.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer
from torch.nn.functional import cross_entropy
from tqdm import trange

from vitprune_env import PrunedViT, TokenGame, load_backbone, load_pruned, register_backbone, save_policy
from vitprune_env.baselines import calibrate
from vitprune_env.cli import explained
from vitprune_env.cli.flags import CommonFlags, read_flags
from vitprune_env.data import Digits


@dataclass(frozen=True)
class Args(CommonFlags):
    """How long to train the network."""

    output: Path = Path("runs/my_vit")
    """Folder for the saved model, which replaces one that is there."""
    steps: int = 300
    """Gradient steps; a good network takes some thousands."""


def my_vit() -> VisionTransformer:
    """A small ViT of one's own: 64 patches of 5 x 5 pixels, registers, no class token."""
    return VisionTransformer(
        img_size=40, patch_size=5, in_chans=3, num_classes=10, embed_dim=32, depth=6, num_heads=2, reg_tokens=2,
        class_token=False, global_pool="avg",
    )  # fmt: skip


register_backbone("my_vit", my_vit)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, prune, save, load, compare the answers."""
    args = read_flags(Args, argv, __doc__)
    args.prepare()
    torch.manual_seed(args.seed)
    backbone = load_backbone("my_vit", sites=(2, 4)).to(args.device)  # sites: where tokens are pruned by default

    optimizer = torch.optim.AdamW(backbone.parameters(), lr=1e-3)
    steps = 3 if args.quick else args.steps
    scenes = Digits("train", size=64 * steps, seed=args.seed)
    for step in trange(steps, desc="train"):
        images, labels = (part.to(args.device) for part in scenes.batch(range(64 * step, 64 * (step + 1))))
        loss = cross_entropy(backbone(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    budget = 0.5 * TokenGame(backbone).cost.dense() / 1e9  # GMACs per image
    policy = calibrate("tome", budget, backbone, Digits("train", size=64, seed=1))
    path = save_policy(policy, args.output / "my_vit.safetensors", backbone)  # policy and network in one file

    model, again = PrunedViT(backbone, policy).eval(), load_pruned(path, args.device)
    images, labels = (part.to(args.device) for part in Digits("validation", size=200).batch(range(200)))
    with torch.inference_mode():
        logits, same = model(images), again(images)
    accuracy = float((logits.argmax(dim=1) == labels).float().mean())
    print(f"{accuracy:.1%} correct at half the cost; loaded from {path}, the same logits: {torch.equal(logits, same)}")


if __name__ == "__main__":
    with explained(Args):
        main(sys.argv[1:])
