"""The parts of a run that its configuration chooses: networks, exploration, algorithm, reward schedule."""

from __future__ import annotations

from typing import Any

import torch
from tianshou.algorithm.optim import AdamOptimizerFactory

from ...errors import BudgetError
from ...game.rewards import Attribution, PaperReward, SharedOutcome, correct
from ...game.team_reward import TeamOutcome
from ..budgets.adaptive import AdaptiveExplorer, AdaptivePrice
from ..budgets.prices import DualPrice, FedForwardKeepCost, RewardSchedule
from ..budgets.targets import PolicyCost, target_macs
from ..learners.mappo import MAPPO, LinearDecay
from ..learners.ppo_single import Critic, ImageCritic, PPOSingle
from ..networks import TokenActor, TokenCritic, paper_sizes
from ..policies import ExploringPolicy
from .config import OUTCOMES, TrainConfig
from .processes import Processes


def make_networks(embed_dim: int, config: TrainConfig, generator: torch.Generator) -> tuple[TokenActor, Critic]:
    """Actor and critic of the sizes that a configuration asks for."""
    default = paper_sizes(embed_dim) if config.paper_sizes else None
    embed_dim += bool(config.adaptive)  # the budget is one more feature of every token
    actor = TokenActor(embed_dim, config.actor_hidden or default, config.keep_bias, generator)
    kind = ImageCritic if config.algorithm == "ppo_single" else TokenCritic
    return actor, kind(embed_dim, config.critic_hidden or default, generator)


def make_algorithm(actor: TokenActor, critic: Critic, config: TrainConfig, generator: torch.Generator) -> Any:
    """MAPPO or single-agent PPO with the optimiser and the learning-rate schedule of a configuration."""
    adam = AdamOptimizerFactory(lr=config.lr, eps=config.adam_eps)
    kind: Any = PPOSingle if config.algorithm == "ppo_single" else MAPPO
    return kind(
        actor=actor,
        critic=critic,
        optim=adam.with_lr_scheduler_factory(LinearDecay(config.updates, config.lr_final)),
        clip=config.clip,
        value_clip=config.value_clip,
        huber_delta=config.huber_delta,
        value_norm=config.value_norm,
        advantage_normalization=config.normalize_advantages,
        vf_coef=config.value_coef,
        ent_coef=config.entropy,
        max_grad_norm=config.max_grad_norm,
        gae_lambda=config.trace,
        gamma=config.discount,
        update_chunk=config.update_chunk,
        precision=config.precision,
        generator=generator,
    )


def make_explorer(actor: TokenActor, config: TrainConfig, generator: torch.Generator) -> ExploringPolicy:
    """How the actor plays in training."""
    if config.adaptive:
        return AdaptiveExplorer(actor, generator, *config.adaptive)
    return ExploringPolicy(actor, generator)


def settled_macs(config: TrainConfig, cost: PolicyCost) -> float:
    """What play costs where the paper's reward is in equilibrium, were every image classified correctly."""
    assert config.keep_cost is not None
    fraction = min(1.0, config.outcome_bonus / config.keep_cost)
    return min(cost.at_fraction(fraction), cost.model.dense())


def asked_macs(config: TrainConfig, cost: PolicyCost) -> float:
    """What images shall cost on average, MACs; of a range of budgets, its middle.

    Raises:
        BudgetError: for a budget, or an end of the range, that no policy can meet.
    """
    if config.is_free:
        return settled_macs(config, cost)
    try:
        for share in config.adaptive:
            target_macs(cost, share=share)
    except BudgetError as error:
        raise BudgetError(f"adaptive: no policy can serve all of {config.adaptive}; {error}") from error
    return target_macs(cost, **config.budget)


def make_schedule(
    config: TrainConfig, cost: PolicyCost, explorer: ExploringPolicy, generator: torch.Generator, processes: Processes
) -> RewardSchedule:
    """The reward that a configuration asks for, and how it moves towards the budget."""
    outcome = OUTCOMES[config.outcome]
    if config.reward == "paper":
        paper = PaperReward(outcome_bonus=config.outcome_bonus, outcome=outcome)
        if config.is_free:  # as if every image came out right, so that the annealing ends at `keep_cost` itself
            return FedForwardKeepCost(paper, cost, accuracy=1.0, smoothing=1.0)
        return FedForwardKeepCost(paper, cost)
    shared = TeamOutcome if config.algorithm == "ppo_single" else SharedOutcome
    reward: Any = shared(config.price, outcome, config.merge_cost, config.charge_overhead)
    if config.reward == "attribution":
        reward = Attribution(config.price) if outcome is correct else Attribution(config.price, outcome)
    rates = config.price_rate, config.price_gain
    if isinstance(explorer, AdaptiveExplorer):
        return AdaptivePrice(reward, explorer, config.images, generator, *rates, processes)
    return DualPrice(reward, *rates)
