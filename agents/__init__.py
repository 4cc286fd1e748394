"""Learning to prune: actor, critic, MAPPO on tianshou, training to a budget."""

from .budget import calibrate_threshold
from .checkpoint import load_policy, save_policy
from .config import TrainConfig
from .mappo import MAPPO
from .networks import TokenActor, TokenCritic
from .policy import TokenPolicy
from .ppo_single import ImageCritic, PPOSingle
from .trainer import TrainResult, train

__all__ = [
    "MAPPO",
    "ImageCritic",
    "PPOSingle",
    "TokenActor",
    "TokenCritic",
    "TokenPolicy",
    "TrainConfig",
    "TrainResult",
    "calibrate_threshold",
    "load_policy",
    "save_policy",
    "train",
]
