"""Open what the flags of `vitprune play` name: saved policies, network, images, and the session of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch

from vitprune_env.benchmarking.contestants import Task, contestants_of, is_own, label_of, load_object
from vitprune_env.benchmarking.images import as_batches
from vitprune_env.benchmarking.prepared import PreparedImages
from vitprune_env.cli.flags import TEST_SEED, TUNE_SEED
from vitprune_env.cli.play.command import Args
from vitprune_env.data import Digits, RandomViews
from vitprune_env.deploy.policy_files import load_policy
from vitprune_env.engine.backbone import Backbone
from vitprune_env.errors import SettingsError
from vitprune_env.playground.pictures import from_batches
from vitprune_env.playground.session import Session
from vitprune_env.policy import Policy

USUAL = Path("runs/mappo")  # takes part if it is there
POLICY_FILE = "policy.safetensors"  # of a run folder
SCENES = 200  # of the built-in task, among which pictures of all classes are looked for
BUILT_IN = {"tune_images": 64, "timed_images": 16}
FILES = {"tune_images": 16, "timed_images": 1}


def trained_of(args: Args) -> dict[str, Policy]:
    """The saved policies of the flags by their names on the page.

    Raises:
        CheckpointError: for a file that cannot be read.
        SettingsError: for two of one name.
    """
    found: dict[str, Policy] = {}
    for path in args.checkpoint or (USUAL,) * (USUAL / POLICY_FILE).exists():
        file = path / POLICY_FILE if path.is_dir() else path
        name = file.parent.name if file.name == POLICY_FILE else file.stem
        if name in found:
            raise SettingsError(f"checkpoint: expected different names of folders or files, got {name!r} twice")
        found[name] = load_policy(file, device=args.machine.device)
    return found


def network_of(args: Args, trained: Mapping[str, Policy]) -> Backbone:
    """The network of the flags, or else that of the trained policies.

    Raises:
        SettingsError: for policies that were trained on another one.
    """
    infos = {name: getattr(policy, "info", {}) for name, policy in trained.items()}
    tuned = [name for name, info in infos.items() if info.get("finetune", "off") != "off"]
    source = args.source
    if tuned and source.weights is None:
        if len(trained) > 1:
            raise SettingsError(f"checkpoint: expected {tuned[0]} alone, as it has a fine-tuned network of its own")
        folder = args.checkpoint[0] if args.checkpoint else USUAL
        folder = folder if folder.is_dir() else folder.parent
        source = replace(source, weights=folder / "backbone.safetensors")  # the run wrote it beside the policy
    default = next((info["backbone"] for info in infos.values() if "backbone" in info), "vit_digits")
    backbone = source.network(args.seed, args.machine.device, default)
    for name, policy in trained.items():
        if (width := getattr(policy, "width", backbone.embed_dim)) != backbone.embed_dim:
            raise SettingsError(
                f"model: {name} was trained on {infos[name].get('backbone')} (width {width}), "
                f"{backbone.name} has width {backbone.embed_dim}"
            )
    return backbone


def session_of(args: Args) -> Session:
    """Open network, images and policies.

    Raises:
        CheckpointError: for a policy file that cannot be read.
        SettingsError: for policies that do not fit the network, need training or share a name, or no images.
        UnknownNameError: for the name of no baseline.
    """
    usual = FILES if args.source.reads_files else BUILT_IN
    args = replace(args, **{name: count for name, count in usual.items() if getattr(args, name) is None})
    for name in ("images", *usual):
        if (count := getattr(args, name)) < 1:
            raise SettingsError(f"{name}: expected 1 or more, got {count}")
    trained = trained_of(args)
    entries = {**trained, **{label_of(text): load_object(text) if is_own(text) else text for text in args.policy}}
    if len(entries) < len(trained) + len(args.policy):
        raise SettingsError(f"policy: expected different names, got {[*trained, *map(label_of, args.policy)]}")
    contestants = contestants_of(entries, controls=False)
    backbone = network_of(args, trained)
    tune, test = args.source.open_apart(
        backbone,
        ("train", args.tune_images, TUNE_SEED),
        (args.source.held_out_split(None), None if args.source.reads_files else SCENES, TEST_SEED),
    )
    views = tune if isinstance(tune, Digits) else RandomViews(tune, count=1, seed=TUNE_SEED)
    device = torch.device(args.machine.device)
    held_out = as_batches(test, args.images, device)
    pictures, names = from_batches(backbone, held_out, args.images), getattr(held_out, "class_names", None)
    images = PreparedImages(backbone, list(as_batches(views, cast(int, args.tune_images), device)))
    task = Task(backbone, images, images, seed=args.seed, seeds=1)
    return Session(task, pictures, contestants, cast(int, args.timed_images), class_names=names)
