"""Learnt policies as lines of the table, and actors that never learned."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch

from vitprune_env.agents import AdaptivePolicy, MergePolicy, TokenActor, TokenPolicy
from vitprune_env.baselines import Knob
from vitprune_env.benchmarking.contestants.search import at_budget
from vitprune_env.benchmarking.contestants.task import Contestant, Task
from vitprune_env.benchmarking.measurement import Sites
from vitprune_env.deploy.policy_files import load_policy
from vitprune_env.envs.actions import ActionKind, KeepActions
from vitprune_env.errors import CheckpointError
from vitprune_env.policy import Policy

Trained = TokenPolicy | MergePolicy
"""Policies with a threshold, which go with the sites of their training."""

POLICY_FILE = "policy.safetensors"
THRESHOLD = Knob("threshold", -40.0, 40.0, rising=False)  # in logits; beyond it everything is kept or pruned


def load(file: Path) -> Policy:
    """A saved policy of the network as it is.

    Raises:
        CheckpointError: for one that cannot be read, or whose network was fine-tuned with it and would not be the one
            that is compared.
    """
    policy = load_policy(file)
    if isinstance(policy, Trained) and policy.info.get("finetune", "off") != "off":
        raise CheckpointError(
            f"{file}: expected a policy of the network as it is, got one with a fine-tuned network of its own; "
            "`vitprune evaluate` reports such runs"
        )
    return policy


def of_trained(label: str, policies: Sequence[Trained], origin: str = "") -> Contestant:
    """Trained policies: at each budget those whose own budget is the nearest, at the sites of their training."""

    def at(task: Task, budget: float) -> list[Policy]:
        asked = [_asked(policy, budget / task.dense_gmacs) for policy in policies]
        distances = [abs(_own_budget(policy, task) - budget) for policy in asked]
        nearest = min(distances) + 1e-3 * budget
        chosen = [policy for policy, distance in zip(asked, distances, strict=True) if distance <= nearest]
        return [_with_threshold(policy, task, budget) for policy in chosen]

    return Contestant(label, "learned", at, _where_they_want, THRESHOLD.name, origin)


def _where_they_want(_: Task) -> Sites | None:
    """The sites of their training."""


def _asked(policy: Trained, share: float) -> Trained:
    """A policy for a range of budgets at the asked one, or at the end of its range that is nearest."""
    if not isinstance(policy, AdaptivePolicy):
        return policy
    return policy.at(min(max(share, policy.shares[0]), policy.shares[-1]))


def _own_budget(policy: Trained, task: Task) -> float:
    """GMACs that a policy was trained for, or told to spend."""
    if isinstance(policy, AdaptivePolicy):
        return policy.share * task.dense_gmacs
    return float(policy.info.get("target_macs") or 0) / 1e9


def untrained_policies(
    task: Task,
    budget: float,
    actions: ActionKind = KeepActions(),  # noqa: B008, frozen
    **actor: Any,
) -> list[Policy]:
    """Actors with fresh weights at a budget: what the shape of the learned policy achieves without learning.

    Args:
        task: network, images to calibrate on and seeds.
        budget: GMACs per image.
        actions: what the actors' actions mean.
        **actor: arguments of `TokenActor`, such as `hidden`.
    """
    usual = task.backbone.default_sites
    sites = task.where(usual, usual)
    generators = [torch.Generator().manual_seed(task.seed + index) for index in range(task.seeds)]
    shape = {"num_actions": actions.count(task.backbone.num_patches), **actor}
    actors = [TokenActor(task.backbone.embed_dim, generator=generator, **shape) for generator in generators]
    return [_with_threshold(TokenPolicy(actor, sites=sites, actions=actions), task, budget) for actor in actors]


UNTRAINED = Contestant("untrained actor", "control", untrained_policies, _where_they_want, THRESHOLD.name)


def _with_threshold(policy: Trained, task: Task, budget: float) -> Policy:
    policy = policy.to(task.backbone.position.device)
    return at_budget(lambda value: policy.with_threshold(cast(float, value)), THRESHOLD, budget, task, None)
