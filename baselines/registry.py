"""All baselines by name: how they are made, what sets their budget, where they act, what they come from."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..backbone import Backbone
from ..errors import ParameterError, UnknownNameError
from ..policy import Policy
from ..types import Site
from .evit import EViT
from .knobs import Knob
from .random_drop import RandomDrop
from .topk import TopK

Sites = Sequence[int | str | Site]


def backbone_sites(backbone: Backbone) -> Sites:
    """The network's own sites."""
    return backbone.default_sites


def every_block(backbone: Backbone) -> Sites:
    """Inside every block, between attention and MLP."""
    return [f"{number}.attn" for number in range(1, backbone.depth + 1)]


KEEP_RATE = Knob()


@dataclass(frozen=True)
class Method:
    """What there is to know about a baseline.

    Attributes:
        name: in the registry.
        make: builds the policy; its keyword parameters are the method's.
        summary: what it does, in one line.
        source: paper.
        knob: what sets its budget.
        sites: where it acts when methods are compared on one network; where it was published is
            `Policy.default_sites`.
        fit: trains what is to be trained of it, `(backbone, dataset, target_gmacs, *, sites, seed, output, resume,
            quick) -> policy`; the policy's `at(value)` is the same one at another setting of `fitted_knob`. None:
            nothing is trained.
        fitted_knob: what sets the budget once it is trained.
    """

    name: str
    make: Callable[..., Policy]
    summary: str
    source: str
    knob: Knob = KEEP_RATE
    sites: Callable[[Backbone], Sites] = backbone_sites
    fit: Callable[..., Policy] | None = None
    fitted_knob: Knob = KEEP_RATE

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """Parameters of the method by name."""
        return dict(inspect.signature(self.make).parameters)

    @property
    def is_random(self) -> bool:
        """Whether it draws its decisions, from a `seed` of its own."""
        return "seed" in self.parameters

    def __call__(self, **parameters: Any) -> Policy:
        """Make the policy.

        Raises:
            ParameterError: for a parameter that the method does not have, or one that is missing.
            ValueError: for a value out of range.
        """
        known = self.parameters
        for name in parameters:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise ParameterError(f"{name}: no parameter of {self.name!r}, which has {', '.join(known)}{hint}")
        for name, parameter in known.items():
            if parameter.default is parameter.empty and name not in parameters:
                raise ParameterError(f"{name}: {self.name!r} needs this parameter; it has {', '.join(known)}")
        return self.make(**parameters)


METHODS: tuple[Method, ...] = (
    Method("random", RandomDrop, "keeps a share of the tokens, drawn uniformly: the control", "-"),
    Method("topk", TopK, "keeps a share of the original tokens, by class attention", "Haurum et al., 2023"),
    Method("evit", EViT, "keeps a share of the tokens, by class attention, and fuses the rest", "Liang et al., 2022"),
)


def available() -> tuple[str, ...]:
    """Names that `make` knows, sorted."""
    return tuple(sorted(method.name for method in METHODS))


def describe(name: str) -> Method:
    """Everything about a baseline.

    Raises:
        UnknownNameError: for a name that is not there; the message gives the nearest ones.
    """
    for method in METHODS:
        if method.name == name:
            return method
    raise UnknownNameError("baseline", name, available())


def make(name: str, **parameters: Any) -> Policy:
    """Make a baseline by name, such as `make("evit", keep_rate=0.7)`.

    Args:
        name: one of `available()`.
        **parameters: of the method, see `describe(name).parameters`.

    Raises:
        UnknownNameError: for a name that is not there; the message gives the nearest ones.
        ParameterError: for a parameter that the method does not have, or one that is missing.
        ValueError: for a value out of range, naming the parameter.
    """
    return describe(name)(**parameters)


def knob_of(make: Callable[..., Policy]) -> Knob:
    """The knob of a registered method's class; of anything else a keep rate."""
    return next((method.knob for method in METHODS if method.make is make), KEEP_RATE)
