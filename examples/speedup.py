"""How much faster is the pruned model really? Dense and pruned side by side, in one process, in turn.

    python examples/speedup.py                                        # DeiT-S and DeiT-T with a scripted policy
    python examples/speedup.py --device cuda --dtypes fp32 bf16
    python examples/speedup.py --models vit_digits --checkpoint runs/mappo     # the trained policy
    python examples/speedup.py --quick

The ideal is what the MACs promise: dense MACs over the pruned model's, policy included. The scripted policy keeps 70,
49 and 34 % of the tokens after each quarter of the network, give or take a fifth from image to image; weights are
random, because time does not depend on them. Prints a table; writes speedup.json, speedup.csv and speedup.png.
"""

from __future__ import annotations

import csv
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from matplotlib.figure import Figure
from torch import Tensor

from common import CommonArgs, run, versions, write_json
from vitprune_env import Backbone, BasePolicy, Decision, Observation, Policy, PrunedViT, TokenGame, load_backbone, play
from vitprune_env.agents import load_policy
from vitprune_env.data import Digits

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Args(CommonArgs):
    """What to time, and how long."""

    output: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("runs/speedup")
    """Folder for results; made if it does not exist."""
    models: tuple[str, ...] = ("deit_small_patch16_224", "deit_tiny_patch16_224")
    """Names of plain timm ViTs, or vit_digits."""
    batch_sizes: tuple[int, ...] = (1, 8, 32, 256)
    """Images per batch."""
    dtypes: tuple[Literal["fp32", "bf16", "fp16"], ...] = ("fp32", "bf16")
    """Number formats of weights and images."""
    checkpoint: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Output folder of train_mappo.py, or a policy file; None: the scripted policy."""
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
    threads: int = 1
    """CPU threads of torch."""
    cpu_time: bool = False
    """Count the process's CPU time instead of the clock's: on a shared machine, with one thread, the fairer measure."""


@dataclass
class Scripted(BasePolicy):
    """Keeps given shares of the tokens; how many differs from image to image, which ones is of no importance."""

    keep: Sequence[float]
    spread: float
    seed: int = 0

    def reset(self, batch_size: int, num_agents: int) -> None:
        """Draw how much each image keeps."""
        noise = torch.randn(batch_size, generator=torch.Generator().manual_seed(self.seed))
        # Centred: a single image keeps exactly the mean, not what chance gave it.
        self.share = (1 + self.spread * (noise - noise.mean())).clamp(min=0)

    def decide(self, obs: Observation) -> Decision:
        """Keep as many tokens as the script says."""
        count = (self.share * self.keep[obs.step] * obs.num_agents).round().clamp(1, obs.num_agents)
        return Decision(keep=obs.alive & (obs.alive.cumsum(dim=1) <= count.to(obs.alive.device)[:, None]))


@dataclass(frozen=True)
class Timing:
    """One case."""

    model: str
    dtype: str
    batch: int
    dense_ms: float  # per batch, median
    pruned_ms: float
    dense_images_per_s: float
    pruned_images_per_s: float
    speedup: float  # median over pairs
    quartiles: tuple[float, float]  # of the speed-up
    ideal: float  # what the MACs promise
    pairs: int

    @property
    def share(self) -> float:
        """Speed-up reached, as a share of the ideal."""
        return self.speedup / self.ideal


def stopwatch(args: Args) -> Callable[[Callable[[], object]], float]:
    """What measures the seconds of a run, waiting for the device."""
    now = time.process_time if args.cpu_time else time.perf_counter

    def seconds(run: Callable[[], object]) -> float:
        if args.device.startswith("cuda"):
            torch.cuda.synchronize(args.device)
        start = now()
        run()
        if args.device.startswith("cuda"):
            torch.cuda.synchronize(args.device)
        return now() - start

    return seconds


@torch.inference_mode()
def compare(backbone: Backbone, policy: Policy, images: Tensor, dtype: str, args: Args) -> Timing:
    """Time dense and pruned model in turn on the same images."""
    model = PrunedViT(backbone, policy, execution=args.execution).eval()
    game = TokenGame.for_policy(backbone, policy, check=False)
    ideal = game.cost.dense() / float(play(game, policy, images).outcome.macs.mean())
    dense: Callable[[Tensor], Tensor] = backbone
    if args.compile:
        dense, model = torch.compile(backbone), model.compile_parts()
    seconds = stopwatch(args)

    def pair() -> tuple[float, float]:
        return seconds(lambda: dense(images)), seconds(lambda: model(images))

    warm_up = [sum(pair()) for _ in range(3)]
    pairs = max(3, min(args.pairs, int(args.seconds / warm_up[-1])))
    times = [pair() for _ in range(pairs)]
    ratios = [plain / pruned for plain, pruned in times]
    plain, pruned = (statistics.median(column) for column in zip(*times, strict=True))
    low, _, high = statistics.quantiles(ratios, n=4)
    batch = len(images)
    return Timing(
        model=backbone.name,
        dtype=dtype,
        batch=batch,
        dense_ms=1e3 * plain,
        pruned_ms=1e3 * pruned,
        dense_images_per_s=batch / plain,
        pruned_images_per_s=batch / pruned,
        speedup=statistics.median(ratios),
        quartiles=(low, high),
        ideal=ideal,
        pairs=pairs,
    )


def policy_for(args: Args, dtype: torch.dtype) -> Policy:
    """The trained policy, or the scripted one."""
    if args.checkpoint is None:
        return Scripted(args.keep, args.spread, args.seed)
    path = args.checkpoint / "policy.safetensors" if args.checkpoint.is_dir() else args.checkpoint
    return load_policy(path, device=args.device).to(dtype)


def images_for(backbone: Backbone, batch: int, args: Args) -> Tensor:
    """Scenes for the built-in model, whose policy looks at them; noise for any other."""
    if backbone.name == "vit_digits":
        return Digits("test", size=batch, seed=args.seed).batch(list(range(batch)))[0]
    generator = torch.Generator().manual_seed(args.seed)
    return torch.randn(batch, backbone.in_chans, *backbone.image_size, generator=generator)


def line(t: Timing) -> str:
    """One case as a row of the table."""
    return (
        f"| {t.model} | {t.dtype} | {t.batch} | {t.dense_ms:.1f} | {t.pruned_ms:.1f} | {t.dense_images_per_s:.1f} "
        f"| {t.pruned_images_per_s:.1f} | {t.speedup:.2f} ({t.quartiles[0]:.2f} to {t.quartiles[1]:.2f}) "
        f"| {t.ideal:.2f} | {t.share:.2f} |"
    )


def table(timings: Sequence[Timing]) -> str:
    """All cases as a markdown table."""
    lines = [
        "| model | dtype | batch | dense ms | pruned ms | dense images/s | pruned images/s | speed-up (quartiles) "
        "| ideal | share of ideal |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *map(line, timings)])


def figure(timings: Sequence[Timing], device: str) -> Figure:
    """Speed-up over batch size, one panel per model, with the ideal."""
    names = list(dict.fromkeys(t.model for t in timings))
    drawing = Figure(figsize=(4.2 * len(names), 3.4), layout="constrained")
    for axes, name in zip(drawing.subplots(1, len(names), squeeze=False, sharey=True)[0], names, strict=True):
        for dtype in dict.fromkeys(t.dtype for t in timings):
            rows = [t for t in timings if (t.model, t.dtype) == (name, dtype)]
            batches, speedups = [t.batch for t in rows], [t.speedup for t in rows]
            below = [t.speedup - t.quartiles[0] for t in rows]
            above = [t.quartiles[1] - t.speedup for t in rows]
            axes.errorbar(batches, speedups, yerr=[below, above], marker="o", capsize=3, label=dtype)
        first = [t for t in timings if t.model == name and t.dtype == timings[0].dtype]
        axes.plot([t.batch for t in first], [t.ideal for t in first], "k--", label="what the MACs promise")
        axes.axhline(1, color="0.7", linewidth=1)
        axes.set_xscale("log", base=2)
        ticks = [t.batch for t in first]
        axes.set_xticks(ticks, [str(batch) for batch in ticks])
        axes.set(title=name, xlabel="images per batch", ylim=(0, None))
    drawing.axes[0].set_ylabel(f"speed-up over the dense model ({device})")
    drawing.axes[-1].legend(loc="lower right")
    return drawing


def write(timings: Sequence[Timing], args: Args) -> None:
    """Numbers and figure."""
    rows = [{**asdict(t), "share": t.share} for t in timings]
    write_json(args.output / "speedup.json", {"timings": rows, "args": asdict(args), "versions": versions()})
    with (args.output / "speedup.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    figure(timings, args.device).savefig(args.output / "speedup.png", dpi=150)


def main() -> None:
    """Time every case, and write after each, so that an interrupted run leaves its results."""
    args = tyro.cli(Args, description=__doc__)
    if args.quick:
        args = replace(args, models=("vit_digits",), batch_sizes=(1, 8), pairs=3, seconds=1.0)
    torch.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)
    timings: list[Timing] = []
    for name in args.models:
        for dtype in args.dtypes:
            backbone = load_backbone(name).to(args.device, DTYPES[dtype])
            policy = policy_for(args, DTYPES[dtype])
            for batch in args.batch_sizes:
                images = images_for(backbone, batch, args).to(args.device, DTYPES[dtype])
                timings.append(compare(backbone, policy, images, dtype, args))
                write(timings, args)
                print(line(timings[-1]), flush=True)
    print(f"\n{table(timings)}\n\nresults and figure are in {args.output}/")


if __name__ == "__main__":
    run(main)
