"""The flags of training, in groups, and the settings objects that they stand for."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from vitprune_env.agents import TrainConfig


@dataclass(frozen=True)
class BudgetFlags:
    """What the trained policy may cost, its own MACs included; give at most one of the first four."""

    target_share: float | None = None
    """Budget as a share of the dense network's MACs; without any budget 0.35, or 0.6 with --paper-sizes."""
    target_gmacs: float | None = None
    """Budget in GMACs per image, on average."""
    target_keep: float | None = None
    """Budget as a keep rate: what keeping this fraction of the tokens at every site costs."""
    adaptive: tuple[float, ...] = TrainConfig.adaptive
    """Smallest and largest budget, as shares of dense, of one policy that serves all in between; empty: one budget."""
    anneal_from: float = TrainConfig.anneal_from
    """Share of the dense MACs that the target starts from: about what the untrained policy costs."""
    anneal_part: float = TrainConfig.anneal_part
    """Part of the updates over which the target moves to the budget, 0 to 1."""
    price: float = TrainConfig.price
    """Price at the start of carrying one token through the whole network, in units of the outcome."""
    price_rate: float = TrainConfig.price_rate
    """Relative change of the price per relative excess of MACs, each update."""


@dataclass(frozen=True)
class RewardFlags:
    """Where tokens are pruned, and what agents are paid."""

    sites: tuple[str, ...] = TrainConfig.sites
    """Where tokens are pruned, such as 3 6 9 or 4.attn; empty: the backbone's own sites."""
    reward: Literal["shared_outcome", "paper", "attribution"] = TrainConfig.reward
    """The image's outcome, shared; RL4EViT's Eq. 2; or what a token contributed to the log-probability of the true
    class, to first order."""
    outcome: Literal["correct", "log_probability", "probability", "margin"] = TrainConfig.outcome
    """What counts as outcome: 1 for a correct class, or of the true class the clamped log-probability, the probability,
    or the clamped margin of its logit. Attribution, which has no derivative of `correct`, then takes the
    log-probability without a clamp."""
    charge_overhead: bool = TrainConfig.charge_overhead
    """Shared outcome: whether agents pay for the MACs of the policy itself."""
    outcome_bonus: float = TrainConfig.outcome_bonus
    """Paper's reward: weight of the outcome (beta)."""
    keep_cost: float | None = TrainConfig.keep_cost
    """Paper's reward: cost of keeping a token (alpha), reached by annealing; without a budget, the ratio of the two
    alone decides how much is kept. None: follows from the budget."""


@dataclass(frozen=True)
class NetworkFlags:
    """Actor and critic."""

    paper_sizes: bool = TrainConfig.paper_sizes
    """Whether actor and critic have RL4EViT's hidden widths (4D, 256, 64)."""
    actor_hidden: tuple[int, ...] = TrainConfig.actor_hidden
    """Hidden widths of the actor; empty: (D / 2), or the paper's with --paper-sizes."""
    critic_hidden: tuple[int, ...] = TrainConfig.critic_hidden
    """Hidden widths of the critic, which is not deployed; empty: (64, 64), or the paper's with --paper-sizes."""
    keep_bias: float = TrainConfig.keep_bias
    """Log-odds of keeping a token at the start."""


@dataclass(frozen=True)
class LearnerFlags:
    """The algorithm and its updates."""

    algorithm: Literal["mappo", "ppo_single"] = TrainConfig.algorithm
    """Which agents learn: every token for itself (MAPPO), or one that decides for all tokens of an image."""
    epochs: int = TrainConfig.epochs
    """Passes over the agent-steps of an update (K in RL4EViT)."""
    minibatch: int | None = TrainConfig.minibatch
    """Agent-steps per gradient step; None: all at once."""
    update_chunk: int | None = TrainConfig.update_chunk
    """Agent-steps whose gradient is computed at once and summed over a minibatch: less memory, the same gradient. None:
    as many as fit the cache."""
    precision: Literal["fp32", "bf16"] = TrainConfig.precision
    """Of the matrix products of an update; gradients in bf16 differ by per cents."""
    lr: float = TrainConfig.lr
    """Learning rate of Adam at the start."""
    lr_final: float = TrainConfig.lr_final
    """Fraction of it at the end; linear in between."""
    clip: float = TrainConfig.clip
    """Range of the probability ratio (Eq. 3)."""
    value_clip: float | None = TrainConfig.value_clip
    """Range of the new value around the old one (Eq. 4); None: no clipping."""
    discount: float = TrainConfig.discount
    """gamma, per site."""
    trace: float = TrainConfig.trace
    """lambda of the advantage estimate."""
    entropy: float = TrainConfig.entropy
    """Weight of the entropy bonus."""
    max_grad_norm: float | None = TrainConfig.max_grad_norm
    """Largest norm of the joint gradient; None: no clipping."""
    normalize_advantages: bool = TrainConfig.normalize_advantages
    """Whether advantages are standardised in every minibatch."""
    value_norm: bool = TrainConfig.value_norm
    """Whether the critic learns normalised returns."""
    huber_delta: float | None = TrainConfig.huber_delta
    """Error above which the value loss grows linearly; None: squared error."""


@dataclass(frozen=True)
class RunFlags:
    """How long, and what is written when."""

    updates: int = TrainConfig.updates
    """Updates; each plays one batch of games."""
    images: int = TrainConfig.images
    """Images (games) per update."""
    cache_images: int = TrainConfig.cache_images
    """Training images whose tokens up to the first site are computed once and kept in memory; 0: none."""
    calibration_images: int = TrainConfig.calibration_images
    """Training images on which the threshold is set at the end."""
    checkpoint_every: int = TrainConfig.checkpoint_every
    """Updates between checkpoints."""
    amp: bool = TrainConfig.amp
    """Whether the backbone plays, and is fine-tuned, in bfloat16; actor, critic and calibration stay in full
    precision."""
    log_images_every: int = TrainConfig.log_images_every
    """Updates between pictures of what is pruned, in TensorBoard; 0: none."""
    wandb: str | None = TrainConfig.wandb
    """Project of Weights & Biases to log to, beside TensorBoard; needs the package wandb."""


@dataclass(frozen=True)
class FinetuneFlags:
    """Whether the network learns, too (Algorithm 1). What comes before the first site stays as it is."""

    finetune: Literal["off", "alternate", "after"] = TrainConfig.finetune
    """Never, every so many updates, or once the policy is trained."""
    finetune_every: int = TrainConfig.finetune_every
    """Updates between two phases, with `alternate`."""
    finetune_steps: int = TrainConfig.finetune_steps
    """Gradient steps on the network in all."""
    finetune_batch: int = TrainConfig.finetune_batch
    """Images per step."""
    finetune_lr: float = TrainConfig.finetune_lr
    """Learning rate of the network; cosine, with a warm-up."""
    distill: float = TrainConfig.distill
    """Weight of the dense model's soft labels against the true class, 0 to 1."""


@dataclass(frozen=True)
class TrainingFlags:
    """All settings of training but the seed."""

    budget: BudgetFlags = field(default_factory=BudgetFlags)
    reward: RewardFlags = field(default_factory=RewardFlags)
    run: RunFlags = field(default_factory=RunFlags)
    learner: LearnerFlags = field(default_factory=LearnerFlags)
    networks: NetworkFlags = field(default_factory=NetworkFlags)
    finetune: FinetuneFlags = field(default_factory=FinetuneFlags)

    @classmethod
    def of(cls, config: TrainConfig) -> TrainingFlags:
        """The flags that stand for some settings."""
        groups: dict[str, Any] = {each.name: each.default_factory for each in fields(cls)}
        return cls(
            **{
                name: group(**{flag.name: getattr(config, flag.name) for flag in fields(group)})
                for name, group in groups.items()
            }
        )

    def settings(self, seed: int) -> TrainConfig:
        """The settings that the flags stand for."""
        groups = (getattr(self, each.name) for each in fields(self))
        return TrainConfig(seed=seed, **{name: value for group in groups for name, value in vars(group).items()})
