"""The Markov game of token pruning in Vision Transformers.

Every patch token is an agent, every pruning site a step, 0 = prune, 1 = keep. See `TokenGame` for the rules,
`parallel_env` for the PettingZoo environment, `vitprune_env.agents` for learning, `vitprune_env.baselines` for the
policies to beat, `benchmark` for comparing all of them.

Names are loaded when they are first used, so that `vitprune --help` answers at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vitprune_env.envs.registration import register_envs

if TYPE_CHECKING:
    from vitprune_env.benchmarking.comparison import benchmark
    from vitprune_env.benchmarking.result import BenchmarkResult
    from vitprune_env.deploy.policy_files import load_policy, save_policy
    from vitprune_env.deploy.pruned_vit import PrunedViT, load_pruned
    from vitprune_env.engine.backbone import Backbone
    from vitprune_env.engine.evidence import Evidence, register_evidence
    from vitprune_env.engine.families import register_family
    from vitprune_env.envs.actions import ActionKind, KeepActions, MergeActions, register_actions
    from vitprune_env.envs.exits import DropMergeKeep, KeepOrFuse, KeepOrMerge
    from vitprune_env.envs.gym import SingleAgentEnv
    from vitprune_env.envs.parallel import parallel_env
    from vitprune_env.envs.vector import TokenVectorEnv
    from vitprune_env.files import __version__ as __version__
    from vitprune_env.game.policy_contract import check_policy
    from vitprune_env.game.rewards import Attribution, PaperReward, SharedOutcome, TeamOutcome
    from vitprune_env.game.rollout import evaluate, play
    from vitprune_env.game.token_game import TokenGame
    from vitprune_env.models.load import load_backbone, register_backbone, save_backbone
    from vitprune_env.policy import BasePolicy, KeepAll, Policy, register_policy
    from vitprune_env.types import Decision, Episode, Observation, Outcome, Site

__all__ = [
    "ActionKind",
    "Attribution",
    "Backbone",
    "BasePolicy",
    "BenchmarkResult",
    "Decision",
    "DropMergeKeep",
    "Episode",
    "Evidence",
    "KeepActions",
    "KeepAll",
    "KeepOrFuse",
    "KeepOrMerge",
    "MergeActions",
    "Observation",
    "Outcome",
    "PaperReward",
    "Policy",
    "PrunedViT",
    "SharedOutcome",
    "SingleAgentEnv",
    "Site",
    "TeamOutcome",
    "TokenGame",
    "TokenVectorEnv",
    "benchmark",
    "check_policy",
    "evaluate",
    "load_backbone",
    "load_policy",
    "load_pruned",
    "parallel_env",
    "play",
    "register_actions",
    "register_backbone",
    "register_evidence",
    "register_family",
    "register_policy",
    "save_backbone",
    "save_policy",
]

_HOMES = {
    "benchmarking.comparison": ("benchmark",),
    "benchmarking.result": ("BenchmarkResult",),
    "deploy.policy_files": ("load_policy", "save_policy"),
    "deploy.pruned_vit": ("PrunedViT", "load_pruned"),
    "engine.backbone": ("Backbone",),
    "engine.evidence": ("Evidence", "register_evidence"),
    "engine.families": ("register_family",),
    "envs.actions": ("ActionKind", "KeepActions", "MergeActions", "register_actions"),
    "envs.exits": ("DropMergeKeep", "KeepOrFuse", "KeepOrMerge"),
    "envs.gym": ("SingleAgentEnv",),
    "envs.parallel": ("parallel_env",),
    "envs.vector": ("TokenVectorEnv",),
    "files": ("__version__",),
    "game.policy_contract": ("check_policy",),
    "game.rewards": ("Attribution", "PaperReward", "SharedOutcome", "TeamOutcome"),
    "game.rollout": ("evaluate", "play"),
    "game.token_game": ("TokenGame",),
    "models.load": ("load_backbone", "register_backbone", "save_backbone"),
    "policy": ("BasePolicy", "KeepAll", "Policy", "register_policy"),
    "types": ("Decision", "Episode", "Observation", "Outcome", "Site"),
}
_FOLDERS = {"agents", "baselines", "data", "deploy", "engine", "envs", "game", "models", "plots", "soft"}


def __getattr__(name: str) -> Any:
    """Load a public name, or a folder of the package, when it is first used."""
    if name in _FOLDERS:
        return import_module(f"{__name__}.{name}")
    home = next((module for module, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_envs()
