"""Learning to prune: actor, critic, MAPPO on tianshou, training to a budget, fine-tuning of the network."""

from .adaptive import AdaptivePolicy
from .budget import calibrate_threshold
from .checkpoint import load_policy, save_policy
from .config import TrainConfig
from .finetune import CosineKeepRate, FinetuneConfig, FinetuneResult, finetune
from .mappo import MAPPO
from .networks import TokenActor, TokenCritic
from .policy import TokenPolicy
from .ppo_single import ImageCritic, PPOSingle
from .trainer import TrainResult, train

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
