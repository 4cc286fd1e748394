"""Learning to prune: actor, critic, learners on tianshou, training to a budget, fine-tuning of the network."""

from ..deploy.policy_files import load_policy, save_policy
from .budgets.adaptive import AdaptivePolicy, BudgetRange
from .budgets.calibration import calibrate_counts, calibrate_threshold
from .budgets.controller import Budget, BudgetController, Equilibrium, GMACs, KeepRate, Share
from .cloning import Cloning, cloned_policy
from .finetuning.loop import CosineKeepRate, FinetuneConfig, FinetuneResult, LastBlocks, finetune
from .finetuning.token_dropping import BackboneConfig, RandomSites, TokenDropping, finetune_backbone
from .foreign import ModulePolicy, register_actor
from .learners.buffer import Trajectory
from .learners.exploration import ExploringPolicy
from .learners.learner import Learner, LearnerConfig, Parts
from .learners.mappo import MAPPO, MAPPOConfig
from .learners.pgpe import PGPE, ParameterExplorer, PGPEConfig
from .learners.ppo_single import ImageCritic, PPOSingle, PPOSingleConfig
from .merging.distillation import Distillation, distilled_policy
from .merging.policy import MergePolicy, PairActor
from .networks import LightNetworks, PaperNetworks, TokenActor, TokenCritic, mlp
from .policies import TokenPolicy
from .presets import PRESETS, Preset
from .runs.run import TrainResult, train
from .runs.settings import RunConfig
from .senses import SENSES, Sense, register_sense
from .shared.processes import Processes, launched
from .shared.signals import TrainingStopped

__all__ = [
    "MAPPO",
    "PGPE",
    "PRESETS",
    "SENSES",
    "AdaptivePolicy",
    "BackboneConfig",
    "Budget",
    "BudgetController",
    "BudgetRange",
    "Cloning",
    "CosineKeepRate",
    "Distillation",
    "Equilibrium",
    "ExploringPolicy",
    "FinetuneConfig",
    "FinetuneResult",
    "GMACs",
    "ImageCritic",
    "KeepRate",
    "LastBlocks",
    "Learner",
    "LearnerConfig",
    "LightNetworks",
    "MAPPOConfig",
    "MergePolicy",
    "ModulePolicy",
    "PGPEConfig",
    "PPOSingle",
    "PPOSingleConfig",
    "PairActor",
    "PaperNetworks",
    "ParameterExplorer",
    "Parts",
    "Preset",
    "Processes",
    "RandomSites",
    "RunConfig",
    "Sense",
    "Share",
    "TokenActor",
    "TokenCritic",
    "TokenDropping",
    "TokenPolicy",
    "TrainResult",
    "TrainingStopped",
    "Trajectory",
    "calibrate_counts",
    "calibrate_threshold",
    "cloned_policy",
    "distilled_policy",
    "finetune",
    "finetune_backbone",
    "launched",
    "load_policy",
    "mlp",
    "register_actor",
    "register_sense",
    "save_policy",
    "train",
]
