"""Learning to prune: actor, critic, MAPPO on tianshou, training to a budget, fine-tuning of the network."""

from ..deploy.policy_files import load_policy, save_policy
from .budgets.adaptive import AdaptivePolicy
from .budgets.targets import calibrate_threshold
from .finetuning.loop import CosineKeepRate, FinetuneConfig, FinetuneResult, finetune
from .learners.mappo import MAPPO
from .learners.ppo_single import ImageCritic, PPOSingle
from .networks import TokenActor, TokenCritic
from .policies import TokenPolicy
from .runs.config import TrainConfig
from .runs.trainer import TrainResult, train

__all__ = [
    "MAPPO",
    "AdaptivePolicy",
    "CosineKeepRate",
    "FinetuneConfig",
    "FinetuneResult",
    "ImageCritic",
    "PPOSingle",
    "TokenActor",
    "TokenCritic",
    "TokenPolicy",
    "TrainConfig",
    "TrainResult",
    "calibrate_threshold",
    "finetune",
    "load_policy",
    "save_policy",
    "train",
]
