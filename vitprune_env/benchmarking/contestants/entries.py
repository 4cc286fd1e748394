"""From what the caller names to the lines of the table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from vitprune_env.baselines import available
from vitprune_env.baselines.registry import METHODS
from vitprune_env.benchmarking.contestants.methods import is_method, of_method
from vitprune_env.benchmarking.contestants.own_files import load_object
from vitprune_env.benchmarking.contestants.policies import as_it_is, of_factory, of_policy
from vitprune_env.benchmarking.contestants.task import Contestant
from vitprune_env.benchmarking.contestants.trained import POLICY_FILE, UNTRAINED, Trained, load, of_trained
from vitprune_env.benchmarking.images import digest
from vitprune_env.errors import CheckpointError, UnknownNameError
from vitprune_env.policy import KeepAll, Policy

Entry = str | Path | Policy | Callable[..., Policy]
Entries = Sequence[Entry] | Mapping[str, Entry | Sequence[Entry]]

DENSE = as_it_is("dense", "control", KeepAll)


def contestants_of(policies: Entries, controls: bool = True) -> list[Contestant]:
    """The lines of a comparison: controls first, then the policies as they were given.

    Args:
        policies: what to compare. In a sequence, or as values of a mapping from labels:

            - the name of a baseline, with parameters if it reads `name:parameter=value,...`,
            - a policy of one's own in a module, `package.module:NAME` or `FILE.py:NAME`,
            - a policy object,
            - a class or function that makes a policy, from a keep rate if it takes an argument,
            - the path of a saved policy, or of a run folder with one,
            - in a mapping, several trained policies: at each budget those play that were trained for the nearest one.
        controls: whether dropping at random, actors that never learned and trained methods before their training
            take part.

    Raises:
        UnknownNameError: for the name of no baseline.
        ParameterError: for a parameter that the baseline does not have.
        SettingsError: for a policy of one's own that cannot be imported.
        CheckpointError: for a saved policy that cannot be read, or has a fine-tuned network of its own.
        ValueError: for two lines with the same label.
        TypeError: for what is no policy.
    """
    if isinstance(policies, str | Path | Policy):
        policies = [policies]
    named = policies.items() if isinstance(policies, Mapping) else ((_label(entry), entry) for entry in policies)
    found = [contestant for label, entry in named for contestant in _entered(label, entry)]
    names = [contestant.name for contestant in found]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"policies: expected different labels, got {name!r} twice; a mapping gives labels")
    if not controls:
        return [contestant for contestant in found if contestant.group != "control" or contestant.name == "random"]
    if "random" not in names:
        found = [*of_method("random", "random"), *found]
    found.sort(key=lambda contestant: (contestant.group != "control", contestant.name != "random"))
    return [found[0], UNTRAINED, *found[1:]]


def _label(entry: Any) -> str:
    """The name of a line for which none was given."""
    if isinstance(entry, str) and is_method(entry):
        return entry
    if _names_object(entry):
        return str(entry).rpartition(":")[2]
    if isinstance(entry, str | Path):
        path = Path(entry)
        return path.parent.name if path.name == POLICY_FILE else path.stem or str(path)
    return entry.__name__ if callable(entry) and hasattr(entry, "__name__") else type(entry).__name__


def _names_object(entry: Any) -> bool:
    """Whether an entry reads `package.module:NAME`, and is neither a baseline with parameters nor a path."""
    if not isinstance(entry, str) or is_method(entry) or Path(entry).exists():
        return False
    place, _, name = entry.rpartition(":")
    return (
        bool(place) and name.isidentifier() and (place.endswith(".py") or "." in place or find_spec(place) is not None)
    )


def _entered(label: str, entry: Any) -> Iterable[Contestant]:
    """The lines of one entry: one, or two for a method that is compared with its untrained self."""
    if isinstance(entry, str) and is_method(entry):
        return of_method(label, entry)
    if _names_object(entry):
        entry = load_object(entry)
    if isinstance(entry, str | Path):
        path = Path(entry)
        if isinstance(entry, str) and not path.exists() and len(path.parts) == 1 and not path.suffix:
            raise UnknownNameError("baseline", entry.partition(":")[0], available())
        return [_of_files(label, [path])]
    if isinstance(entry, type):
        method = next((method for method in METHODS if method.make is entry), None)
        return [of_factory(label, cast(Any, entry))] if method is None else of_method(label, method.name)
    if isinstance(entry, Policy):
        return [of_policy(label, entry)]
    if isinstance(entry, Sequence):
        if all(isinstance(each, str | Path) for each in entry):
            return [_of_files(label, list(map(Path, entry)))]
        if entry and all(isinstance(each, Trained) for each in entry):
            return [of_trained(label, entry)]
    if isinstance(entry, nn.Module):
        raise TypeError(
            f"policies: expected a policy, got the module {type(entry).__name__} as {label!r}; a network from token "
            "features to logits becomes one by vitprune_env.agents.ModulePolicy(network, embed_dim)"
        )
    if callable(entry) and not isinstance(entry, Sequence):
        return [of_factory(label, cast(Any, entry))]
    raise TypeError(
        f"policies: expected names of baselines, policies, functions that make one, or paths of saved ones, "
        f"got {entry!r} as {label!r}"
    )


def _of_files(label: str, paths: Sequence[Path]) -> Contestant:
    """Saved policies; a folder stands for the policy in it."""
    files = [path / POLICY_FILE if path.is_dir() else path for path in paths]
    policies = [load(file) for file in files]
    origin = digest(*(torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.uint8) for file in files))
    if len(policies) == 1:
        return of_policy(label, policies[0], origin)
    for file, policy in zip(files, policies, strict=True):
        if not isinstance(policy, Trained):
            raise CheckpointError(
                f"{file}: expected a trained policy, as {label!r} has several; got {type(policy).__name__}"
            )
    return of_trained(label, cast(Any, policies), origin)
