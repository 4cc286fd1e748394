"""Files of version 0.1 (format 1) in the terms of format 2.

There were four kinds: learnt policies, fitted policies, thresholds of LTMP, and folders of `PrunedViT`. They named
policies by module and class, as those were called then; the table below gives the public names of these classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vitprune_env.errors import CheckpointError

KINDS = ("policy", "fitted policy", "ltmp")
NAMES = {
    "vitprune_env.policy:KeepAll": "keep_all",
    "vitprune_env.agents.policy:TokenPolicy": "token_policy",
    "vitprune_env.agents.adaptive:AdaptivePolicy": "adaptive_policy",
    "vitprune_env.baselines.ats:ATS": "ats",
    "vitprune_env.baselines.dpc_knn:DPCKNN": "dpcknn",
    "vitprune_env.baselines.dpc_merge:DPCMerge": "dpc",
    "vitprune_env.baselines.dynamicvit:DynamicViT": "dynamicvit",
    "vitprune_env.baselines.evit:EViT": "evit",
    "vitprune_env.baselines.evo_vit:EvoViT": "evo_vit",
    "vitprune_env.baselines.life_regression:LifeRegression": "life_regression",
    "vitprune_env.baselines.ltmp:LTMP": "ltmp",
    "vitprune_env.baselines.mergers:KMeansMerge": "dpc_kmeans",
    "vitprune_env.baselines.mergers:PoolMerge": "dpc_pool",
    "vitprune_env.baselines.random_drop:RandomDrop": "random",
    "vitprune_env.baselines.subsample:SubSampleMerge": "dpc_subsample",
    "vitprune_env.baselines.tome:ToMe": "tome",
    "vitprune_env.baselines.topk:TopK": "topk",
    "vitprune_env.baselines.tri_level:TriLevel": "tri_level",
}


def upgrade_file(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a policy file.

    Raises:
        CheckpointError: for a class that is not in the table.
        KeyError: if something is missing.
    """
    if header["kind"] == "fitted policy":
        return {"policy": upgrade_policy(header["policy"])}, {f"policy.{name}": tensors[name] for name in tensors}
    if header["kind"] == "ltmp":
        return {"policy": {"name": "ltmp", "config": dict(header["tree"]["items"])}}, {}
    config = {name: value for name, value in header.items() if name not in ("format", "kind", "versions")}
    name = "adaptive_policy" if "shares" in config else "token_policy"
    return {"policy": {"name": name, "config": config}}, {f"policy.actor.{name}": tensors[name] for name in tensors}


def upgrade_folder(config: Mapping[str, Any]) -> dict[str, Any]:
    """The `config.json` of a pruned model, whose tensors have the same names in both formats.

    Raises:
        CheckpointError: for a class that is not in the table.
        KeyError: if something is missing.
    """
    backbone = {"architecture": config["backbone"]["name"], "pretrained_cfg": {}, **config["backbone"]}
    return {**config, "backbone": backbone, "policy": upgrade_policy(config["policy"])}


def upgrade_policy(description: Mapping[str, Any]) -> dict[str, Any]:
    """A policy by its public name in place of its class."""
    kind = description["class"]
    if not isinstance(kind, str) or kind not in NAMES:
        raise CheckpointError(f"policy: expected a class of vitprune_env 0.1, got {kind!r}")
    return {"name": NAMES[kind], "config": description["config"]}
