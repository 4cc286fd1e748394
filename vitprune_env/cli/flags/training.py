"""The flags of training, in groups, and the settings objects that they stand for."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, cast

import tyro

from vitprune_env.agents import (
    Budget,
    BudgetRange,
    Equilibrium,
    FinetuneConfig,
    GMACs,
    KeepRate,
    LearnerConfig,
    LightNetworks,
    MAPPOConfig,
    PaperNetworks,
    PGPEConfig,
    PPOSingleConfig,
    Preset,
    RunConfig,
    Share,
)
from vitprune_env.cli.flags.common import TargetFlags
from vitprune_env.errors import SettingsError
from vitprune_env.game.rewards import (
    START_PRICE,
    Attribution,
    PaperCodeReward,
    PaperReward,
    RewardFn,
    SharedOutcome,
    TeamOutcome,
    correct,
    log_probability,
    margin,
    probability,
)
from vitprune_env.types import Site

LEARNERS = {"mappo": MAPPOConfig, "ppo_single": PPOSingleConfig, "pgpe": PGPEConfig}
OUTCOMES = {"correct": correct, "log_probability": log_probability, "probability": probability, "margin": margin}


@dataclass(frozen=True)
class BudgetFlags(TargetFlags):
    """What the trained policy may cost, its own MACs included; give at most one of the first four."""

    target_share: float | None = None
    """Budget as a share of the dense network's MACs; without any budget 0.35, or 0.6 with --paper-sizes."""
    adaptive: tuple[float, ...] = ()
    """Smallest and largest budget, as shares of dense, of one policy that serves all in between; empty: one budget."""
    anneal_from: float = Budget.anneal_from
    """Share of the dense MACs that the target starts from: about what the untrained policy costs."""
    anneal_part: float = Budget.anneal_part
    """Part of the updates over which the target moves to the budget, 0 to 1."""
    price_rate: float = Budget.price_rate
    """Relative change of the price per relative excess of MACs, each update."""
    price_gain: float = Budget.price_gain
    """How strongly the price answers an excess at once."""
    sampled: bool = Budget.sampled
    """Whether the deployed policy draws its actions; otherwise it takes the most probable ones."""
    fixed_counts: bool = Budget.fixed_counts
    """Whether the deployed policy keeps equally many tokens in every image, its means; otherwise those above a
    threshold."""

    def budget(self, usual: Budget) -> Budget:
        """The budget that the flags stand for; `usual` where they name none.

        Raises:
            SettingsError: for more than one budget, or a range without two ends.
        """
        follow = values_of(self, Budget)
        targets = {"target_share": Share, "target_gmacs": GMACs, "target_keep": KeepRate}
        given = {name: getattr(self, name) for name in targets if getattr(self, name) is not None}
        if len(given) + bool(self.adaptive) > 1:
            raise SettingsError(f"budget: expected at most one of {', '.join(targets)} and adaptive, got {given}")
        if self.adaptive:
            if len(self.adaptive) != 2:
                raise SettingsError(f"adaptive: expected the smallest and the largest share, got {self.adaptive}")
            return BudgetRange(*self.adaptive, **follow)
        for name, value in given.items():
            return targets[name](value, **follow)
        return replace(usual, **follow)

    @property
    def is_given(self) -> bool:
        """Whether the flags name a budget."""
        return bool(self.adaptive) or any(
            value is not None for value in (self.target_share, self.target_gmacs, self.target_keep)
        )


@dataclass(frozen=True)
class RewardFlags:
    """Where tokens are pruned, and what agents are paid."""

    sites: tuple[str, ...] = ()
    """Where tokens are pruned, such as 3 6 9 or 4.attn; empty: the backbone's own sites."""
    actions: Literal["keep", "keep_or_merge", "keep_or_fuse", "drop_merge_keep"] = "keep"
    """What a token may do beside staying: be dropped, merge into the kept token most like it, be fused with all others
    that leave, or choose between the first two."""
    reward: Literal["shared_outcome", "paper", "paper_code", "attribution"] = "shared_outcome"
    """The image's outcome, shared; RL4EViT's Eq. 2; what its authors' code pays instead; or what a token contributed to
    the log-probability of the true class, to first order."""
    outcome: Literal["correct", "log_probability", "probability", "margin"] = "correct"
    """What counts as outcome: 1 for a correct class, or of the true class the clamped log-probability, the probability,
    or the clamped margin of its logit. Attribution needs a derivative; with `correct` it takes the log-probability
    without a clamp."""
    price: float = START_PRICE
    """Price at the start of carrying one token through the whole network, in units of the outcome."""
    charge_overhead: bool = False
    """Shared outcome: whether agents pay for the MACs of the policy itself."""
    outcome_bonus: float = 1.0
    """Paper's reward: weight of the outcome (beta)."""
    keep_cost: float | None = None
    """Paper's reward: cost of keeping a token (alpha), reached by annealing; without a budget, the ratio of the two
    alone decides how much is kept. None: follows from the budget."""
    pay: Literal["kept", "all"] = "kept"
    """Paper's reward: who gets the outcome, the tokens that are kept, or all (Eq. 1 as printed)."""
    scaled: bool = True
    """Paper's reward: whether the outcome is multiplied by the number of agents; Eq. 1 as printed: --no-scaled."""

    def made(self, joint: bool) -> RewardFn:
        """The reward, for one agent that decides for all tokens or for an agent per token."""
        outcome = OUTCOMES[self.outcome]
        if self.reward == "paper":
            cost: dict[str, Any] = {} if self.keep_cost is None else {"keep_cost": self.keep_cost}
            return PaperReward(
                outcome_bonus=self.outcome_bonus, outcome=outcome, scaled=self.scaled, pay=self.pay, **cost
            )
        if self.reward == "paper_code":
            return PaperCodeReward(outcome=outcome)
        if self.reward == "attribution":
            return Attribution(self.price) if outcome is correct else Attribution(self.price, outcome)
        return (TeamOutcome if joint else SharedOutcome)(self.price, outcome, charge_overhead=self.charge_overhead)


@dataclass(frozen=True)
class NetworkFlags:
    """Actor and critic."""

    paper_sizes: bool = False
    """Whether actor and critic have RL4EViT's hidden widths (4D, 256, 64)."""
    actor_hidden: tuple[int, ...] = LightNetworks.actor_hidden
    """Hidden widths of the actor; empty: (D / 2), or the paper's with --paper-sizes."""
    critic_hidden: tuple[int, ...] = LightNetworks.critic_hidden
    """Hidden widths of the critic, which is not deployed; empty: (64, 64), or the paper's with --paper-sizes."""
    keep_bias: float = LightNetworks.keep_bias
    """Log-odds of keeping a token at the start."""
    critic_context: bool = LightNetworks.critic_context
    """Whether MAPPO's critic is told the mean of the alive tokens, their share, and how far the game has come."""
    senses: tuple[str, ...] = LightNetworks.senses
    """What actor and critic see beside a token, such as neighbours or class_attention; empty: nothing."""

    def made(self) -> LightNetworks:
        """The sizes of the networks."""
        return (PaperNetworks if self.paper_sizes else LightNetworks)(
            self.actor_hidden, self.critic_hidden, self.keep_bias, self.critic_context, self.senses
        )


@dataclass(frozen=True)
class LearnerFlags(MAPPOConfig):
    """The algorithm and its updates: a flag for every setting of `MAPPOConfig`, and the noise of PGPE."""

    noise: float = PGPEConfig.noise
    """PGPE: standard deviation of the disturbances of the parameters, in logits."""
    networks: tyro.conf.Suppress[LightNetworks | PaperNetworks] = MAPPOConfig.networks  # has a group of its own

    def __post_init__(self) -> None:
        """Values are checked in `made`, whose errors are one line; the parser would print its own page."""

    def made(self, kind: type[LearnerConfig], networks: LightNetworks) -> LearnerConfig:
        """The learner, of a kind that has some of these settings."""
        return kind(**{**values_of(self, kind), "networks": networks})


@dataclass(frozen=True)
class RunFlags(RunConfig):
    """How long, and what is written when: a flag for every setting of `RunConfig`."""

    seed: tyro.conf.Suppress[int] = RunConfig.seed  # among the flags that all commands have

    def __post_init__(self) -> None:
        """Values are checked in `made`, whose errors are one line; the parser would print its own page."""

    def made(self, seed: int) -> RunConfig:
        """The settings of the run."""
        return RunConfig(**{**values_of(self, RunConfig), "seed": seed})


@dataclass(frozen=True)
class FinetuneFlags:
    """Whether the network learns, too (Algorithm 1)."""

    finetune: Literal["off", "alternate", "after"] = "off"
    """Never, every so many updates, or once the policy is trained."""
    finetune_every: int = FinetuneConfig.every
    """Updates between two phases, with `alternate`."""
    finetune_steps: int = FinetuneConfig.steps
    """Gradient steps on the network in all."""
    finetune_batch: int = FinetuneConfig.batch_size
    """Images per step."""
    finetune_lr: float = FinetuneConfig.lr
    """Learning rate of the network; cosine, with a warm-up."""
    trainable: Literal["after_first_site", "all"] = "after_first_site"
    """Which blocks learn; all of them, as in Algorithm 1, only with --cache-images 0."""
    distill: float = FinetuneConfig.distill
    """Weight of the dense model's soft labels against the true class, 0 to 1."""

    def made(self, run: RunConfig) -> FinetuneConfig | None:
        """The settings of fine-tuning; None: the network stays as it is."""
        if self.finetune == "off":
            return None
        return FinetuneConfig(
            when=self.finetune,
            every=self.finetune_every,
            steps=self.finetune_steps,
            batch_size=self.finetune_batch,
            lr=self.finetune_lr,
            trainable=self.trainable,
            distill=self.distill,
            cache_images=run.cache_images,
            amp=run.amp,
            seed=run.seed,
        )


@dataclass(frozen=True)
class TrainingFlags:
    """All settings of training but the seed."""

    algorithm: Literal["mappo", "ppo_single", "pgpe"] = "mappo"
    """Which agents learn: every token for itself (MAPPO); one that decides for all tokens of an image; or all together,
    by disturbing the parameters that they share (PGPE), from a policy that merges."""
    init_from: str = "new"
    """What training starts from: new (an actor with fresh weights), distilled (what the network's own late attention
    says of tokens), evit (the tokens that EViT keeps; not with PGPE), or the file of a policy."""
    budget: BudgetFlags = field(default_factory=BudgetFlags)
    reward: RewardFlags = field(default_factory=RewardFlags)
    run: RunFlags = field(default_factory=RunFlags)
    learner: LearnerFlags = field(default_factory=LearnerFlags)
    networks: NetworkFlags = field(default_factory=NetworkFlags)
    finetune: FinetuneFlags = field(default_factory=FinetuneFlags)

    @classmethod
    def of(cls, preset: Preset) -> TrainingFlags:
        """The flags whose defaults are a preset's settings; its budget stands where no flag names one."""
        sizes = preset.learner.networks
        names = {kind: name for name, kind in LEARNERS.items()}
        return cls(
            algorithm=cast(Any, names[type(preset.learner)]),
            init_from=preset.init_from,
            budget=_flags(BudgetFlags, preset.budget),
            reward=_reward_flags(preset),
            run=_flags(RunFlags, preset.run),
            learner=_flags(LearnerFlags, preset.learner),
            networks=replace(_flags(NetworkFlags, sizes), paper_sizes=isinstance(sizes, PaperNetworks)),
        )

    def settings(self, preset: Preset, seed: int) -> Preset:
        """The settings that the flags stand for, in the place of a preset's.

        Raises:
            ValueError: for settings out of range, or that do not fit together.
        """
        usual = preset.budget or Share(0.35)
        if self.reward.keep_cost is not None and not self.budget.is_given:
            usual = Equilibrium()
        elif self.networks.paper_sizes and not isinstance(preset.learner.networks, PaperNetworks):
            usual = Share(0.6)  # the paper's actor looking at every token once costs a quarter of the built-in backbone
        learner, run = self.learner.made(LEARNERS[self.algorithm], self.networks.made()), self.run.made(seed)
        return replace(
            preset,
            budget=self.budget.budget(usual),
            learner=learner,
            reward=self.reward.made(learner.joint),
            run=run,
            finetune=self.finetune.made(run),
            sites=self.reward.sites or None,
            actions=self.reward.actions,
            init_from=self.init_from,
        )


def _reward_flags(preset: Preset) -> RewardFlags:
    """The flags of a preset's reward; a cost of keeping is among them where no budget decides it."""
    flags = RewardFlags(sites=tuple(Site.parse(site).label for site in preset.sites or ()))
    if isinstance(preset.reward, SharedOutcome):
        names: dict[Any, Any] = {outcome: name for name, outcome in OUTCOMES.items()}
        return replace(flags, outcome=names[preset.reward.outcome], price=float(preset.reward.price))
    if not isinstance(preset.reward, PaperReward):
        return flags
    cost = preset.reward.keep_cost if isinstance(preset.budget, Equilibrium) else None
    same = {name: getattr(preset.reward, name) for name in ("outcome_bonus", "pay", "scaled")}
    return replace(flags, reward="paper", keep_cost=cost, **same)


def values_of(flags: Any, settings: type[Any]) -> dict[str, Any]:
    """The values that a group of flags has for the fields of a settings class."""
    return {each.name: getattr(flags, each.name) for each in fields(settings)}


def _flags(group: type[Any], settings: Any) -> Any:
    """A group of flags with the values that a settings object has under the same names."""
    shared = {each.name for each in fields(group)} & {each.name for each in fields(settings)}
    return group(**{name: getattr(settings, name) for name in shared})
