"""Train the token-pruning policy (MAPPO, as in RL4EViT) and compare it with what it has to beat, at equal GMACs.

    python examples/train_mappo.py                        # 35 % of the dense model's MACs, a minute or two
    python examples/train_mappo.py --target-share 0.25    # a tighter budget
    python examples/train_mappo.py --algorithm ppo_single # one agent decides for all tokens of an image
    python examples/train_mappo.py --adaptive 0.2 0.6     # one policy for all budgets in between
    python examples/train_mappo.py --finetune after       # the network learns, too, from what the policy leaves
    python examples/train_mappo.py --preset rl4evit       # reward, network sizes and K of the paper
    python examples/train_mappo.py --preset rl4evit-deit-s --data-dir /data/imagenet      # see docs/imagenet.md
    python examples/train_mappo.py --resume               # goes on after Ctrl-C, a crash or a power cut, bit for bit
    torchrun --nproc-per-node 2 examples/train_mappo.py   # data-parallel; or: accelerate launch

Without image files: real handwritten digits on cluttered canvases, a small ViT that ships with the package, no
downloads. The output folder holds summary.json, table.md, figures, history.jsonl, TensorBoard logs, the checkpoint and
the policy, which `vitprune evaluate` reloads. `vitprune train` is the same as a command.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from vitprune_env.agents import launched, train
from vitprune_env.cli import explained
from vitprune_env.cli.train import Args, compare, open_task, parse, report, start_policy


def main(argv: Sequence[str] | None = None) -> None:
    """Train, over all processes that a launcher started; the first of them compares and reports."""
    began = time.perf_counter()
    args = parse(argv, description=__doc__)

    with launched(args.common.device) as (processes, device):
        args = args.on(device, processes.is_main)
        backbone = args.images.network(args.common.seed, device)  # any plain ViT of timm
        task = open_task(args, backbone)  # images to train on, to calibrate and to validate on, and to report on
        start = start_policy(args, backbone, task, processes.is_main)  # None: a new actor
        result = train(
            backbone,
            task.training,
            **args.settings.arguments,  # budget, learner, reward, run, finetune, sites
            actions=args.settings.actions,
            calibration=task.calibration,
            validation=task.validation,
            start=start,
            output=args.common.output,
            device=device,
            resume=args.common.resume,
            processes=processes,
        )
    if processes.is_main:
        comparison = compare(args, backbone, result, task, start)  # with what it has to beat, at equal GMACs
        report(args, comparison, time.perf_counter() - began)  # table, figures, summary.json


if __name__ == "__main__":
    with explained(Args):
        main(sys.argv[1:])
