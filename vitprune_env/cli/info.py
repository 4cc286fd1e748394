"""Show versions, the built-in network, all baselines, what a saved policy or a weight file is, or what papers print.

    vitprune info
    vitprune info --method evit
    vitprune info --published deit_small_patch16_224 --method evit
    vitprune info --checkpoint runs/mappo
    vitprune info --weights runs/finetune/backbone.safetensors

Without flags it shows versions, networks and baselines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from vitprune_env.cli.flags import read_flags


@dataclass(frozen=True)
class Args:
    """What to show; without any of these versions and lists of names."""

    method: str | None = None
    """A baseline, by its registry name."""
    checkpoint: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Output folder of a training run, or a policy file."""
    weights: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Weights of a network that this package wrote."""
    published: Annotated[str | None, tyro.conf.arg(metavar="NETWORK")] = None
    """What papers print of a network, by timm's name or theirs (DeiT-S), or of all networks; with --method of this
    method alone. Every row names paper and table."""


def overview() -> dict[str, Any]:
    """Versions, devices, and names to use elsewhere."""
    import torch

    from vitprune_env.agents import PRESETS
    from vitprune_env.baselines import available, describe
    from vitprune_env.benchmarking.presets import PUBLISHED
    from vitprune_env.benchmarking.store import versions

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        **versions(),
        "CPU threads": torch.get_num_threads(),
        "GPUs": ", ".join(gpus) or "none",
        "presets of train": ", ".join(PRESETS),
        "presets of evaluate, printed": ", ".join(name for name, preset in PUBLISHED.items() if preset.source),
        "presets of evaluate, printed nowhere": ", ".join(
            name for name, preset in PUBLISHED.items() if not preset.source
        ),
        **{f"baseline {name}": describe(name).summary for name in available()},
    }


def about_method(name: str) -> dict[str, Any]:
    """A baseline: what it does, where it comes from, its parameters."""
    from vitprune_env.baselines import describe

    method = describe(name)
    return {
        "summary": method.summary,
        "source": method.source,
        "budget set by": method.knob.name,
        "trained": "no" if method.recipe is None else "yes",
        **{f"parameter {key}": str(value) for key, value in method.parameters.items()},
    }


def about_policy(path: Path) -> dict[str, Any]:
    """A saved policy: its class, settings and origin."""
    from vitprune_env.deploy.descriptions import describe_policy
    from vitprune_env.deploy.policy_files import load_policy

    policy = load_policy(path / "policy.safetensors" if path.is_dir() else path)
    description = describe_policy(policy)
    settings = {name: value for name, value in description["config"].items() if name != "info"}
    return {"policy": description["name"], **settings, **getattr(policy, "info", {})}


def about_network(path: Path) -> dict[str, Any]:
    """A weight file: the architecture it is for, and the classes of its head.

    Raises:
        CheckpointError: for a file that does not say.
    """
    from vitprune_env.errors import CheckpointError
    from vitprune_env.models.load import about_weights

    found = about_weights(path)
    if not found:
        raise CheckpointError(f"checkpoint: expected a weight file of this package, which says what it is, got {path}")
    names = found.pop("class_names", None)
    return {**found, "class_names": "unknown" if names is None else ", ".join(names)}


def published(network: str, method: str | None) -> str:
    """A table of what papers print of a network, or of `all` networks.

    Raises:
        SettingsError: for a network or a method that no paper reports, or that none reports together.
    """
    from vitprune_env.benchmarking.published import published_rows, published_table
    from vitprune_env.errors import SettingsError

    rows = published_rows(None if network == "all" else network, method)
    if not rows:
        raise SettingsError(f"method: expected one that papers report on {network}, got {method!r}")
    return published_table(rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Collect and print."""
    args = read_flags(Args, argv, __doc__, prog="vitprune info")
    if args.published is not None:
        print(published(args.published, args.method))
        return
    found: dict[str, Any] = {}
    if args.method is not None:
        found |= about_method(args.method)
    if args.checkpoint is not None:
        found |= about_policy(args.checkpoint)
    if args.weights is not None:
        found |= about_network(args.weights)
    found = found or overview()
    width = max(map(len, found))
    for name, value in found.items():
        print(f"{name:<{width}}  {value}")
