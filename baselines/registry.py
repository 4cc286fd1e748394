"""All baselines by name: how they are made, what sets their budget, where they act, what they come from."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from ..engine.backbone import Backbone
from ..errors import ParameterError, UnknownNameError
from ..policy import Policy, register_policy
from ..types import Site
from .ats import ATS
from .clusters.dpc_knn import DPCKNN
from .clusters.dpc_merge import DPCMerge
from .clusters.mergers import KMeansMerge, PoolMerge
from .clusters.subsample import SubSampleMerge
from .clusters.subsample_fit import MergerConfig, fit_merger
from .dynamicvit.fitting import DynamicViTConfig, fit_dynamicvit
from .dynamicvit.policy import DynamicViT
from .evit import EViT
from .evo_vit import EvoViT
from .knobs import Knob
from .life_regression.fitting import LifeConfig, fit_life_regression
from .life_regression.policy import LifeRegression
from .ltmp.fitting import LTMPFitConfig, fit_ltmp
from .ltmp.policy import LTMP
from .random_drop import RandomDrop
from .tome import ToMe
from .topk import TopK
from .tri_level import TriLevel

Sites = Sequence[int | str | Site]


def backbone_sites(backbone: Backbone) -> Sites:
    """The network's own sites."""
    return backbone.default_sites


def every_block(backbone: Backbone) -> Sites:
    """Inside every block, between attention and MLP."""
    return [f"{number}.attn" for number in range(1, backbone.depth + 1)]


KEEP_RATE = Knob()
MOST_SAMPLES = 20_000.0  # so many heights leave nearly every token; more cost memory


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
        start: values of other parameters that stand for the untrained method where nothing else is given.
        fit: trains what is to be trained of it, `(backbone, dataset, target_gmacs, *, sites, seed, output, resume,
            progress, config) -> policy`; None: nothing is.
        fit_config: makes the default of that `config`; its `quick()` is a fit that takes seconds.
        fitted_knob: what the `at(value)` of a trained policy turns, which gives the same one at another budget.
    """

    name: str
    make: Callable[..., Policy]
    summary: str
    source: str
    knob: Knob = KEEP_RATE
    sites: Callable[[Backbone], Sites] = backbone_sites
    start: Mapping[str, Any] = field(default_factory=dict)
    fit: Callable[..., Policy] | None = None
    fit_config: Callable[[], Any] | None = None
    fitted_knob: Knob = KEEP_RATE

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """Parameters of the method by name."""
        return dict(inspect.signature(self.make).parameters)

    @property
    def needs_only_knob(self) -> bool:
        """Whether it can be made from its knob alone, without knowing the network."""
        return all(p.default is not p.empty or name == self.knob.name for name, p in self.parameters.items())

    @property
    def is_random(self) -> bool:
        """Whether it draws its decisions, from a `seed` of its own."""
        return "seed" in self.parameters

    def check(self, parameters: Iterable[str]) -> None:
        """Refuse names of parameters that the method does not have.

        Raises:
            ParameterError: with the known ones, and the nearest.
        """
        known = self.parameters
        for name in parameters:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise ParameterError(f"{name}: no parameter of {self.name!r}, which has {', '.join(known)}{hint}")

    def __call__(self, **parameters: Any) -> Policy:
        """Make the policy.

        Raises:
            ParameterError: for a parameter that the method does not have, or one that is missing.
            ValueError: for a value out of range.
        """
        self.check(parameters)
        for name, parameter in self.parameters.items():
            if parameter.default is parameter.empty and name not in parameters:
                raise ParameterError(f"{name}: {self.name!r} needs it; its parameters are {', '.join(self.parameters)}")
        return self.make(**parameters)


def _ltmp(name: str, variant: Literal["merge+prune", "merge", "prune"], summary: str) -> Method:
    """LTMP with thresholds of both kinds or one; before training they are the same in every block."""
    merges_only = variant == "merge"
    return Method(
        name,
        LTMP,
        f"{summary}; thresholds are trained",
        "Bonnaerens & Dambre, 2023",
        Knob("merge_thresholds" if merges_only else "prune_thresholds", 0, 1, rising=merges_only),
        every_block,
        start={"merge_thresholds": LTMPFitConfig().merge_init} if variant == "merge+prune" else {},
        fit=fit_ltmp,
        fit_config=partial(LTMPFitConfig, variant=variant, calibration=0),  # `calibrate` turns what `at` turns
        fitted_knob=Knob("offset", -4, 4, rising=False),
    )


def _merger(name: str, kind: Literal["convolution", "mlp"]) -> Method:
    return Method(
        name,
        partial(SubSampleMerge, kind=kind),
        f"the same with a trained {kind} in place of the clusters",
        "Long et al., 2023, Table 4",
        fit=partial(fit_merger, kind=kind),
        fit_config=MergerConfig,
    )


METHODS: tuple[Method, ...] = (
    Method("random", RandomDrop, "keeps a share of the tokens, drawn uniformly: the control", "-"),
    Method("topk", TopK, "keeps a share of the original tokens, by class attention", "Haurum et al., 2023"),
    Method("evit", EViT, "keeps a share of the tokens, by class attention, and fuses the rest", "Liang et al., 2022"),
    Method("tri_level", TriLevel, "keeps a share of the tokens, by class attention", "Kong et al., 2023"),
    Method(
        "dpc",
        DPCMerge,
        "clusters the inattentive tokens by density peaks, merges attentive ones in pairs",
        "Long et al., 2023",
    ),
    Method("dpc_pool", PoolMerge, "the same with pooling in place of the clusters", "Long et al., 2023, Table 4"),
    Method("dpc_kmeans", KMeansMerge, "the same with k-means in place of density peaks", "Long et al., 2023, Table 4"),
    _merger("dpc_convolution", "convolution"),
    _merger("dpc_mlp", "mlp"),
    Method("dpcknn", DPCKNN, "clusters all tokens by density peaks, keeps the means", "Haurum et al., 2023"),
    Method(
        "tome",
        ToMe,
        "merges the r most similar pairs in every block",
        "Bolya et al., 2023",
        Knob("r", 0, None, rising=False, kind="schedule"),
        every_block,
    ),
    _ltmp("ltmp", "merge+prune", "merges above a similarity, prunes below an importance, in every block"),
    _ltmp("ltmp_merge", "merge", "merges above a similarity, in every block"),
    _ltmp("ltmp_prune", "prune", "prunes below an importance, in every block"),
    Method(
        "ats",
        ATS,
        "samples tokens in every block from the distribution of their scores",
        "Fayyaz et al., 2022",
        Knob("samples", 1, MOST_SAMPLES, kind="schedule"),
        every_block,
    ),
    Method("evo_vit", EvoViT, "carries on with a share of the tokens, the others wait", "Xu et al., 2022"),
    Method(
        "dynamicvit",
        DynamicViT,
        "keeps a share of the tokens, by a predictor trained with Gumbel noise",
        "Rao et al., 2021",
        fit=fit_dynamicvit,
        fit_config=DynamicViTConfig,
    ),
    Method(
        "life_regression",
        LifeRegression,
        "predicts once, at the first site, how long each token is needed; the longest-lived stay",
        "Chen et al., Life Regression based Patch Slimming",
        fit=fit_life_regression,
        fit_config=LifeConfig,
    ),
)

# The names of these classes in files; a name stays when a class is renamed or moved.
register_policy("ats", ATS)
register_policy("dpc", DPCMerge)
register_policy("dpc_kmeans", KMeansMerge)
register_policy("dpc_pool", PoolMerge)
register_policy("dpc_subsample", SubSampleMerge)
register_policy("dpcknn", DPCKNN)
register_policy("dynamicvit", DynamicViT)
register_policy("evit", EViT)
register_policy("evo_vit", EvoViT)
register_policy("life_regression", LifeRegression)
register_policy("ltmp", LTMP)
register_policy("random", RandomDrop)
register_policy("tome", ToMe)
register_policy("topk", TopK)
register_policy("tri_level", TriLevel)


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
