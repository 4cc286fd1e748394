"""Settings of a training run, and the presets."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from ...game.rewards import correct, log_probability, margin, probability

# What a resumed run may have otherwise: what is written when, and the remedies for a run that exploded.
MAY_CHANGE = frozenset({"checkpoint_every", "log_images_every", "wandb", "lr", "max_grad_norm"})

REWARDS = ("shared_outcome", "paper", "attribution")
OUTCOMES = {"correct": correct, "log_probability": log_probability, "probability": probability, "margin": margin}
ALGORITHMS = ("mappo", "ppo_single")
FINETUNE = ("off", "alternate", "after")


@dataclass(frozen=True)
class TrainConfig:
    """Settings of `train`; the defaults are what learnt best in minutes on the built-in task."""

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
    """What agents are paid: the image's outcome, shared; paper 000's Eq. 2; or what their token contributed to the
    log-probability of the true class, to first order."""
    outcome: Literal["correct", "log_probability", "probability", "margin"] = "correct"
    """What counts as outcome: 1 for a correct class, or of the true class the clamped log-probability, the probability,
    or the clamped margin of its logit; see `vitprune_env.reward`. Attribution, which has no derivative of `correct`,
    then takes the log-probability without a clamp."""
    merge_cost: float = 0.0
    """Shared outcome: what a token pays that merges into another (games in which tokens may merge)."""
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

    def __post_init__(self) -> None:
        _check(self, "log_images_every", self.log_images_every >= 0, "at least 0")
        for name in ("updates", "images", "epochs", "calibration_images", "checkpoint_every",
                     "finetune_every", "finetune_steps", "finetune_batch"):  # fmt: skip
            _check(self, name, getattr(self, name) >= 1, "at least 1")
        _check(self, "minibatch", self.minibatch is None or self.minibatch >= 2, "at least 2 or None")
        _check(self, "update_chunk", self.update_chunk is None or self.update_chunk >= 1, "at least 1 or None")
        _check(self, "precision", self.precision in ("fp32", "bf16"), "'fp32' or 'bf16'")
        for name in ("lr", "finetune_lr", "price", "outcome_bonus"):
            _check(self, name, getattr(self, name) > 0, "above 0")
        for name in ("value_clip", "huber_delta", "max_grad_norm"):
            _check(self, name, getattr(self, name) is None or getattr(self, name) > 0, "above 0 or None")
        _check(self, "clip", 0 < self.clip < 1, "between 0 and 1")
        _check(self, "cache_images", self.cache_images >= 0, "at least 0")
        named = {"reward": REWARDS, "outcome": tuple(OUTCOMES), "finetune": FINETUNE, "algorithm": ALGORITHMS}
        for name, known in named.items():
            _check(self, name, getattr(self, name) in known, f"one of {', '.join(known)}")
        fits = self.algorithm == "mappo" or self.reward == "shared_outcome"
        _check(self, "reward", fits, "'shared_outcome' with algorithm='ppo_single' (the others pay token by token)")
        for name in ("discount", "trace", "lr_final", "anneal_from", "anneal_part", "distill"):
            _check(self, name, 0 <= getattr(self, name) <= 1, "0 to 1")
        for name in ("merge_cost", "charge_overhead"):
            heard = self.reward == "shared_outcome" or not getattr(self, name)
            _check(self, name, heard, "nothing unless reward='shared_outcome', which alone charges it")
        if self.keep_cost is not None:
            _check(self, "keep_cost", self.keep_cost > 0 and self.reward == "paper", "above 0, with reward='paper'")
        if self.adaptive:
            low, high = (*self.adaptive, 0.0, 0.0)[:2]
            fine = len(self.adaptive) == 2 and 0 < low < high <= 1
            _check(self, "adaptive", fine, "two shares of dense, increasing, above 0 and at most 1")
            plain = self.algorithm == "mappo" and self.reward != "paper" and self.finetune == "off"
            _check(self, "adaptive", plain, "algorithm='mappo', a reward with a price, finetune='off', or no range")
        given = [name for name in ("target_gmacs", "target_keep", "target_share") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"budget: expected at most one of target_gmacs, target_keep, target_share, got {given}")
        if given and self.adaptive:
            raise ValueError(f"budget: expected {given[0]} or the range adaptive={self.adaptive}, got both")

    @property
    def is_free(self) -> bool:
        """Whether the two weights of the paper's reward decide how much is kept, and no budget does."""
        asked = (self.target_gmacs, self.target_keep, self.target_share)
        return self.keep_cost is not None and all(value is None for value in asked)

    @property
    def budget(self) -> dict[str, float | None]:
        """The budget as `target_macs` takes it."""
        given = {"gmacs": self.target_gmacs, "keep": self.target_keep, "share": self.target_share}
        if any(value is not None for value in given.values()) or self.is_free:
            return given
        if self.adaptive:
            return {**given, "share": sum(self.adaptive) / 2}
        # The paper's actor looking at every token once costs a quarter of the small built-in backbone.
        return {**given, "share": 0.6 if self.paper_sizes else 0.35}

    def differences(self, other: dict[str, Any]) -> list[str]:
        """Names of the settings that differ from those in a checkpoint, but for those that may change on the way."""
        mine = self.as_json()
        return [name for name in mine if name not in MAY_CHANGE and mine[name] != other.get(name)]

    def as_json(self) -> dict[str, Any]:
        """The settings as JSON values."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _check(config: TrainConfig, name: str, fine: bool, expected: str) -> None:
    if not fine:
        raise ValueError(f"{name}: expected {expected}, got {getattr(config, name)!r}")


def rl4evit(config: TrainConfig | None = None) -> TrainConfig:
    """Paper 000's settings: Eq. 2, its network sizes, K = 15 passes over all agent-steps at once.

    The paper's learning rate of 5e-5 (its code: 5e-6) is for epochs over ImageNet; in the updates of a run that takes
    minutes the policy would not move, so that 1e-3, falling to 5 %, stands in its place. The cost of keeping
    (alpha) is fed forward from the budget instead of being set by hand. Images per update and entropy bonus are those
    of the authors' code.
    """
    return replace(
        TrainConfig() if config is None else config,
        reward="paper",
        lr=1e-3,
        anneal_from=0.7,
        paper_sizes=True,
        updates=50,
        images=64,
        epochs=15,
        minibatch=None,
        entropy=0.01,
    )


PRESETS: dict[str, TrainConfig] = {"default": TrainConfig(), "rl4evit": rl4evit()}
