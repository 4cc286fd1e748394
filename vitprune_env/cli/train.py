"""Train a token policy for a budget, and compare it with what it has to beat, at equal GMACs.

    vitprune train                            # 35 % of the dense model's MACs, a minute or two on one CPU core
    vitprune train --target-share 0.25        # a tighter budget
    vitprune train --algorithm ppo_single     # one agent decides for all tokens of an image
    vitprune train --adaptive 0.2 0.6         # one policy for all budgets in between
    vitprune train --preset merge             # merging in every block, for photographs
    vitprune train --finetune after           # the network learns, too, from what the policy leaves
    vitprune train --updates 400 --patience 4 # until the policy no longer improves on held-out scenes
    vitprune train --preset rl4evit           # reward, network sizes and K of RL4EViT, corrected where it has to be
    vitprune train --preset rl4evit-printed   # RL4EViT to the letter: prunes nearly everything
    vitprune train --resume                   # goes on after Ctrl-C, a crash or a power cut, to the same bits
    vitprune train --data-dir DIR --model vit_small_patch14_dinov2 --weights FILE --updates 150 --images 64

The threshold is set on random crops of training images, where these are files: the network knows them by heart.
Training is watched on images that are neither learnt from nor reported on (--validate-every).
The output folder holds summary.json, table.md, figures, history.jsonl, TensorBoard logs, the checkpoint and the policy.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar, cast

import torch
from torch import Tensor

from vitprune_env.agents import (
    PRESETS,
    Cloning,
    Distillation,
    MergePolicy,
    PairActor,
    PGPEConfig,
    Preset,
    Processes,
    TokenPolicy,
    TrainResult,
    calibrate_threshold,
    cloned_policy,
    distilled_policy,
    launched,
    load_policy,
    save_policy,
    train,
)
from vitprune_env.agents.budgets.targets import PolicyCost
from vitprune_env.agents.runs.settings import Settings
from vitprune_env.benchmarking.contestants import Fits, of_method
from vitprune_env.benchmarking.contestants import Task as Comparison
from vitprune_env.benchmarking.images import Batches, as_batches, some_images
from vitprune_env.benchmarking.measurement import Timing
from vitprune_env.benchmarking.prepared import PreparedImages
from vitprune_env.benchmarking.store import write_json
from vitprune_env.benchmarking.trained import WAY_OUT, TrainingReport, compare_trained
from vitprune_env.cli.flags import (
    TEST_SEED,
    TUNE_SEED,
    VALIDATION_SEED,
    ImageFlags,
    ResumableFlags,
    lowered,
    read_flags,
)
from vitprune_env.cli.flags.training import TrainingFlags
from vitprune_env.data import Digits, ImageFiles, RandomViews, fetch
from vitprune_env.engine.backbone import Backbone
from vitprune_env.engine.kernels import autocast, multiplies_bf16
from vitprune_env.envs.actions import action_kind
from vitprune_env.errors import SettingsError
from vitprune_env.game.token_game import TokenGame

TUNE_IMAGES = 256
FIT_FILES, FIT_STEPS = 256, 200  # image files and steps of the rival that is fitted: less than a minute on two cores
START_FILE = "start.safetensors"  # the policy that training started from, for a run that is resumed
LEARNERS = {"mappo": "MAPPO", "ppo_single": "single-agent PPO", "pgpe": "learnt merging (PGPE)"}


@dataclass(frozen=True)
class ViewFlags:
    """What is shown of the images to learn from."""

    views: int = 0
    """Random crops of every image file to learn from; 0: the images as they are evaluated."""
    smallest_view: float = 0.35
    """Smallest part of an image's area that a crop shows, in learning and where the threshold is set."""

    def learnt(self, files: ImageFiles, seed: int) -> ImageFiles | RandomViews:
        """The files as the policy sees them while it learns."""
        return RandomViews(files, self.views, (self.smallest_view, 1.0), seed=seed) if self.views else files

    def calibrated(self, files: ImageFiles) -> RandomViews:
        """One crop of every file, to set thresholds and keep rates on."""
        return RandomViews(files, 1, (self.smallest_view, 1.0), seed=TUNE_SEED)


@dataclass(frozen=True)
class Args:
    """Train a token policy for a budget."""

    preset: Literal["default", "merge", "rl4evit", "rl4evit-printed", "rl4evit-deit-s", "rl4evit-deit-b"] = "default"
    """Where the other settings start from; flags given beside it win."""
    split: str | None = None
    """Held-out images to report on; None: test of the built-in task, validation of image files."""
    test_images: int = 2000
    """How many held-out images to report on."""
    batch_size: int = 250
    """Images per batch when reporting."""
    untrained_actors: int = 5
    """Untrained actors to average for the control row."""
    common: ResumableFlags = field(default_factory=lambda: ResumableFlags(output=Path("runs/mappo")))
    training: TrainingFlags = field(default_factory=TrainingFlags)
    shown: ViewFlags = field(default_factory=ViewFlags)
    images: ImageFlags = field(default_factory=ImageFlags)
    results: ClassVar[tuple[str, ...]] = ("summary.json", "policy.safetensors", "training.safetensors")
    validate_scenes_every: ClassVar[int] = 10  # default of --validate-every on the built-in task; else 0: it takes long

    @property
    def settings(self) -> Preset:
        """The settings of the training proper."""
        return self.training.settings(PRESETS[self.preset], self.common.seed)

    @property
    def run_name(self) -> str:
        """What is trained, on what and for what, as far as it is not the default."""
        training, images, preset = self.training, self.images, self.preset
        budget, tuned, sites = training.budget, training.finetune.finetune, training.reward.sites
        targets = (budget.target_share, budget.target_gmacs, budget.target_keep, *budget.adaptive)
        parts = [
            preset if preset != "default" else "",
            training.algorithm,
            images.task if images.task != "digits" else "",
            images.data_dir.name if images.data_dir is not None else images.dataset,
            *(f"{target:g}" for target in targets if target is not None),
            *(sites if sites != TrainingFlags.of(PRESETS[preset]).reward.sites else ()),
            f"finetune_{tuned}" if tuned != "off" else "",
            f"seed_{self.common.seed}" if self.common.seed else "",
        ]
        return "-".join(filter(None, parts))

    def on(self, device: str, is_main: bool) -> Self:
        """The same on the device of this process, with the output folder made and the number of threads set.

        Process 0 alone looks for another run in the folder: the others may come when its own files are already there.
        """
        common = replace(self.common, device=device)
        common.prepare(not self.images.reads_files, self.results if is_main else ())
        if self.training.run.amp and not multiplies_bf16(device):
            print("note: this processor has no units for bfloat16, which makes --amp slower than single precision")
        return replace(self, common=common)


@dataclass(frozen=True)
class Task:
    """Images to train on, to calibrate baselines on and to report on."""

    training: Digits | ImageFiles | RandomViews
    calibration: RandomViews | None  # to set the policy's threshold on; None: the training images
    validation: Digits | RandomViews | None  # to watch training on; None: it is not watched
    tune: list[tuple[Tensor, Tensor]]
    test: Batches

    def to_fit(self, args: Args) -> tuple[Any, Fits]:
        """Training images for a baseline that is fitted, and how long it is; of image files a few."""
        if args.images.reads_files:
            return some_images(cast(Any, self.training), FIT_FILES), Fits(steps=FIT_STEPS, quick=args.common.quick)
        return self.training, Fits(quick=args.common.quick)


A = TypeVar("A", bound=Args)


def parse(
    argv: Sequence[str] | None,
    prog: str | None = None,
    description: str | None = __doc__,
    start: A = Args(),
) -> A:
    """Read the command line; `--preset` decides the defaults of all other flags.

    Args:
        argv: command line; None: that of the process.
        prog: name of the command; None: that of the process.
        description: shown above the flags by `--help`.
        start: the flags of the command, and the defaults of those that no preset decides.
    """
    args = read_flags(type(start), argv, description, prog, partial(_defaults, start))
    _ = args.settings  # refuses their values before time is spent
    return _small(args) if args.common.quick else args


def _defaults(start: A, words: Sequence[str]) -> A:
    """The flags of a command that are not given; its preset decides most of them."""
    names = [word.split("=", 1)[-1] for word in words if word.startswith("--preset=")]
    names += [after for word, after in zip(words, words[1:], strict=False) if word == "--preset"]
    usual = "merge" if "pgpe" in words or "--algorithm=pgpe" in words else "default"
    preset = PRESETS.get(names[-1] if names else usual, PRESETS[usual])
    network = ImageFlags(model=preset.model, pretrained=preset.pretrained)
    training, given = TrainingFlags.of(preset), {word.split("=")[0].replace("_", "-") for word in words}
    if not given & {"--data-dir", "--dataset"}:
        training = replace(training, run=replace(training.run, validate_every=start.validate_scenes_every))
    return replace(start, training=training, images=network)


def _small(args: A) -> A:
    """The same run in miniature."""
    training = args.training
    small = {"updates": 4, "images": 32, "cache_images": 128, "calibration_images": 64, "checkpoint_every": 2}
    small |= {"validate_every": 2, "validation_images": 64}
    finetune = lowered(training.finetune, finetune_every=2, finetune_steps=4)
    training = replace(
        training,
        run=lowered(training.run, **small),
        learner=lowered(training.learner, epochs=2),
        finetune=finetune,
    )
    return lowered(replace(args, training=training), test_images=100, untrained_actors=1)


def open_task(args: Args, backbone: Backbone) -> Task:
    """The images of the flags; none to report on is learnt from, calibrated on or validated on.

    Training is watched on a part of the training files, as random crops, since the network knows the files by heart; on
    the built-in task on scenes with digits of the validation split, or of training if validation is reported on.
    """
    images, common, run = args.images, args.common, args.training.run
    tuned, split, watched = 32 if common.quick else TUNE_IMAGES, images.held_out_split(args.split), run.validate_every
    if images.reads_files:
        parts = [(split, args.test_images, TEST_SEED), ("train", None, common.seed)]
        if watched:
            parts.insert(1, ("train", run.validation_images, VALIDATION_SEED))
        held_out, *apart, files = (cast(ImageFiles, part) for part in images.open_apart(backbone, *parts))
        training, calibration = args.shown.learnt(files, common.seed), args.shown.calibrated(files)
        validation = args.shown.calibrated(apart[0]) if watched else None
        tune = calibration
    else:
        if args.shown.views:
            raise SettingsError(f"views: expected image files to crop, got {args.shown.views} of the built-in task")
        held_out = images.open(backbone, split, args.test_images, TEST_SEED)
        size = max(run.cache_images, run.calibration_images)
        training, calibration = cast(Digits, images.open(backbone, "train", size, common.seed)), None
        unseen = "train" if split == "validation" else "validation"
        scenes = images.open(backbone, unseen, run.validation_images, VALIDATION_SEED) if watched else None
        validation = cast(Digits | None, scenes)
        tune = images.open(backbone, "train", tuned, TUNE_SEED)
    test = as_batches(held_out, args.batch_size, torch.device(common.device))
    return Task(training, calibration, validation, _some(tune, tuned, common.device), test)


def _some(images: Digits | ImageFiles | RandomViews, count: int, device: str) -> list[tuple[Tensor, Tensor]]:
    """That many images, evenly spread over all, as one batch."""
    rows = [index * len(images) // count for index in range(min(count, len(images)))]
    batch, labels = fetch(images, rows)
    return [(batch.to(device), labels.to(device))]


def start_policy(args: Args, backbone: Backbone, task: Task, is_main: bool) -> TokenPolicy | MergePolicy | None:
    """The policy that training starts from; None: a new one. One that has to be made is kept in the output folder.

    Raises:
        BudgetError: for a budget that the policy cannot meet.
        SettingsError: for a file with a policy that cannot be trained.
        ValueError: for settings that do not fit, before time is spent on making a policy.
    """
    settings, wanted = args.settings, args.settings.init_from
    merges = isinstance(settings.learner, PGPEConfig)
    made = ("distilled",) if merges else ("evit", "distilled")
    if wanted == "new" and not merges:
        return None
    if wanted not in made:
        policy = None if wanted in ("new", "evit") else load_policy(wanted, args.common.device)
        kind = MergePolicy if merges else TokenPolicy
        if not isinstance(policy, kind):
            got = wanted if policy is None else f"a {type(policy).__name__}"
            raise SettingsError(f"init_from: expected a {kind.__name__} with {args.training.algorithm}, got {got}")
        if isinstance(policy, MergePolicy) and policy.width == backbone.embed_dim:
            _check_budget(args, backbone, task, policy)
        return policy
    kept = args.common.output / START_FILE
    if args.common.resume and kept.exists():
        return cast(Any, load_policy(kept, args.common.device))
    _check_settings(
        settings, MergePolicy(PairActor(1, backbone.embed_dim)) if merges else _untaught(settings, backbone)
    )
    start = _distilled(args, backbone, task, is_main) if merges else _cloned(args, backbone, task, is_main)
    if is_main:
        save_policy(start, kept)
    return start


def _untaught(settings: Preset, backbone: Backbone) -> TokenPolicy:
    """An actor that has learnt nothing, of the shape that the settings ask for."""
    kind = action_kind(settings.actions, "actions")
    count = kind.count(backbone.num_patches)
    actor = settings.learner.networks.actor(backbone.embed_dim, count, torch.Generator())
    return TokenPolicy(actor, actions=kind)


def _check_settings(settings: Preset, start: TokenPolicy | MergePolicy) -> None:
    """Refuse settings that do not fit together, or not a policy like this to start from."""
    given = {**settings.arguments, "reward": settings.reward or settings.learner.default_reward()}
    Settings(**given, actions=action_kind(settings.actions, "actions"), start=start).check(Processes())


def _target(args: Args, game: TokenGame, macs_per_token: int = 0) -> float:
    """The budget of the flags in MACs, for a policy that spends so much on every token that it looks at."""
    settings = args.settings
    assert settings.budget is not None
    cost = PolicyCost(game.cost, game.sites, macs_per_token)
    return settings.budget.target(cost, settings.reward or settings.learner.default_reward())


def _check_budget(args: Args, backbone: Backbone, task: Task, policy: MergePolicy) -> None:
    """Refuse a budget that merging cannot meet; how much can merge does not depend on the image."""
    places = {} if args.settings.sites is None else {"sites": args.settings.sites}
    game = TokenGame.for_policy(backbone, policy, **places)
    image = fetch(task.training, [0])[0].to(args.common.device)
    with torch.inference_mode():
        calibrate_threshold(game, policy, [image], _target(args, game))


def _distilled(args: Args, backbone: Backbone, task: Task, progress: bool) -> MergePolicy:
    """A merging policy that is read off the network's late attention."""
    game = TokenGame(backbone, args.settings.sites)
    return distilled_policy(
        backbone,
        task.training,
        _target(args, game) / game.cost.dense(),
        sites=args.settings.sites,
        settings=Distillation(images=64, schedule_images=32) if args.common.quick else Distillation(),
        seed=args.common.seed,
        progress=progress,
    )


def _cloned(args: Args, backbone: Backbone, task: Task, progress: bool) -> TokenPolicy:
    """An actor that imitates a baseline at the budget: EViT's choice of tokens, or scores distilled from attention.

    Where the actions have another way out than being dropped, the baseline's tokens leave by it, too.
    """
    settings, common = args.settings, args.common
    untaught, game = _untaught(settings, backbone), TokenGame(backbone, settings.sites)
    target = min(_target(args, game, untaught.actor.macs_per_token), game.cost.dense())
    images, fits = task.to_fit(args)
    tune = PreparedImages(backbone, task.tune)
    at = Comparison(backbone, tune, tune, images, sites=game.sites, seed=common.seed, fits=fits, progress=progress)
    name = {"evit": "tri_level", "distilled": "distilled_attention"}[settings.init_from]
    leave = WAY_OUT.get(untaught.actions.name, "drop")
    (teacher,) = of_method(name, f"{name}:leave={leave}")[0].at(at, target / 1e9)
    return cloned_policy(
        backbone,
        images,
        teacher,
        target / game.cost.dense(),
        sites=game.sites,
        actions=untaught.actions,
        networks=settings.learner.networks,
        settings=Cloning(images=64, steps=20) if common.quick else Cloning(),
        seed=common.seed,
        progress=progress,
    )


def compare(
    args: Args, backbone: Backbone, result: TrainResult, task: Task, start: TokenPolicy | MergePolicy | None = None
) -> TrainingReport:
    """The trained policy beside what it has to beat, at its measured GMACs and in the precision of training."""
    fit, fits = task.to_fit(args)
    with autocast(args.common.device, "bf16" if args.training.run.amp else "off"):
        return compare_trained(
            result,
            backbone,
            task.tune,
            task.test,
            fit=fit,
            fits=fits,
            name=LEARNERS[args.training.algorithm],
            seed=args.common.seed,
            untrained_actors=args.untrained_actors,
            start=start if isinstance(start, MergePolicy) else None,
            timing=Timing(3, 16) if args.common.quick else Timing(9, min(args.batch_size, 128)),
            progress=True,
        )


def report(args: Args, comparison: TrainingReport, seconds: float) -> None:
    """Write and print the comparison."""
    output = args.common.output
    comparison.save(output)
    settings = {name: str(value) for name, value in {**vars(args.settings), **vars(args.images)}.items()}
    stopped = comparison.result.stopped
    about = {"stopped": stopped, "wall_seconds": seconds, "seed": args.common.seed, "settings": settings}
    write_json(output / "summary.json", {**comparison.summary(), **about})
    ended = "" if stopped is None else f"training ended {stopped}\n"
    print(f"\n{comparison.table()}\n\n{ended}{seconds:.0f} s; figures, logs, policy and summary.json are in {output}/")


def main(argv: Sequence[str] | None = None) -> None:
    """Train, over all processes that a launcher started; the first of them compares and reports."""
    began = time.perf_counter()
    args = parse(argv, prog="vitprune train")
    with launched(args.common.device) as (processes, device):
        args = args.on(device, processes.is_main)
        backbone = args.images.network(args.common.seed, device)
        task = open_task(args, backbone)
        start = start_policy(args, backbone, task, processes.is_main)
        result = train(
            backbone,
            task.training,
            **args.settings.arguments,
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
        report(args, compare(args, backbone, result, task, start), time.perf_counter() - began)
