"""Write a pruned model for use elsewhere: a folder that loads again, a torch program, or an ONNX file.

    vitprune export --checkpoint runs/mappo                       # folder: safetensors and JSON
    vitprune export --checkpoint runs/mappo --to program          # torch.export, one image at a time
    vitprune export --policy evit --keep-rate 0.5 --to onnx       # any batch size
    vitprune export --checkpoint runs/mappo --to onnx --int8      # and matrices of 8-bit integers, accuracy of both

`PrunedViT.from_pretrained(folder)` reads the folder, `torch.export.load(file)` the program. A learnt policy keeps as
many tokens as each image needs, so its graph takes one image at a time; methods that keep a fixed number of tokens take
any batch.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from vitprune_env.cli.evaluate import Args as EvaluateArgs
from vitprune_env.cli.evaluate import load
from vitprune_env.cli.flags import TEST_SEED, CommonFlags, ImageFlags, ResumableFlags, read_flags

if TYPE_CHECKING:
    from vitprune_env.deploy.pruned_vit import PrunedViT


@dataclass(frozen=True)
class Args:
    """What to write."""

    to: Literal["folder", "program", "onnx"] = "folder"
    """A folder for `PrunedViT.from_pretrained`, a program of torch.export, or an ONNX file (needs onnx, onnxscript)."""
    checkpoint: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("runs/mappo")
    """Output folder of a training run, or a policy file; used unless a policy is named."""
    policy: str | None = None
    """A baseline without training that has a keep rate (evit, topk, ...), or a policy of your own, FILE.py:NAME,
    instead of a checkpoint."""
    keep_rate: float | None = None
    """Fraction of the tokens that the named policy keeps at every site; None: 0.7."""
    max_batch: int | None = None
    """Largest batch that a graph must take; None: one image for learnt policies and your own, any number for
    the others."""
    int8: bool = False
    """Beside the ONNX file write one with matrices of 8-bit integers, and print accuracy and time of both."""
    images: int = 500
    """Held-out images that --int8 measures on."""
    common: CommonFlags = field(default_factory=lambda: CommonFlags(output=Path("runs/export")))
    source: ImageFlags = field(default_factory=ImageFlags)


def main(argv: Sequence[str] | None = None) -> None:
    """Load, prune, write."""
    args = read_flags(Args, argv, __doc__, prog="vitprune export")
    import torch

    from vitprune_env.benchmarking.contestants import is_own
    from vitprune_env.deploy.export import export_onnx, export_program
    from vitprune_env.deploy.pruned_vit import PrunedViT
    from vitprune_env.errors import SettingsError

    common = args.common
    if args.int8 and args.to != "onnx":
        raise SettingsError(f"to: expected onnx with --int8, got {args.to}")
    own = args.policy is not None and is_own(args.policy)
    if args.policy is not None and not own:
        check_fixed(args.policy)
    common.prepare()
    wanted = EvaluateArgs(
        args.checkpoint,
        args.policy,
        args.keep_rate,
        common=ResumableFlags(seed=common.seed, device=common.device),
        source=args.source,
    )
    policy, backbone = load(wanted)
    model = PrunedViT(backbone, policy).eval()
    max_batch = 1 if args.max_batch is None and (args.policy is None or own) else args.max_batch
    path = common.output
    if args.to == "folder":
        model.save_pretrained(path)
    elif args.to == "onnx":
        path = export_onnx(model, common.output / "model.onnx", max_batch)
    else:
        path = common.output / "model.pt2"
        torch.export.save(export_program(model, max_batch), path)
    print(f"the pruned model is in {path}")
    if args.int8:
        compare_int8(args, model, path, max_batch)


def check_fixed(name: str) -> None:
    """Refuse a baseline that needs more than a keep rate.

    Raises:
        SettingsError: for a method that is trained, or that has no keep rate.
    """
    from vitprune_env.baselines import parsed
    from vitprune_env.errors import SettingsError

    method, _ = parsed(name)
    if method.recipe is not None:
        hint = f"`vitprune evaluate --policy {name} --target-share 0.5` trains it, and --checkpoint reads what it wrote"
        raise SettingsError(f"policy: expected a baseline without training, got {name}; {hint}")
    if method.knob.name != "keep_rate":
        raise SettingsError(f"policy: expected a baseline with a keep rate, got {name}, which has {method.knob.name}")


def compare_int8(args: Args, model: PrunedViT, path: Path, max_batch: int | None) -> None:
    """Write the file with integers, and measure both on held-out images, one at a time and in turn."""
    from vitprune_env.deploy.onnx_files import OnnxModel, quantise_onnx

    target = quantise_onnx(path, path.with_name("model.int8.onnx"))
    count = 32 if args.common.quick else args.images
    split = args.source.held_out_split(None)
    images = args.source.batches(model.backbone, split, count, TEST_SEED, 1, args.common.device)
    sessions = {file.name: OnnxModel(file, max_batch) for file in (path, target)}
    correct = dict.fromkeys(sessions, 0)
    seconds: dict[str, list[float]] = {name: [] for name in sessions}
    for image, label in images:
        for name, session in sessions.items():
            start = time.perf_counter()
            logits = session(image.cpu())
            seconds[name].append(time.perf_counter() - start)
            correct[name] += int(logits.argmax(dim=1).eq(label.cpu()).sum())
    for file in (path, target):
        times = seconds[file.name]
        each, size = 1e3 * median(times), file.stat().st_size / 1e6
        share = correct[file.name] / len(times)
        print(f"{file.name}: {share:.1%} of {len(times)} images, {each:.2f} ms each (median), {size:.1f} MB")
