"""What a policy could reach that knows where the digit is: the built-in tasks, with oracles beside baselines.

    vitprune oracle --task twins                  # 20 % of the dense MACs
    vitprune oracle --target-share 0.25
    vitprune oracle --target-gmacs 0.008

An oracle keeps the tokens with the most ink of the digit after the first site, and all of them to the end. In `twins`
one looks for the smaller copy of the digit, one for the larger and one for both. No policy can know the ink; what the
oracles show is how much there is to win by choosing well, and in `twins` by choosing one copy together.
Prints a table, and writes table.md to the output folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vitprune_env.cli.flags import (
    TEST_SEED,
    TUNE_SEED,
    CommonFlags,
    ImageFlags,
    TargetFlags,
    TaskName,
    lowered,
    read_flags,
)

if TYPE_CHECKING:
    from vitprune_env.benchmarking.measurement import Row

BUDGET = TargetFlags(target_share=0.2)
METHODS = {"random": "random", "TopK": "topk", "EViT": "evit"}
COPIES = {"digits": {"oracle": None}, "twins": {"oracle, smaller": 0, "oracle, larger": 1, "oracle, both": None}}


@dataclass(frozen=True)
class Args:
    """What to compare, and on what."""

    task: TaskName = "twins"
    """Built-in task."""
    split: Literal["train", "validation", "test"] = "validation"
    """Which scenes."""
    images: int = 2000
    """How many scenes."""
    common: CommonFlags = field(default_factory=lambda: CommonFlags(output=Path("runs/oracle")))
    budget: TargetFlags = BUDGET


def rows_of(args: Args) -> list[Row]:
    """Dense network, baselines and oracles at the budget.

    Raises:
        BudgetError: for a budget that one of them cannot meet.
    """
    import torch

    from vitprune_env.baselines import calibrate
    from vitprune_env.benchmarking.contestants.oracle import ink_oracle
    from vitprune_env.benchmarking.images import as_batches
    from vitprune_env.benchmarking.measurement import measure
    from vitprune_env.data import TASKS, Digits
    from vitprune_env.policy import KeepAll

    common = args.common
    backbone = ImageFlags().network(common.seed, common.device)
    sites, budget = backbone.default_sites, args.budget.gmacs(backbone)
    tune = as_batches(Digits("train", 32, TUNE_SEED, TASKS[args.task]), 32, torch.device(common.device))
    scenes = Digits(args.split, args.images, TEST_SEED, TASKS[args.task])
    policies = {name: calibrate(method, budget, backbone, list(tune), sites=sites) for name, method in METHODS.items()}
    oracles = {name: ink_oracle(backbone, scenes, budget, copy) for name, copy in COPIES[args.task].items()}
    test = as_batches(scenes, 250, torch.device(common.device))
    named = {"dense": KeepAll(), **policies, **oracles}
    return [measure(name, backbone, policy, test, sites=sites) for name, policy in named.items()]


def main(argv: Sequence[str] | None = None) -> None:
    """Compare, and write the table."""
    args = read_flags(Args, argv, __doc__, prog="vitprune oracle")
    args = replace(args, budget=args.budget.one(BUDGET))
    args = lowered(args, images=50) if args.common.quick else args
    args.common.prepare()
    from vitprune_env.benchmarking.trained import comparison_table
    from vitprune_env.files import replace_file

    table = comparison_table(rows_of(args))
    replace_file(args.common.output / "table.md", (table + "\n").encode())
    print(f"{table}\n\ntable.md is in {args.common.output}/")
