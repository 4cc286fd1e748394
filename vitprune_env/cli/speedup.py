"""How much faster the pruned model really is: dense and pruned side by side, in one process, in turn.

    vitprune speedup                                        # DeiT-S and DeiT-T with a scripted policy
    vitprune speedup --device cuda --dtypes fp32 bf16
    vitprune speedup --models vit_digits --checkpoint runs/mappo     # the trained policy
    vitprune speedup --quick

The ideal is what the MACs promise: dense MACs over the pruned model's, policy included. The scripted policy keeps 70,
49 and 34 % of the tokens after each quarter of the network, give or take a fifth from image to image; weights are
random, because time does not depend on them. Prints a table; writes speedup.json, speedup.csv and speedup.png.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from vitprune_env.cli.flags import CommonFlags, TaskName, lowered, read_flags

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure
    from torch import Tensor

    from vitprune_env.benchmarking.speed import SpeedCase
    from vitprune_env.engine.backbone import Backbone
    from vitprune_env.policy import Policy


@dataclass(frozen=True)
class Args:
    """What to time, and how long."""

    models: tuple[str, ...] = ("deit_small_patch16_224", "deit_tiny_patch16_224")
    """Names of plain timm ViTs, or vit_digits."""
    batch_sizes: tuple[int, ...] = (1, 8, 32, 256)
    """Images per batch."""
    dtypes: tuple[Literal["fp32", "bf16", "fp16"], ...] = ("fp32", "bf16")
    """Number formats of weights and images."""
    task: TaskName = "digits"
    """Built-in task whose scenes vit_digits is timed on."""
    checkpoint: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Output folder of a training run, or a policy file; None: the scripted policy."""
    keep: tuple[float, ...] = (0.70, 0.49, 0.34)
    """What the scripted policy keeps of all tokens after each site, on average."""
    spread: float = 0.2
    """Standard deviation of its counts from image to image, as a share of their mean."""
    execution: str = "auto"
    """How ragged images attend, see PrunedViT."""
    compile: bool = False
    """Compile the dense model, and the parts of the pruned one around attention."""
    pairs: int = 31
    """Runs of each model per case, in turn."""
    seconds: float = 20.0
    """Fewer pairs, but at least three, where a case would take longer than this."""
    cpu_time: bool = False
    """Count the process's CPU time instead of the clock's: on a shared machine, with one thread, the fairer measure."""
    common: CommonFlags = field(default_factory=lambda: CommonFlags(output=Path("runs/speedup"), threads=1))


def policy_for(args: Args, dtype: torch.dtype) -> Policy:
    """The trained policy, or the scripted one."""
    from vitprune_env.benchmarking.speed import ScriptedCounts

    if args.checkpoint is None:
        return ScriptedCounts(args.keep, args.spread, args.common.seed)
    from vitprune_env.deploy.policy_files import load_policy

    path = args.checkpoint / "policy.safetensors" if args.checkpoint.is_dir() else args.checkpoint
    return load_policy(path, device=args.common.device).to(dtype)


def images_for(backbone: Backbone, batch: int, seed: int, task: TaskName) -> Tensor:
    """Scenes for the built-in model, whose policy looks at them; noise for any other."""
    import torch

    from vitprune_env.data import TASKS, Digits

    if backbone.name == "vit_digits":
        return Digits("test", batch, seed, TASKS[task]).batch(list(range(batch)))[0]
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, backbone.in_chans, *backbone.image_size, generator=generator)


def figure(cases: Sequence[SpeedCase], device: str) -> Figure:
    """Speed-up over batch size, one panel per model, with the ideal."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(case.model for case in cases))
    drawing = Figure(figsize=(4.2 * len(names), 3.4), layout="constrained")
    for axes, name in zip(drawing.subplots(1, len(names), squeeze=False, sharey=True)[0], names, strict=True):
        for dtype in dict.fromkeys(case.dtype for case in cases):
            rows = [case for case in cases if (case.model, case.dtype) == (name, dtype)]
            batches, speedups = [row.batch for row in rows], [row.speedup for row in rows]
            below = [row.speedup - row.quartiles[0] for row in rows]
            above = [row.quartiles[1] - row.speedup for row in rows]
            axes.errorbar(batches, speedups, yerr=[below, above], marker="o", capsize=3, label=dtype)
        first = [case for case in cases if case.model == name and case.dtype == cases[0].dtype]
        axes.plot([row.batch for row in first], [row.ideal for row in first], "k--", label="what the MACs promise")
        axes.axhline(1, color="0.7", linewidth=1)
        axes.set_xscale("log", base=2)
        ticks = [row.batch for row in first]
        axes.set_xticks(ticks, [str(batch) for batch in ticks])
        axes.set(title=name, xlabel="images per batch", ylim=(0, None))
    drawing.axes[0].set_ylabel(f"speed-up over the dense model ({device})")
    drawing.axes[-1].legend(loc="lower right")
    return drawing


def write(cases: Sequence[SpeedCase], args: Args) -> None:
    """Numbers and figure."""
    from vitprune_env.benchmarking.store import versions, write_json
    from vitprune_env.benchmarking.tables import comma_separated
    from vitprune_env.files import replace_file

    output = args.common.output
    rows = [{**asdict(case), "share": case.share} for case in cases]
    write_json(output / "speedup.json", {"timings": rows, "args": asdict(args), "versions": versions()})
    replace_file(output / "speedup.csv", comma_separated(rows).encode())
    figure(cases, args.common.device).savefig(output / "speedup.png", dpi=150)


def main(argv: Sequence[str] | None = None) -> None:
    """Time every case, and write after each, so that an interrupted run leaves its results."""
    args = read_flags(Args, argv, __doc__, prog="vitprune speedup")
    if args.common.quick:
        batch_sizes = tuple(dict.fromkeys(min(size, 8) for size in args.batch_sizes))
        args = lowered(replace(args, models=("vit_digits",), batch_sizes=batch_sizes), pairs=3, seconds=1.0)
    import torch

    from vitprune_env.benchmarking.speed import time_case
    from vitprune_env.benchmarking.tables import markdown
    from vitprune_env.models.load import load_backbone

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    common = args.common
    common.prepare()
    cases: list[SpeedCase] = []
    for name in args.models:
        for dtype in args.dtypes:
            backbone = load_backbone(name).to(common.device, dtypes[dtype])
            policy = policy_for(args, dtypes[dtype])
            for batch in args.batch_sizes:
                images = images_for(backbone, batch, common.seed, args.task).to(common.device, dtypes[dtype])
                cases.append(
                    time_case(
                        backbone,
                        policy,
                        images,
                        dtype,
                        execution=args.execution,
                        compiled=args.compile,
                        pairs=args.pairs,
                        limit=args.seconds,
                        cpu_time=args.cpu_time,
                    )
                )
                write(cases, args)
                print(markdown([cases[-1].cells()]).splitlines()[-1], flush=True)
    print(f"\n{markdown([case.cells() for case in cases])}\n\nresults and figure are in {common.output}/")
