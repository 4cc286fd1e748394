"""Settings of short training runs, and how tests change single ones of them by name."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from vitprune_env.agents import LightNetworks, MAPPOConfig, Preset, RunConfig, Share

TINY = Preset(
    budget=Share(0.5, anneal_from=0.7),
    learner=MAPPOConfig(minibatch=256, networks=LightNetworks(actor_hidden=(8,), critic_hidden=(16,))),
    run=RunConfig(updates=6, images=16, cache_images=48, calibration_images=48, checkpoint_every=2),
    sites=("1", "2", "3"),
)


def but(config: Preset, **changes: Any) -> Preset:
    """The same settings, but for some: each goes to the part that has a field of this name."""
    for name, value in changes.items():
        if name in {field.name for field in fields(config)}:
            config = replace(config, **{name: value})
            continue
        if name in {field.name for field in fields(config.learner.networks)}:
            networks = replace(config.learner.networks, **{name: value})
            config = replace(config, learner=replace(config.learner, networks=networks))
            continue
        part = next(part for part in ("run", "learner", "budget", "finetune") if _has(getattr(config, part), name))
        config = replace(config, **{part: replace(getattr(config, part), **{name: value})})
    return config


def _has(part: Any, name: str) -> bool:
    return part is not None and name in {field.name for field in fields(part)}
