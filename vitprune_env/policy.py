"""The interface between the game and the policies that play it, and the names of policies in files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, Literal, Protocol, TypeVar, overload, runtime_checkable

import torch
from torch import Tensor, nn

from vitprune_env.types import Decision, Observation, Site

C = TypeVar("C", bound=type)
BUILT_IN = ("vitprune_env.baselines", "vitprune_env.agents")  # packages that register their policies when imported
_CLASSES: dict[str, type] = {}  # by the name that stands in files


@overload
def register_policy(name: str) -> Callable[[C], C]: ...
@overload
def register_policy(name: str, cls: C) -> C: ...
def register_policy(name: str, cls: Any = None) -> Any:
    """Give a policy class the name under which files know it, so that `save_policy` and `load_policy` take it.

    The settings of a policy are what its method `config()` returns (keyword arguments of the constructor or, if the
    class has one, of its class method `from_config`; JSON values), or the fields of a dataclass. Parameters and buffers
    of a policy that is a `torch.nn.Module` are saved as tensors.

    Args:
        name: stays the same when the class is renamed or moved.
        cls: the class; without it, the result is a decorator.

    Returns:
        The class.

    Raises:
        TypeError: for something that is not a class with a method `decide`, or a name that is not a string.
        ValueError: for a name that another class has.
    """
    if not isinstance(name, str) or not name:
        raise TypeError(f"name: expected a string, got {name!r}")
    if cls is None:
        return lambda decorated: register_policy(name, decorated)
    if not isinstance(cls, type) or not hasattr(cls, "decide"):
        raise TypeError(f"cls: expected a class with a method decide, got {cls!r}")
    known = _CLASSES.get(name, cls)
    # A notebook cell that runs again defines the same class anew.
    if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(f"name: expected one that is free, got {name!r}, the name of {known.__qualname__}")
    _CLASSES[name] = cls
    return cls


def registered_policy(name: str) -> type | None:
    """The policy class of this name; None if there is none."""
    for package in BUILT_IN:
        if name not in _CLASSES:
            import_module(package)
    return _CLASSES.get(name)


def registered_name(cls: type) -> str | None:
    """The name of this policy class; None if it has none."""
    return next((name for name, known in _CLASSES.items() if known is cls), None)


@runtime_checkable
class Policy(Protocol):
    """Decides at every site which tokens stay.

    Attributes:
        needs: evidence to compute for it, by name (see `engine.evidence`); empty for none.
        attention_bias: `"log_size"` for proportional attention (a merged token counts as often as its size).
    """

    @property
    def needs(self) -> frozenset[str]:
        """Evidence to compute for it."""
        ...

    @property
    def attention_bias(self) -> Literal["log_size"] | None:
        """What to add to the attention logits."""
        ...

    def default_sites(self, depth: int) -> Sequence[int | str | Site] | None:
        """Sites where it is made to act in a network of `depth` blocks; None: the backbone's own."""
        ...

    def reset(self, batch_size: int, num_agents: int) -> None:
        """Begin a new batch of games."""
        ...

    def decide(self, obs: Observation) -> Decision:
        """Decide for all alive tokens of all images at once."""
        ...


def check_members(policy: object) -> None:
    """Refuse an object that lacks a member of the `Policy` protocol.

    Raises:
        TypeError: naming what it lacks.
    """
    if not isinstance(policy, Policy):
        members = ("needs", "attention_bias", "default_sites", "reset", "decide")
        missing = ", ".join(name for name in members if not hasattr(policy, name))
        raise TypeError(f"policy: {type(policy).__name__} lacks {missing}; BasePolicy has defaults for all but decide")


def published_sites(policy: Policy, depth: int) -> Sequence[int | str | Site] | None:
    """Where a policy's paper has it, at the same share of the depth; where it is made to act if it says no more.

    A policy says so by a method `published_sites(depth)`. Policies are compared and deployed elsewhere by default: see
    `Backbone.sites_for`.

    Args:
        policy: the policy.
        depth: blocks of the network.

    Returns:
        Sites; None: the backbone's own.
    """
    return getattr(policy, "published_sites", policy.default_sites)(depth)


class BasePolicy:
    """Defaults of a policy without evidence, state or sites of its own; override `decide`."""

    needs: frozenset[str] = frozenset()
    attention_bias: Literal["log_size"] | None = None

    def default_sites(self, depth: int) -> Sequence[int | str | Site] | None:
        """The backbone's own sites."""
        return None

    def reset(self, batch_size: int, num_agents: int) -> None:
        """Nothing has to be reset."""

    def decide(self, obs: Observation) -> Decision:
        """Decide for all alive tokens of all images at once."""
        raise TypeError(f"{type(self).__name__} does not say how to decide")


@register_policy("keep_all")
class KeepAll(BasePolicy):
    """Prunes nothing: the dense model, played as a game."""

    def decide(self, obs: Observation) -> Decision:
        """Keep every alive token."""
        return Decision(keep=obs.alive, count=obs.count)


def keep_top(obs: Observation, scores: Tensor, count: Tensor) -> Tensor:
    """Keep the best-scored alive tokens of each image.

    Args:
        obs: the observation that the scores belong to.
        scores: `[sum n_i]`, one per alive token; ties go to the lower patch number.
        count: `[B]`, how many to keep.

    Returns:
        `[B, N]` bool.
    """
    # Dead tokens must come last, also after an alive one with a score of -inf.
    table = obs.scatter(scores.clamp(min=torch.finfo(scores.dtype).min), fill=float("-inf"))
    ranks = table.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return (ranks < count[:, None]) & obs.alive


def mean_weights(merge_into: Tensor, importance: Tensor) -> Tensor:
    """Weights of a `Decision` with which every merged token becomes the weighted mean of its group.

    Args:
        merge_into: `[B, N]` int64, the token that each token merges into; -1 for tokens that are dropped.
        importance: `[B, N]`, not negative; `Observation.size` gives means over patches, as ToMe takes them. In a group
            without any importance all members count equally.

    Returns:
        `[B, N]`, adding up to 1 in every group; 1 for tokens that are dropped or stand alone.
    """
    joins, target = merge_into >= 0, merge_into.clamp(min=0)
    share = importance.clamp(min=torch.finfo(importance.dtype).tiny) * joins
    total = torch.zeros_like(share).scatter_add(1, target, share).gather(1, target)
    # The divisor is never 0, also where the quotient is not used: the gradient of 0 / 0 would be NaN.
    return torch.where(joins, share / torch.where(joins, total, 1), 1)


def check_keep_rate(keep_rate: float) -> None:
    """Refuse a keep rate outside (0, 1].

    Raises:
        ValueError: naming the argument.
        TypeError: likewise, for what is no number.
    """
    message = f"keep_rate: expected a number above 0 and at most 1, got {keep_rate!r}"
    if isinstance(keep_rate, bool) or not isinstance(keep_rate, int | float):
        raise TypeError(message)
    if not 0 < keep_rate <= 1:
        raise ValueError(message)


def check_precision(network: nn.Module, tokens: Tensor) -> None:
    """Refuse tokens of another precision than a policy's network, unless autocast converts them.

    Raises:
        TypeError: naming both.
    """
    own = next(network.parameters()).dtype
    if tokens.dtype != own and not torch.is_autocast_enabled(tokens.device.type):
        raise TypeError(f"policy: expected {tokens.dtype}, as the tokens are, got {own}; policy.to() changes it")
