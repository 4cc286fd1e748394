"""What the agents are paid. A reward is an object handed to the game.

Each reward has an immediate part, known when the agents have decided, and a deferred part, known when the image has
been classified. `[T, B, N]` tables hold one entry per step, image and token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from math import isfinite
from numbers import Real
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from vitprune_env.types import Step

OutcomeFn = Callable[[Tensor, Tensor], Tensor]
START_PRICE = 0.01  # where training starts with the price of carrying a token through the network, in units of outcome


def correct(logits: Tensor, labels: Tensor) -> Tensor:
    """gamma of RL4EViT: 1 if the image is classified correctly, else 0; `[B]` float."""
    return (logits.argmax(dim=1) == labels).to(logits)


def unclamped_log_probability(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of the true class; `[B]` float, differentiable everywhere."""
    return logits.log_softmax(dim=1).gather(1, labels[:, None]).squeeze(1)


def log_probability(logits: Tensor, labels: Tensor, floor: float = -2.0) -> Tensor:
    """Log-probability of the true class, clamped below and shifted to end at 1; `[B]` float."""
    return 1.0 + unclamped_log_probability(logits, labels).clamp(min=floor)


def probability(logits: Tensor, labels: Tensor) -> Tensor:
    """Probability of the true class, 0 to 1; `[B]` float."""
    return logits.softmax(dim=1).gather(1, labels[:, None]).squeeze(1)


def margin(logits: Tensor, labels: Tensor, width: float = 1.0) -> Tensor:
    """True class's logit above the best other one, in units of `width`, clamped to -1..1; `[B]` float.

    Unlike `correct` it tells a narrow failure from a clear one, and unlike the log-probability it stops paying for
    confidence once the class is right by `width`.
    """
    true = logits.gather(1, labels[:, None]).squeeze(1)
    others = logits.scatter(1, labels[:, None], float("-inf")).amax(dim=1)
    return ((true - others) / width).clamp(-1.0, 1.0)


@runtime_checkable
class RewardFn(Protocol):
    """A reward for the game of token pruning.

    A reward may have a price, which a budget then moves until play costs what it should (`has_price`, `at_price`), or
    weights for which it is known where play settles (`SettlingReward`).
    """

    def score(self, logits: Tensor, labels: Tensor) -> Tensor:
        """How well an image came out, `[B]`."""
        ...

    def immediate(self, step: Step) -> Tensor:
        """The part known right after a decision, `[B, N]`."""
        ...

    def deferred(self, steps: Sequence[Step], score: Tensor) -> Tensor:
        """The part that depends on the outcome `score` `[B]`, for all steps played so far, `[T, B, N]`."""
        ...


@runtime_checkable
class SettlingReward(RewardFn, Protocol):
    """A reward whose weights alone decide how many tokens are kept, because play settles in a known equilibrium."""

    @property
    def keep_cost(self) -> float:
        """What keeping a token costs, the weight that decides."""
        ...

    def equilibrium(self, accuracy: float, num_tokens: int) -> float:
        """Fraction of the tokens, 0 to 1, that is kept at every site when play has settled.

        Args:
            accuracy: share of the images that are classified correctly.
            num_tokens: N.
        """
        ...

    def settled(self, fraction: float, accuracy: float, num_tokens: int) -> RewardFn:
        """The same reward with the weights for which play settles where `fraction` of the tokens is kept."""
        ...


def check_reward(reward: Any) -> None:
    """Refuse what is not a reward.

    Raises:
        TypeError: for an object without the methods of `RewardFn`, or a class in place of an object; for a field of a
            dataclass that is not of its type.
        ValueError: for a number among its fields that is NaN or infinite.
    """
    if isinstance(reward, type) or not isinstance(reward, RewardFn):
        raise TypeError(
            f"reward: expected an object with the methods of RewardFn, such as SharedOutcome(), got {reward!r}"
        )
    for each in fields(reward) if is_dataclass(reward) else ():
        declared = each.type if isinstance(each.type, str) else getattr(each.type, "__name__", "")
        _check_field(each.name, getattr(reward, each.name), declared)


def check_paid(method: str, paid: Any, shape: Sequence[int]) -> Tensor:
    """What a method of a reward returned; a shape that broadcasting would hide is refused.

    Raises:
        TypeError: for what is no tensor.
        ValueError: for a tensor of another shape.
    """
    if not isinstance(paid, Tensor):
        raise TypeError(f"reward: expected {method}(...) to return a tensor {list(shape)}, got {paid!r}")
    if tuple(paid.shape) != tuple(shape):
        raise ValueError(f"reward: expected {method}(...) to return a tensor {list(shape)}, got {list(paid.shape)}")
    return paid


def _check_field(name: str, value: Any, declared: str) -> None:
    """Refuse numbers of a reward that are NaN or infinite, and what is not of the declared type."""
    kind, *others = declared.split(" | ")
    if isinstance(value, Tensor) or (value is None and "None" in others):
        return
    if kind == "float" and (isinstance(value, bool) or not isinstance(value, Real) or not isfinite(value)):
        raise ValueError(f"{name}: expected a finite number, got {value!r}")
    if kind == "bool" and not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {value!r}")
    if kind == "OutcomeFn" and not callable(value):
        raise TypeError(f"{name}: expected a function of logits and labels, got {value!r}")


def has_price(reward: RewardFn) -> bool:
    """Whether a reward has a price: a method `at_price(price)`, or a dataclass field `price`."""
    by_field = is_dataclass(reward) and any(each.name == "price" for each in fields(reward))
    return hasattr(reward, "at_price") or by_field


def at_price(reward: Any, price: float | Tensor) -> RewardFn:
    """The same reward at another price.

    Args:
        reward: one with a price, see `has_price`.
        price: one number, or `[B]`, a price for each image.
    """
    return reward.at_price(price) if hasattr(reward, "at_price") else replace(reward, price=price)


@dataclass(frozen=True)
class PaperReward:
    """RL4EViT (Eq. 1 and 2), scaled by the number of agents and paid to kept tokens alone unless asked otherwise.

    Agent i that is kept at site l earns `-keep_cost + outcome_bonus * gamma * N / n_l`, a pruned one earns 0; gamma is
    1 if the image is classified correctly and n_l is the number of tokens kept at that site. Then a token is worth
    keeping iff `outcome_bonus * gamma * N / n > keep_cost`, so play settles where the kept fraction is
    `gamma * outcome_bonus / keep_cost` (the sentence on alpha/beta in RL4EViT has the two swapped).

    The printed form, `scaled=False`, has `gamma / n_l` instead, with weights alpha for the first and beta for the
    second part. It settles at `gamma * outcome_bonus / keep_cost` tokens, about one for the printed ratios, which only
    make sense with the N. Eq. 1 also prints the second part for every agent, `pay="all"`; the text around it and the
    authors' code give it to the kept tokens. Paid to all, it depends on an agent's own choice through n_l alone, which
    is smaller without the agent. As long as any other token is kept, pruning pays more, and nearly nothing is kept.
    """

    keep_cost: float = 1.0  # alpha as printed
    outcome_bonus: float = 0.5  # beta as printed
    outcome: OutcomeFn = correct
    scaled: bool = True  # False: r2 = gamma / n_l as printed
    pay: Literal["kept", "all"] = "kept"  # who gets r2; as printed all agents that decide at the site

    def __post_init__(self) -> None:
        if self.pay not in ("kept", "all"):
            raise ValueError(f"pay: expected 'kept' or 'all', got {self.pay!r}")

    def score(self, logits: Tensor, labels: Tensor) -> Tensor:
        """gamma, `[B]`."""
        return self.outcome(logits, labels)

    def immediate(self, step: Step) -> Tensor:
        """`keep_cost * r1`: -1 for a kept token, `[B, N]`; waiting tokens cost nothing."""
        return -self.keep_cost * step.carried.float()

    def deferred(self, steps: Sequence[Step], score: Tensor) -> Tensor:
        """`outcome_bonus * r2`: gamma * N / n_l for those who are paid (printed: gamma / n_l), `[T, B, N]`.

        Where no token is kept, nobody is paid.
        """
        kept = torch.stack([step.carried for step in steps]).to(score)
        count = kept.sum(dim=2, keepdim=True)
        paid = kept if self.pay == "kept" else (count > 0) * torch.stack([step.acted for step in steps])
        total = kept.shape[2] if self.scaled else 1
        per_token = score[:, None] * total / count.clamp(min=1)
        return self.outcome_bonus * paid * per_token

    def equilibrium(self, accuracy: float, num_tokens: int) -> float:
        """Fraction of the tokens at which play settles with these weights, see `SettlingReward`."""
        if self.pay == "all":
            return 0.0
        fraction = accuracy * self.outcome_bonus / self.keep_cost
        return min(1.0, fraction if self.scaled else fraction / num_tokens)

    def settled(self, fraction: float, accuracy: float, num_tokens: int) -> PaperReward:
        """The same reward with the `keep_cost` for which play settles at `fraction`, see `SettlingReward`.

        With `pay="all"` there is no such cost, and the reward stays as it is.
        """
        if self.pay == "all":
            return self
        tokens = fraction if self.scaled else fraction * num_tokens
        return replace(self, keep_cost=self.outcome_bonus * accuracy / tokens)


@dataclass(frozen=True)
class PaperCodeReward:
    """What the authors' code of RL4EViT pays in place of Eq. 1 and 2: r8 + r9.

    r8 gives every kept token `bonus / n` if the image is classified correctly, n being the number of tokens kept. r9
    holds the kept share `n / N` near a target per site: with the excess d over it, a kept token is paid `-exp(d)` where
    d > 0, otherwise a pruned one `-exp(-d)`. alpha and beta do not occur. In the code tokens that left earlier are paid
    as pruned ones; here nobody is paid after leaving.
    """

    bonus: float = 24.0
    keep: tuple[float, ...] = (0.7, 0.49, 0.343)  # target of the kept share after each site
    outcome: OutcomeFn = correct

    def score(self, logits: Tensor, labels: Tensor) -> Tensor:
        """gamma, `[B]`."""
        return self.outcome(logits, labels)

    def immediate(self, step: Step) -> Tensor:
        """Nothing, `[B, N]`: the target depends on which step it is."""
        return torch.zeros_like(step.carried, dtype=torch.float32)

    def deferred(self, steps: Sequence[Step], score: Tensor) -> Tensor:
        """r8 + r9, `[T, B, N]`.

        Raises:
            ValueError: for more sites than targets.
        """
        if len(steps) > len(self.keep):
            raise ValueError(f"keep: expected a target for each of {len(steps)} sites, got {self.keep!r}")
        kept, acted = (torch.stack([getattr(step, name) for step in steps]) for name in ("carried", "acted"))
        count = kept.sum(dim=2, keepdim=True)
        excess = count / kept.shape[2] - score.new_tensor(self.keep[: len(steps)])[:, None, None]
        for_kept = self.bonus * score[:, None] / count.clamp(min=1) - excess.exp() * (excess > 0)
        for_pruned = -(-excess).exp() * (excess <= 0)
        return torch.where(kept, for_kept, for_pruned) * acted


@dataclass(frozen=True)
class SharedOutcome:
    """Every agent is paid the image's outcome once; a kept token is charged for the blocks it passes through.

    The outcome reaches an agent at the last step in which it acted, pruned ones included. A kept token is charged
    `price` times the share of the network between this site and the next one, so `price` is what it costs to carry
    one token through the whole network, in units of the outcome. A budget is met by moving the price. If asked for,
    tokens that merge into another pay, too, and those who decide share the MACs of evidence and policy at the site, at
    the same price as the network's.
    """

    price: float | Tensor = 0.035  # the same for all images, or [B]
    outcome: OutcomeFn = correct
    merge_cost: float = 0.0  # paid once by a token that merges into another, in units of the outcome
    charge_overhead: bool = False  # whether the MACs of evidence and policy are charged

    def score(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The outcome, `[B]`."""
        return self.outcome(logits, labels)

    def immediate(self, step: Step) -> Tensor:
        """The price of the blocks up to the next site, for kept tokens, and of merging and deciding, `[B, N]`."""
        price = _per_token(self.price, step)
        paid = -price * step.share * step.carried.float()
        if self.merge_cost and step.merged is not None:
            paid = paid - self.merge_cost * step.merged
        if self.charge_overhead and step.overhead is not None:
            # In tokens carried through the whole network, to which the price refers, and split among those who decide.
            tokens = step.overhead * step.acted.shape[1] / step.acted.sum(dim=1).clamp(min=1)
            paid = paid - price * tokens[:, None] * step.acted
        return paid

    def deferred(self, steps: Sequence[Step], score: Tensor) -> Tensor:
        """The outcome in the last step that each agent acted in, `[T, B, N]`."""
        last = [step.acted & ~step.kept for step in steps[:-1]] + [steps[-1].acted]
        return torch.stack(last).to(score) * score[None, :, None]


@dataclass(frozen=True)
class TeamOutcome(SharedOutcome):
    """`SharedOutcome` for a team: summed over all tokens, the outcome once and the price of every token kept.

    The return of an image is `outcome - price * (sum over tokens of the share of the network each was carried
    through)`. The agents of `SharedOutcome` follow the gradient of the same objective: each is paid the whole outcome
    and charged only for what its own action costs. Equal prices therefore
    mean equal objectives; what differs is which agent is credited with what.

    The outcome is known, and paid, in the last step; it is split evenly over all N tokens, pruned ones included.
    """

    for_team: ClassVar[bool] = True  # single-agent learners accept rewards with this mark

    def deferred(self, steps: Sequence[Step], score: Tensor) -> Tensor:
        """An equal share of the outcome for every token in the last step, `[T, B, N]`."""
        batch, agents = steps[-1].acted.shape
        table = score.new_zeros(len(steps), batch, agents)
        table[-1] = score[:, None] / agents
        return table


def _per_token(price: float | Tensor, step: Step) -> float | Tensor:
    """A price per image, wherever it lies, as one that multiplies the step's `[B, N]`."""
    return price[:, None].to(step.kept.device) if isinstance(price, Tensor) else price


@runtime_checkable
class CreditRewardFn(RewardFn, Protocol):
    """A reward that pays each agent by what its token contributed; the game works that out (`credit.attribution`)."""

    @property
    def potential(self) -> OutcomeFn:
        """The differentiable outcome that contributions are measured in."""
        ...

    def credited(self, steps: Sequence[Step], credit: Tensor) -> Tensor:
        """What contributions `credit` `[T, B, N]` are paid, `[T, B, N]`; deferred, like what `deferred` returns."""
        ...


@dataclass(frozen=True)
class Attribution:
    """Each agent is paid the first-order effect of its own choice; a kept token is charged for the blocks it passes.

    The derivative c of the log-probability of the true class by a token's weight as a key, between a site and the next
    one (see `credit.attribution`), says about what the outcome would lose without it, or gain with it. Staying is paid
    `c`, leaving `-c`: a first-order difference reward (Wolpert and Tumer, 2001), in units of 1 / N and bounded by 1,
    because a derivative is no measure of a token whose coming would change everything. An agent's pay follows from its
    own choice, so that there is little noise, at the price of a backward pass through the network and of being blind
    to tokens that matter only together. What play maximises is the potential, not the accuracy. Paying the kept
    alone does not work: softmax attention is indifferent to a common factor of all weights, so that the credits of
    those who stayed cancel. Tokens may be dropped, not merged or parked.
    """

    price: float | Tensor = 0.035  # the same for all images, or [B]
    potential: OutcomeFn = unclamped_log_probability
    scale: float = 1.0  # of the credit before it is bounded

    def score(self, logits: Tensor, labels: Tensor) -> Tensor:
        """1 if the image is classified correctly, else 0, `[B]`; it enters the statistics, not the reward."""
        return correct(logits, labels)

    def immediate(self, step: Step) -> Tensor:
        """The price of the blocks up to the next site, for kept tokens, `[B, N]`."""
        return -_per_token(self.price, step) * step.share * step.carried.float()

    def deferred(self, steps: Sequence[Step], score: Tensor) -> Tensor:
        """Nothing, `[T, B, N]`: the outcome as such is not paid."""
        return score.new_zeros(len(steps), *steps[0].kept.shape)

    def credited(self, steps: Sequence[Step], credit: Tensor) -> Tensor:
        """What staying gained, or leaving saved, `[T, B, N]`."""
        kept, acted = (torch.stack(flags) for flags in zip(*((step.kept, step.acted) for step in steps), strict=True))
        gain = (self.scale * credit * credit.shape[2]).clamp(-1.0, 1.0)
        return torch.where(kept, gain, -gain) * acted
