"""Train the token-pruning policy (MAPPO, RL4EViT) and compare it with what it has to beat, at equal GMACs.

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
the policy, which examples/evaluate.py reloads.
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.data import Dataset

from common import Batches, CommonArgs, Row, at_budget, batches_of, measure_speedup, run, table, versions, write_json
from image_task import ImageArgs, first_images, load_network, open_split
from presets import TRAINING
from training_flags import TrainingFlags
from vitprune_env import Backbone, KeepAll, Policy, TokenGame, evaluate, play
from vitprune_env.agents import (
    AdaptivePolicy,
    TokenActor,
    TokenPolicy,
    TrainResult,
    calibrate_threshold,
    launched,
    train,
)
from vitprune_env.baselines import EViT, RandomDrop
from vitprune_env.data import Digits, data_config
from vitprune_env.plots.figures import learning_curve_figure, tokens_figure

TUNE_SEED = 1_000_003  # scenes that baselines are calibrated on: training digits, other compositions
TEST_SEED = 2_000_003
LEARNERS = {"mappo": "MAPPO", "ppo_single": "single-agent PPO"}


@dataclass(frozen=True)
class Args(TrainingFlags, ImageArgs, CommonArgs):
    """Everything that a run depends on."""

    output: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("runs/mappo")
    """Folder for results; made if it does not exist."""
    preset: Literal["default", "rl4evit", "rl4evit-deit-s", "rl4evit-deit-b"] = "default"
    """Where the other settings start from; flags given beside it win."""
    split: str | None = None
    """Held-out images to report on; None: test of the built-in task, validation of image files."""
    test_images: int = 2000
    """Held-out images to report on."""
    batch_size: int = 250
    """Images per batch when reporting."""
    untrained_actors: int = 5
    """Untrained actors to average for the control row."""


def parse(argv: list[str]) -> Args:
    """Read the command line; `--preset` decides the defaults of all other flags."""
    names = [option.split("=", 1)[-1] for option in argv if option.startswith("--preset=")]
    names += [after for option, after in zip(argv, argv[1:], strict=False) if option == "--preset"]
    preset = TRAINING.get(names[-1] if names else "default", TRAINING["default"])
    default = Args(**vars(preset.config), model=preset.model, pretrained=preset.pretrained)
    args = tyro.cli(Args, args=argv, default=default, description=__doc__)
    if args.quick:
        small = {"updates": 4, "images": 32, "cache_images": 128, "calibration_images": 128, "checkpoint_every": 2}
        args = replace(args, **small, epochs=min(args.epochs, 2), test_images=200, untrained_actors=2)
        args = replace(args, finetune_every=min(args.finetune_every, 2), finetune_steps=min(args.finetune_steps, 4))
    return args


@dataclass(frozen=True)
class Task:
    """Images to train, to calibrate baselines and to report on."""

    training: Dataset[tuple[Tensor, int]]
    tune: list[tuple[Tensor, Tensor]]
    test: Batches


def built_in_task(args: Args) -> Task:
    """Scenes of digits; those of different purpose never coincide."""
    return Task(
        Digits("train", size=max(args.cache_images, args.calibration_images), seed=args.seed),
        batches_of(Digits("train", size=256, seed=TUNE_SEED), 256, args.device),
        batches_of(Digits(args.split or "test", size=args.test_images, seed=TEST_SEED), args.batch_size, args.device),
    )


def image_task(args: Args, backbone: Backbone) -> Task:
    """Image files: all of the training split, and at most `test_images` of the held-out one."""
    training = open_split(args, backbone, "train", None, args.seed)
    tune = open_split(args, backbone, "train", 256, TUNE_SEED)
    test = open_split(args, backbone, args.split or "validation", args.test_images, TEST_SEED)
    batch = args.batch_size
    return Task(training, batches_of(tune, batch, args.device), test.batches(batch, args.device))


def compare(args: Args, backbone: Backbone, result: TrainResult, task: Task) -> list[Row]:
    """Dense, random, untrained, EViT and the learnt policy at its measured GMACs, then `extras`."""
    policy = result.policy
    sites = backbone.default_sites if policy.sites is None else policy.sites
    game = TokenGame(backbone, sites)
    tune, test = task.tune, task.test
    learned = Row.of(LEARNERS[args.algorithm], evaluate(TokenGame(result.backbone, sites), policy, test))
    dense = Row.of("dense", evaluate(game, KeepAll(), test))
    budget = learned.gmacs
    few = [(images[:32], labels[:32]) for images, labels in tune]  # these two keep the same number in every image
    random, random_policy = at_budget("random", lambda rate: RandomDrop(rate, args.seed), budget, backbone, few, test)
    evit, evit_policy = at_budget("EViT", EViT, budget, backbone, few, test)
    prepared = [game.prepare(images) for images, _ in tune]
    untrained = []
    for index in range(args.untrained_actors):
        generator = torch.Generator().manual_seed(args.seed + index)
        actor = TokenActor(backbone.embed_dim, policy.actor.hidden, generator=generator).to(args.device)
        control = calibrate_threshold(game, TokenPolicy(actor), prepared, budget * 1e9)
        untrained.append(Row.of("untrained actor", evaluate(game, control, test)))
    control_row = Row.mean(f"untrained actor (mean of {len(untrained)})", untrained)
    images, _ = first_images(test, 16 if args.quick else min(args.batch_size, 128))
    pairs = 3 if args.quick else 9

    def timed(row: Row, policy: Policy) -> Row:
        own = sites if isinstance(policy, TokenPolicy) else backbone.default_sites
        return replace(row, speedup=measure_speedup(backbone, policy, images, pairs, own))

    return [
        replace(dense, speedup=1.0),
        timed(random, random_policy),
        control_row,
        timed(evit, evit_policy),
        timed(learned, policy),
        *extras(result, test),
    ]


def extras(result: TrainResult, test: Batches) -> list[Row]:
    """The fine-tuned network without pruning, and an adaptive policy at other budgets."""
    policy, backbone, rows = result.policy, result.backbone, []
    if policy.info.get("finetune", "off") != "off":
        rows.append(Row.of("fine-tuned, not pruned", evaluate(TokenGame(backbone), KeepAll(), test)))
    if isinstance(policy, AdaptivePolicy):
        others = [policy.at(share) for share in policy.shares]
        rows += [
            Row.of(
                f"the same at {100 * other.share:.0f} %", evaluate(TokenGame.for_policy(backbone, other), other, test)
            )
            for other in others
        ]
    return rows


def token_figure(backbone: Backbone, policy: Policy, batches: Batches) -> Figure:
    """Eight images and what is left of them after each site."""
    images, labels = first_images(batches, 8)
    game = TokenGame.for_policy(backbone, policy)
    episode = play(game, policy, images, labels)
    predicted = episode.outcome.logits.argmax(dim=1)
    captions = [f"{int(label)} read as {int(guess)}" for label, guess in zip(labels, predicted, strict=True)]
    sites = [site.label for site in game.sites]
    config = data_config(backbone)
    look = {"mean": config["mean"], "std": config["std"]}
    return tokens_figure(images, episode.keep, backbone.grid_size, sites, titles=captions, columns=2, **look)


def draw(args: Args, result: TrainResult, dense: Row, test: Batches) -> None:
    """The figures: what is pruned where on eight images, and how learning went."""
    token_figure(result.backbone, result.policy, test).savefig(args.output / "tokens.png", dpi=150)
    target = result.target_macs / (dense.gmacs * 1e9)
    updates, accuracy, share = ([row[name] for row in result.history] for name in ("update", "accuracy", "share"))
    curve = learning_curve_figure(updates, accuracy, share, references={"dense": dense.accuracy}, budget=target)
    curve.savefig(args.output / "learning_curve.png", dpi=150)


def summarise(args: Args, rows: list[Row], result: TrainResult, seconds: float) -> dict[str, object]:
    """What other programs read: summary.json."""
    dense, random, untrained, evit, learned, *_ = rows
    return {
        "dense_accuracy": dense.accuracy,
        "accuracy": learned.accuracy,
        "random_accuracy": random.accuracy,
        "untrained_accuracy": untrained.accuracy,
        "evit_accuracy": evit.accuracy,
        "dense_gmacs": dense.gmacs,
        "gmacs": learned.gmacs,
        "policy_gmacs": learned.policy_gmacs,
        "target_gmacs": result.target_macs / 1e9,
        "mac_ratio": learned.gmacs / dense.gmacs,
        "keep_per_site": learned.keep_per_site,
        "speedup": learned.speedup,
        "wall_seconds": seconds,
        "seed": args.seed,
        "versions": versions(),
        "rows": [asdict(row) for row in rows],
        "settings": {name: str(value) for name, value in vars(args).items()},
    }


def report(args: Args, backbone: Backbone, result: TrainResult, task: Task, start: float) -> None:
    """Compare with what has to be beaten, draw, and write it all down."""
    rows = compare(args, backbone, result, task)
    draw(args, result, rows[0], task.test)
    text = table(rows, dense_gmacs=rows[0].gmacs)
    (args.output / "table.md").write_text(text + "\n")
    seconds = time.perf_counter() - start
    write_json(args.output / "summary.json", summarise(args, rows, result, seconds))
    print(f"\n{text}\n\n{seconds:.0f} s; figures, logs, policy and summary.json are in {args.output}/")


def main() -> None:
    """Train, over all processes that a launcher started; the first of them compares and draws."""
    start = time.perf_counter()
    args = parse(sys.argv[1:])
    with launched(args.device) as (processes, device):
        args = replace(args, device=device)
        args.prepare(built_in=not args.reads_files)
        backbone = load_network(args, "vit_digits", args.seed, device)
        task = image_task(args, backbone) if args.reads_files else built_in_task(args)
        result = train(
            backbone,
            task.training,
            **args.config.arguments,
            output=args.output,
            device=device,
            resume=args.resume,
            processes=processes,
        )
    if processes.is_main:
        report(args, backbone, result, task, start)


if __name__ == "__main__":
    run(main)
