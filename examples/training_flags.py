"""Flags of training, and the settings objects that they stand for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from vitprune_env import PaperReward, SharedOutcome, TeamOutcome
from vitprune_env.agents import (
    Budget,
    BudgetRange,
    Equilibrium,
    FinetuneConfig,
    GMACs,
    KeepRate,
    LightNetworks,
    MAPPOConfig,
    PaperNetworks,
    PPOSingleConfig,
    Preset,
    RunConfig,
    Share,
)
from vitprune_env.game.rewards import Attribution, correct, log_probability, margin, probability

OUTCOMES = {"correct": correct, "log_probability": log_probability, "probability": probability, "margin": margin}


@dataclass(frozen=True)
class TrainingFlags:
    """Settings of `train` as flat flags; the defaults are what learns best in minutes on the built-in task."""

    algorithm: Literal["mappo", "ppo_single"] = "mappo"
    """Who learns: every token for itself (MAPPO), or one agent that decides for all tokens of an image."""

    # Budget: give at most one of the three; without any, the share is 0.35, or 0.6 with paper_sizes.
    target_gmacs: float | None = None
    """Mean GMACs per image that the trained policy may cost, its own included."""
    target_keep: float | None = None
    """Budget as a keep rate: what keeping this fraction of the tokens at every site costs."""
    target_share: float | None = None
    """Budget as a share of the dense network's MACs."""

    adaptive: tuple[float, ...] = ()
    """Smallest and largest budget, as shares of dense, of one policy that serves all in between, instead of the three;
    empty: one budget."""

    # Game
    sites: tuple[str, ...] = ()
    """Where tokens are pruned, such as 3 6 9 or 4.attn; empty: the backbone's own sites."""
    reward: Literal["shared_outcome", "paper", "attribution"] = "shared_outcome"
    """What agents are paid: the image's outcome, shared; Eq. 2 of RL4EViT; or what their token contributed to the
    log-probability of the true class, to first order."""
    outcome: Literal["correct", "log_probability", "probability", "margin"] = "correct"
    """What counts as outcome: 1 for a correct class, or of the true class the clamped log-probability, the probability,
    or the clamped margin of its logit; see `vitprune_env.game.rewards`. Attribution needs a derivative; with `correct`
    it takes the log-probability without a clamp."""
    charge_overhead: bool = False
    """Shared outcome: whether agents pay for the MACs of the policy itself."""
    price: float = 0.01
    """Shared outcome: price at the start of carrying one token through the whole network."""
    price_rate: float = 0.2
    """Shared outcome: relative change of the price per relative excess of MACs, each update."""
    price_gain: float = 2.0
    """Shared outcome: how strongly the price answers an excess at once."""
    outcome_bonus: float = 1.0
    """Paper's reward: weight of the outcome (beta)."""
    keep_cost: float | None = None
    """Paper's reward: cost of keeping a token (alpha), reached by annealing; without a budget, the ratio of the two
    alone decides how much is kept. None: follows from the budget."""
    anneal_from: float = 0.55
    """Share of dense MACs that the target starts from: about what the untrained policy costs."""
    anneal_part: float = 0.5
    """Part of the updates over which the target moves to the budget."""

    # Networks
    paper_sizes: bool = False
    """Whether actor and critic have the paper's hidden widths (4D, 256, 64)."""
    actor_hidden: tuple[int, ...] = ()
    """Hidden widths of the actor; empty: (D / 2), or the paper's with paper_sizes."""
    critic_hidden: tuple[int, ...] = ()
    """Hidden widths of the critic, which is not deployed; empty: (64, 64), or the paper's with paper_sizes."""
    keep_bias: float = 1.0
    """Log-odds of keeping a token at the start."""

    # Optimisation
    updates: int = 80
    """Number of updates; each plays one batch of games."""
    images: int = 128
    """Images (games) per update."""
    epochs: int = 1
    """Passes over the agent-steps of an update (K in the paper)."""
    minibatch: int | None = 2048
    """Agent-steps per gradient step; None: all at once."""
    update_chunk: int | None = None
    """Agent-steps whose gradient is computed at once and summed over a minibatch: less memory, the same gradient. None:
    as many as fit the cache."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the matrix products of an update: bf16 is faster where the processor has it, gradients then differ by per
    cents."""
    lr: float = 3e-3
    """Learning rate of Adam at the start."""
    lr_final: float = 0.05
    """Fraction of it at the end; linear in between."""
    adam_eps: float = 1e-5
    """Epsilon of Adam."""
    clip: float = 0.2
    """Range of the probability ratio (Eq. 3)."""
    value_clip: float | None = 0.2
    """Range of the new value around the old one (Eq. 4); None: no clipping."""
    discount: float = 1.0
    """gamma; a game has as many steps as there are sites."""
    trace: float = 0.95
    """lambda of the advantage estimate."""
    entropy: float = 0.01
    """Weight of the entropy bonus."""
    value_coef: float = 0.5
    """Weight of the value loss."""
    max_grad_norm: float | None = 0.5
    """Largest norm of the joint gradient; None: no clipping."""
    normalize_advantages: bool = True
    """Whether advantages are standardised in every minibatch."""
    value_norm: bool = False
    """Whether the critic learns normalised returns."""
    huber_delta: float | None = None
    """Error above which the value loss grows linearly; None: squared error."""

    # The network itself
    finetune: Literal["off", "alternate", "after"] = "off"
    """Whether the network learns, too (Algorithm 1): every so many updates, or once the policy is trained. What comes
    before the first site is left as it is."""
    finetune_every: int = 10
    """Updates between two phases of fine-tuning, with `alternate`."""
    finetune_steps: int = 300
    """Gradient steps on the network in all."""
    finetune_batch: int = 64
    """Images per such step."""
    finetune_lr: float = 2e-4
    """Learning rate of the network; cosine, with a warm-up."""
    distill: float = 0.0
    """Fine-tuning: weight of the dense model's soft labels against the true class, 0 to 1."""

    # Run
    seed: int = 0
    """Of weights, images, exploration and minibatches."""
    cache_images: int = 2048
    """Training images whose tokens up to the first site are computed once and kept in memory; 0: none, every image is
    run through the first blocks whenever it is drawn."""
    calibration_images: int = 512
    """Training images on which the threshold is set at the end."""
    checkpoint_every: int = 10
    """Updates between checkpoints."""
    amp: bool = False
    """Whether the backbone plays, and is fine-tuned, in bfloat16 (autocast); actor, critic and calibration stay in full
    precision."""
    log_images_every: int = 0
    """Updates between pictures of what is pruned, in TensorBoard; 0: none."""
    wandb: str | None = None
    """Project of Weights & Biases to log to, beside TensorBoard; needs the package wandb."""

    @property
    def config(self) -> Preset:
        """The settings objects that the flags stand for."""
        sites = self.sites or None
        return Preset(self._budget(), self._learner(), self._reward(), self._run(), self._finetune(), sites=sites)

    def _budget(self) -> Budget:
        follow = {"anneal_from": self.anneal_from, "anneal_part": self.anneal_part, "price_rate": self.price_rate,
                  "price_gain": self.price_gain}  # fmt: skip
        given = [
            *([] if self.target_gmacs is None else [GMACs(self.target_gmacs, **follow)]),
            *([] if self.target_keep is None else [KeepRate(self.target_keep, **follow)]),
            *([] if self.target_share is None else [Share(self.target_share, **follow)]),
            *([BudgetRange(*self.adaptive, **follow)] if self.adaptive else []),
        ]
        if len(given) > 1:
            raise ValueError(f"budget: expected at most one, got {given}")
        if given:
            return given[0]
        if self.keep_cost is not None:
            return Equilibrium(**follow)
        return Share(0.6 if self.paper_sizes else 0.35, **follow)

    def _learner(self) -> MAPPOConfig:
        sizes = PaperNetworks if self.paper_sizes else LightNetworks
        made = PPOSingleConfig if self.algorithm == "ppo_single" else MAPPOConfig
        names = ("epochs", "minibatch", "update_chunk", "precision", "lr", "lr_final", "adam_eps", "clip", "value_clip",
                 "discount", "trace", "entropy", "value_coef", "max_grad_norm", "normalize_advantages", "value_norm",
                 "huber_delta")  # fmt: skip
        networks = sizes(self.actor_hidden, self.critic_hidden, self.keep_bias)
        return made(networks=networks, **{name: getattr(self, name) for name in names})

    def _reward(self) -> Any:
        outcome = OUTCOMES[self.outcome]
        if self.reward == "paper":
            cost: dict[str, Any] = {} if self.keep_cost is None else {"keep_cost": self.keep_cost}
            return PaperReward(outcome_bonus=self.outcome_bonus, outcome=outcome, **cost)
        if self.reward == "attribution":
            return Attribution(self.price) if outcome is correct else Attribution(self.price, outcome)
        shared = TeamOutcome if self.algorithm == "ppo_single" else SharedOutcome
        return shared(self.price, outcome, charge_overhead=self.charge_overhead)

    def _run(self) -> RunConfig:
        names = ("updates", "images", "seed", "cache_images", "calibration_images", "checkpoint_every", "amp",
                 "log_images_every", "wandb")  # fmt: skip
        return RunConfig(**{name: getattr(self, name) for name in names})

    def _finetune(self) -> FinetuneConfig | None:
        if self.finetune == "off":
            return None
        return FinetuneConfig(
            when=self.finetune, every=self.finetune_every, steps=self.finetune_steps, batch_size=self.finetune_batch,
            lr=self.finetune_lr, distill=self.distill, cache_images=self.cache_images, amp=self.amp, seed=self.seed,
        )  # fmt: skip


# RL4EViT, see `vitprune_env.agents.presets`.
RL4EVIT: dict[str, Any] = {"reward": "paper", "lr": 1e-3, "anneal_from": 0.7, "paper_sizes": True, "updates": 50,
                           "images": 64, "epochs": 15, "minibatch": None}  # fmt: skip
FLAGS: dict[str, TrainingFlags] = {"default": TrainingFlags(), "rl4evit": TrainingFlags(**RL4EVIT)}
