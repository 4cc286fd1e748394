"""The Markov game of token pruning in Vision Transformers.

Every patch token is an agent, every pruning site a step, 0 = prune, 1 = keep. See `TokenGame` for the rules,
`parallel_env` for the PettingZoo environment, `vitprune_env.agents` for learning, `vitprune_env.baselines` for the
policies to beat.
"""

from vitprune_env.deploy.policy_files import load_policy, save_policy
from vitprune_env.deploy.pruned_vit import PrunedViT, load_pruned
from vitprune_env.engine.backbone import Backbone
from vitprune_env.envs.gym import SingleAgentEnv, register_gym_env
from vitprune_env.envs.parallel import parallel_env, register_envs
from vitprune_env.envs.vector import TokenVectorEnv
from vitprune_env.files import __version__ as __version__
from vitprune_env.game.policy_contract import check_policy
from vitprune_env.game.rewards import PaperReward, SharedOutcome, TeamOutcome
from vitprune_env.game.rollout import evaluate, play
from vitprune_env.game.token_game import TokenGame
from vitprune_env.models.load import load_backbone, register_backbone
from vitprune_env.policy import BasePolicy, KeepAll, Policy, register_policy
from vitprune_env.types import Decision, Episode, Observation, Outcome, Site

__all__ = [
    "Backbone",
    "BasePolicy",
    "Decision",
    "Episode",
    "KeepAll",
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
    "check_policy",
    "evaluate",
    "load_backbone",
    "load_policy",
    "load_pruned",
    "parallel_env",
    "play",
    "register_backbone",
    "register_policy",
    "save_policy",
]

register_envs()
register_gym_env()
