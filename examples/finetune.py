"""Fine-tune a network for a policy that prunes it, and say what that gains: dense, pruned, pruned after fine-tuning.

    python examples/finetune.py                                   # EViT at 25 % of the dense MACs
    python examples/finetune.py --policy tome --target-share 0.35
    python examples/finetune.py --checkpoint runs/mappo           # a policy that train_mappo.py trained

The keep rate falls from 1 to its target over the first third, where the policy has one (`--no-schedule`: at once). The
policy stays as it is; blocks before the first site do, too. The output folder holds the fine-tuned weights
(backbone.safetensors, for `load_backbone(name, checkpoint=...)`), checkpoints, history and table.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated

import tyro

from common import CommonArgs, Row, batches_of, run, table
from train_mappo import TEST_SEED, TUNE_SEED
from vitprune_env import Backbone, KeepAll, Policy, TokenGame, evaluate, load_backbone
from vitprune_env.agents import CosineKeepRate, FinetuneConfig, finetune, load_policy
from vitprune_env.baselines import calibrate, describe
from vitprune_env.data import Digits
from vitprune_env.types import Site


@dataclass(frozen=True)
class Args(FinetuneConfig, CommonArgs):
    """What to fine-tune for, and how."""

    output: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("runs/finetune")
    """Folder for results; made if it does not exist."""
    policy: str = "evit"
    """A baseline, by its registry name."""
    checkpoint: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Output folder of train_mappo.py whose policy to use instead."""
    target_share: float = 0.25
    """Budget of the baseline, as a share of the dense MACs."""
    schedule: bool = True
    """Whether the keep rate falls from 1 to its target, for policies that have one."""
    split: str = "validation"
    """Held-out scenes to report on."""
    images: int = 2000
    """How many of them."""
    train_images: int = 4096
    """Scenes to train on."""

    @property
    def config(self) -> FinetuneConfig:
        """The settings of the training proper."""
        return FinetuneConfig(**{field.name: getattr(self, field.name) for field in fields(FinetuneConfig)})


def parse() -> Args:
    """Read the command line."""
    args = tyro.cli(Args, description=__doc__)
    small = {"steps": 5, "batch_size": 16, "cache_images": 32, "train_images": 64, "images": 100}
    return replace(args, **small) if args.quick else args


def pruner(args: Args, backbone: Backbone) -> tuple[Policy, Sequence[int | str | Site] | None]:
    """The policy and its sites; baselines that act at a few sites act at the network's own."""
    if args.checkpoint is not None:
        policy = load_policy(args.checkpoint / "policy.safetensors", args.device)
        return policy, policy.default_sites(backbone.depth)
    method = describe(args.policy)  # names the nearest ones for an unknown name
    sites = backbone.default_sites if method.knob.name == "keep_rate" else None
    gmacs = args.target_share * TokenGame(backbone).cost.dense() / 1e9
    tune = Digits("train", size=64, seed=TUNE_SEED)
    return calibrate(args.policy, gmacs, backbone, tune, sites=sites), sites


def main() -> None:
    """Calibrate, fine-tune, compare."""
    args = parse()
    args.prepare()
    backbone = load_backbone("vit_digits").to(args.device)
    policy, sites = pruner(args, backbone)
    keep_rate = getattr(policy, "keep_rate", None)
    schedule = CosineKeepRate(keep_rate) if args.schedule and keep_rate is not None else None
    data = Digits("train", size=args.train_images, seed=args.seed)
    held_out = batches_of(Digits(args.split, size=args.images, seed=TEST_SEED), 250, args.device)
    result = finetune(
        backbone, policy, data, schedule, args.config, sites=sites, output=args.output, device=args.device,
        resume=args.resume,
    )  # fmt: skip
    rows = []
    for name, network in (("", backbone), (", fine-tuned", result.backbone)):
        rows.append(Row.of(f"dense{name}", evaluate(TokenGame(network), KeepAll(), held_out)))
        game = TokenGame.for_policy(network, policy, **({} if sites is None else {"sites": sites}))
        rows.append(Row.of(f"{args.checkpoint or args.policy}{name}", evaluate(game, policy, held_out)))
    text = table(rows, dense_gmacs=rows[0].gmacs)
    (args.output / "table.md").write_text(text + "\n")
    print(f"\n{text}\n\ntable.md, history and backbone.safetensors are in {args.output}/")


if __name__ == "__main__":
    run(main)
