"""Parameter-exploring policy gradients (PGPE; Sehnke et al., 2010): all agents of an image explore together.

Where every token draws its own action, the outcome of an image depends on a thousand draws, and says next to nothing
about each. Here the few parameters that all agents share are disturbed, once per image, and play is deterministic: the
agents of an image try the same thing together, and what is deployed is what was played. Every image is played twice,
with a disturbance and its opposite, so that what makes an image hard cancels.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import Any, ClassVar, cast

import torch
from tianshou.algorithm.algorithm_base import OnPolicyAlgorithm
from tianshou.data import SequenceSummaryStats
from tianshou.data.types import RolloutBatchProtocol
from torch import Tensor, nn

from ...envs.actions import ActionKind
from ...errors import SettingsError
from ...game.rewards import START_PRICE, RewardFn, TeamOutcome, has_price, log_probability
from ...types import Decision, Observation
from ..merging.policy import MergePolicy, PairActor, merged
from ..policies import full_precision
from ..shared.noise import exploration_noise
from ..shared.settings import check
from .exploration import ExploringPolicy, View
from .gradient import GradientStep
from .learner import Learner, LearnerConfig, LearnerStats, Parts, finite_table


@dataclass(frozen=True)
class PGPEConfig(LearnerConfig):
    """Parameter-exploring policy gradients, from a `MergePolicy` to start from.

    An update is one step with all its games, so that `epochs` and `minibatch` stay as they are.
    """

    lr: float = 0.03
    """Learning rate of Adam at the start; parameters are in logits."""
    max_grad_norm: float | None = None
    """Largest norm of the gradient; None: no clipping."""
    noise: float = 0.25
    """Standard deviation of the disturbances, in logits per standard deviation of a feature."""

    joint: ClassVar[bool] = True
    games_per_image: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, "noise", self.noise > 0, "above 0")
        for name in ("epochs", "minibatch"):
            usual = getattr(LearnerConfig, name)
            check(
                self, name, getattr(self, name) == usual, f"{usual} (PGPE takes one step with all games of an update)"
            )

    def default_reward(self) -> RewardFn:
        """The reward of `train` if none is given: a soft outcome, which tells close calls apart."""
        return TeamOutcome(price=START_PRICE, outcome=log_probability)

    def check_reward(self, reward: RewardFn) -> None:
        """Refuse a reward that is meant for single tokens, or that cannot follow a budget.

        Raises:
            SettingsError: unless the reward has a price, and an attribute `for_team` that is true.
        """
        if not (getattr(reward, "for_team", False) and has_price(reward)):
            raise SettingsError(
                f"reward: expected one for a team, with a price, such as TeamOutcome, for PGPE, got "
                f"{type(reward).__name__}"
            )

    def check_start(self, start: Any) -> None:
        """Refuse anything but a `MergePolicy`.

        Raises:
            SettingsError: naming it.
        """
        if not isinstance(start, MergePolicy):
            raise SettingsError(
                f"start: expected a MergePolicy, such as distilled_policy(...) gives, for PGPE, got {start!r}"
            )

    def critic(self, embed_dim: int, num_actions: int, generator: torch.Generator) -> nn.Module:
        """There is none."""
        return nn.Identity()

    def explorer(self, actor: Any, actions: ActionKind, generator: torch.Generator, view: View) -> ParameterExplorer:
        """The policy that plays in training."""
        return ParameterExplorer(actor, generator, self.noise)

    def algorithm(self, parts: Parts) -> OnPolicyAlgorithm[Any]:
        """The update."""
        return PGPE(parts, self)


class ParameterExplorer(ExploringPolicy):
    """Plays a `MergePolicy` whose parameters are disturbed, image by image: games 2 i and 2 i + 1 in opposite ways.

    Attributes:
        noise: `[B, T, F + 1]`, what was added to weights and biases in the current games.

    Args:
        actor: the parameters.
        generator: its seed is the seed of the noise; nothing is drawn from it.
        deviation: of the noise.
    """

    def __init__(self, actor: PairActor, generator: torch.Generator, deviation: float) -> None:
        super().__init__(cast(Any, actor), generator)
        self.pair_actor, self.deviation = actor, deviation
        deployed = MergePolicy(actor)
        self.needs, self.attention_bias = deployed.needs, deployed.attention_bias

    def reset(self, batch_size: int, num_agents: int) -> None:
        """Start a new batch of games."""
        super().reset(batch_size, num_agents)
        games = self._first_game + torch.arange(batch_size)
        shape = self.pair_actor.num_sites, self.pair_actor.num_features + 1
        self.noise = self.deviation * disturbances(self.seed, games, *shape).to(self.pair_actor.weight)

    @torch.no_grad()
    def decide(self, obs: Observation) -> Decision:
        """Merge where the disturbed score is below 0."""
        assert self.noise is not None
        with full_precision(obs.tokens.device.type):
            pairs = self.pair_actor.pairs(obs)
            stays = self.pair_actor(pairs.features, obs.step, self.noise[pairs.image, obs.step]) > 0
        decision = merged(obs, pairs, stays, self.pair_actor)
        self.actions.append(obs.gather(decision.keep).long())
        self.log_probs.append(torch.zeros_like(self.actions[-1], dtype=torch.float32))  # nothing is drawn
        return decision


def disturbances(seed: int, games: Tensor, *shape: int) -> Tensor:
    """Standard normal numbers, opposite in games 2 i and 2 i + 1, as a function of seed and game, `[B, *shape]`."""
    count = torch.Size(shape).numel()
    pairs = (games // 2).repeat_interleave(count)
    uniform = exploration_noise(seed, pairs, 0, torch.arange(count).repeat(len(games)))
    normal = sqrt(2) * torch.erfinv(2 * uniform.double() + 2.0**-24 - 1)
    sign = 1 - 2 * (games % 2).double()
    return (normal.view(len(games), count) * sign[:, None]).float().view(len(games), *shape)


class PGPE(Learner):
    """One step along the estimated gradient of the mean return by the actor's parameters."""

    def _update_with_batch(self, batch: RolloutBatchProtocol, batch_size: int | None, repeat: int) -> LearnerStats:
        log, norm = cast(GradientStep, self.optim).step_along(self._estimated, self.processes)
        table = finite_table([torch.cat([log, norm[None]])], 1, self.processes)
        return LearnerStats(
            loss=SequenceSummaryStats.from_sequence(table[:, 0].tolist()),
            gradient_steps=1,
            grad_norm=float(table[0, -1]),
        )

    def _estimated(self) -> Tensor:
        """Set the gradient of minus the mean return, estimated from this process's games; its part of that mean, `[1]`.

        With a disturbance e and its opposite, the estimate is the mean of `return * e / deviation ** 2` (Sehnke et al.,
        2010, section 2.2, symmetric sampling). Its expectation is the slope of a return that is linear in e; what is
        quadratic in e cancels.
        """
        actor, noise = cast(PairActor, self.actor), self._games.noise
        assert noise is not None
        returns = self._games.reward.sum(dim=(0, 2))  # [B]
        share = 1 / self.processes.span(len(returns))[1]
        deviation = cast(PGPEConfig, self.config).noise
        gradient = -share * (returns[:, None, None] * noise).sum(dim=0) / deviation**2  # [T, F + 1]
        actor.weight.grad, actor.bias.grad = gradient[:, :-1].contiguous(), gradient[:, -1].contiguous()
        return -share * returns.sum()[None]
