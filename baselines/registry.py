"""All baselines by name: make, calibrate and fit them; a new baseline needs one entry in `METHODS`."""

from __future__ import annotations

import difflib
import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, cast

from ..data import ImageDataset
from ..engine.backbone import Backbone
from ..errors import ParameterError, UnknownNameError
from ..files import PathLike
from ..policy import Policy, register_policy
from ..types import every_block
from .ats import ATS
from .brightness import Brightness
from .calibration import KEEP_RATE, Batches, Knob, P, Setting, calibrate_policy
from .clusters.dpc_knn import DPCKNN
from .clusters.dpc_merge import DPCMerge
from .clusters.mergers import KMeansMerge, PoolMerge
from .clusters.subsample import SubSampleMerge
from .clusters.subsample_fitting import merger_recipe
from .dynamicvit.fitting import DYNAMICVIT_RECIPE
from .dynamicvit.policy import DynamicViT
from .evit import EViT, TriLevel
from .evo_vit import EvoViT
from .fitting.recipe import FitOptions, Recipe, Sites, fit_policy
from .life_regression.fitting import LIFE_RECIPE
from .life_regression.policy import LifeRegression
from .ltmp.fitting import OFFSET, LTMPFitConfig, LTMPRecipe
from .ltmp.policy import LTMP
from .random_drop import RandomDrop
from .token_scores.distillation import DISTILLATION_RECIPE, DistillationConfig
from .token_scores.fitting import ScoreConfig, ScoreRecipe
from .token_scores.masks import MASKS_RECIPE, MasksConfig
from .token_scores.policy import THRESHOLD, TokenScores
from .tome import ToMe, ToMeShare
from .topk import TopK
from .ways_out import check_leave

MOST_SAMPLES = 20_000.0  # with so many heights ATS keeps nearly every token; more would cost memory


def backbone_sites(backbone: Backbone) -> Sites:
    """The network's own sites."""
    return backbone.default_sites


def all_blocks(backbone: Backbone) -> Sites:
    """Inside every block, between attention and MLP."""
    return every_block(backbone.depth)


@dataclass(frozen=True)
class Method:
    """Everything that the library knows about a baseline.

    Attributes:
        name: in the registry.
        make: builds the policy; its keyword parameters are the method's.
        summary: what it does, in one line.
        source: paper.
        knob: the parameter that sets its cost.
        sites: where it acts in a network unless other sites are asked for, as its policies' `default_sites` say. Those
            of its paper are what `policy.published_sites` says, if it has that.
        start: values of other parameters for the untrained method, where none are given.
        recipe: what it brings to be fitted; None: it has nothing to train.
        uncalibrated: settings of a fit that `calibrate` follows, if not the recipe's.
        fitted_knob: what `at(value)` of a trained policy changes, to move it to another budget.
    """

    name: str
    make: Callable[..., Policy]
    summary: str
    source: str
    knob: Knob = KEEP_RATE
    sites: Callable[[Backbone], Sites] = backbone_sites
    start: Mapping[str, Any] = field(default_factory=dict)
    recipe: Recipe[Policy] | None = None
    uncalibrated: Any = None
    fitted_knob: Knob = KEEP_RATE

    @property
    def fit(self) -> Callable[..., Policy] | None:
        """`fit_policy` with this method's recipe; None: it has nothing to train."""
        return None if self.recipe is None else partial(fit_policy, self.recipe)

    def fit_config(self) -> Any:
        """Settings of a fit that `calibrate` follows, with a `quick()` for a fit of seconds; None: nothing to train."""
        return self.uncalibrated or (self.recipe and self.recipe.config)

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """The method's parameters by name."""
        return dict(inspect.signature(self.make).parameters)

    @property
    def needs_only_knob(self) -> bool:
        """Whether it can be made from the value of its knob alone, for any network."""
        return all(p.default is not p.empty or name == self.knob.name for name, p in self.parameters.items())

    @property
    def is_random(self) -> bool:
        """Whether it has a `seed`: its decisions are random, or its initial weights."""
        return "seed" in self.parameters

    def check(self, parameters: Iterable[str]) -> None:
        """Refuse names of parameters that the method does not have.

        Raises:
            ParameterError: for an unknown name; the message gives the known ones and the nearest.
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
    """LTMP with thresholds of both kinds or one; untrained, equal ones in all blocks are moved by one number."""
    untrained = {"merge": ("merge_thresholds", 0.98), "prune": ("prune_thresholds", 0.0005)}
    return Method(
        name,
        LTMP,
        f"{summary}; thresholds are trained",
        "Bonnaerens & Dambre, 2023",
        OFFSET,
        all_blocks,
        start=dict(untrained[kind] for kind in variant.split("+")),
        recipe=LTMPRecipe(LTMPFitConfig(variant=variant)),
        uncalibrated=LTMPFitConfig(variant=variant, calibration=0),
        fitted_knob=OFFSET,
    )


def _merger(name: str, kind: Literal["convolution", "mlp"]) -> Method:
    return Method(
        name,
        partial(SubSampleMerge, kind=kind),
        f"the same with a trained {kind} in place of the clusters",
        "Long et al., 2023, Table 4",
        recipe=merger_recipe(kind),
    )


def _scores(name: str, summary: str, source: str, recipe: ScoreRecipe, uncalibrated: ScoreConfig) -> Method:
    """A small network that scores each token, trained in one of two ways; a threshold sets the cost."""
    return Method(
        name,
        TokenScores,
        summary,
        source,
        THRESHOLD,
        recipe=recipe,
        uncalibrated=uncalibrated,
        fitted_knob=THRESHOLD,
    )


METHODS: tuple[Method, ...] = (
    Method("random", RandomDrop, "keeps a share of the tokens, drawn uniformly: the control", "-"),
    Method("brightness", Brightness, "keeps a share of the tokens, by the mean of their pixels", "-"),
    Method("topk", TopK, "keeps a share of the original tokens, by class attention", "Haurum et al., 2023"),
    Method("evit", EViT, "keeps a share of the tokens, by class attention, and fuses the rest", "Liang et al., 2022"),
    Method("tri_level", TriLevel, "keeps a share of the tokens, by class attention", "Kong et al., 2022"),
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
        all_blocks,
    ),
    Method(
        "tome_share",
        ToMeShare,
        "merges the most similar pairs, the same share of the tokens in every block",
        "schedule of ours; Bolya et al., 2023",
        sites=all_blocks,
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
        all_blocks,
    ),
    Method("evo_vit", EvoViT, "a share of the tokens goes on, the others wait and come back", "Xu et al., 2022"),
    Method(
        "dynamicvit",
        DynamicViT,
        "keeps a share of the tokens, by a predictor trained with Gumbel noise",
        "Rao et al., 2021",
        recipe=DYNAMICVIT_RECIPE,
    ),
    Method(
        "life_regression",
        LifeRegression,
        "predicts once, at the first site, how long each token is needed; the longest-lived stay",
        "Chen et al., Life Regression based Patch Slimming",
        recipe=LIFE_RECIPE,
    ),
    _scores(
        "distilled_attention",
        "predicts the attention that each token will receive later; those above a threshold stay",
        "-",
        DISTILLATION_RECIPE,
        DistillationConfig(calibration=0),
    ),
    _scores(
        "masks",
        "scores each token by a network trained through differentiable masks; those above a threshold stay",
        "-",
        MASKS_RECIPE,
        MasksConfig(calibration=0),
    ),
)

# The names of these classes in files; a name stays when a class is renamed or moved.
register_policy("ats", ATS)
register_policy("brightness", Brightness)
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
register_policy("token_scores", TokenScores)
register_policy("tome", ToMe)
register_policy("tome_share", ToMeShare)
register_policy("topk", TopK)
register_policy("tri_level", TriLevel)


def available() -> tuple[str, ...]:
    """Names that `make` knows, sorted."""
    return tuple(sorted(method.name for method in METHODS))


def describe(name: str) -> Method:
    """Everything that the library knows about a baseline.

    Raises:
        UnknownNameError: for an unknown name; the message gives the nearest ones.
    """
    for method in METHODS:
        if method.name == name:
            return method
    raise UnknownNameError("baseline", name, available())


def parsed(text: str) -> tuple[Method, dict[str, Any]]:
    """A method and its parameters from a text such as `"evit:fuse=False"` or `"topk:leave=merge"`.

    Args:
        text: the method's name, or `name:parameter=value,...`; values are JSON, or else words.

    Raises:
        UnknownNameError: for an unknown name.
        ParameterError: for a parameter that the method does not have.
        ValueError: for a way out that there is not.
    """
    name, _, rest = text.partition(":")
    method = describe(name)
    parameters = {key: _value(value) for key, _, value in (part.partition("=") for part in rest.split(",") if part)}
    method.check(parameters)
    check_leave(parameters.get("leave", "drop"))
    return method, parameters


def _value(text: str) -> Any:
    """A parameter's value: JSON if it is that, else a word."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return {"True": True, "False": False, "None": None}.get(text, text)


def make(name: str, **parameters: Any) -> Policy:
    """Make a baseline by name, such as `make("evit", keep_rate=0.7)`.

    Args:
        name: one of `available()`.
        **parameters: of the method, see `describe(name).parameters`.

    Raises:
        UnknownNameError: for an unknown name; the message gives the nearest ones.
        ParameterError: for a parameter that the method does not have, or one that is missing.
        ValueError: for a value out of range, naming the parameter.
    """
    return describe(name)(**parameters)


def calibrate(
    policy_factory: str | Callable[..., P],
    target_gmacs: float,
    backbone: Backbone,
    data: ImageDataset | Batches,
    sites: Sites | Literal["published"] | None = None,
    steps: int = 18,
    tolerance: float = 0.0,
    knob: Knob | None = None,
    **parameters: Any,
) -> P:
    """Find the setting at which a method costs what was asked, by bisection of its own knob.

    Numbers of tokens are whole, so the cost of a method changes in steps. The result is the smallest setting found
    that spends at least the budget, for every method alike.

    Args:
        policy_factory: a baseline's name, its class, or anything that builds the policy from the knob's value.
        target_gmacs: mean GMACs per image, policy and evidence included.
        backbone: the network.
        data: images to measure the cost on, a data set or a list of batches with labels; not those on which accuracy
            is reported.
        sites: where to prune; None: at the network's own sites, or in every block for methods that are made to act
            there, as games and deployed models do; "published": where the method's paper has it.
        steps: bisection steps.
        tolerance: stop as soon as the budget is exceeded by this share of it or less.
        knob: what is turned; None: the baseline's own, or a keep rate above 0 and at most 1 for anything else.
        **parameters: further parameters of the method.

    Returns:
        The policy, freshly made.

    Raises:
        BudgetError: if the budget is below what the method's cheapest setting costs, or above what the dearest does;
            the message gives the range.
        UnknownNameError: for an unknown name of a baseline.
        ParameterError: for a parameter that the baseline does not have.
        ValueError: for no images.
    """
    build, own = _builder(policy_factory, knob, parameters)
    return calibrate_policy(build, target_gmacs, backbone, data, sites, steps, tolerance, own)


def _builder(
    policy_factory: str | Callable[..., P], knob: Knob | None, parameters: dict[str, Any]
) -> tuple[Callable[[Setting], P], Knob]:
    """A function from a setting of the knob to the policy, and the knob."""
    if not isinstance(policy_factory, str):
        return (lambda value: policy_factory(value, **parameters)), knob or knob_of(policy_factory)
    method = describe(policy_factory)
    turned = knob or method.knob
    return (lambda value: cast(P, method(**{**method.start, turned.name: value, **parameters}))), turned


def knob_of(make: Callable[..., Policy]) -> Knob:
    """The knob of a registered method's class; of anything else a keep rate."""
    return next((method.knob for method in METHODS if method.make is make), KEEP_RATE)


def fit(
    method: str | Method | Recipe[P],
    backbone: Backbone,
    dataset: ImageDataset,
    target_gmacs: float,
    *,
    config: Any = None,
    sites: Sites | Literal["published"] | None = None,
    seed: int = 0,
    output: PathLike | None = None,
    resume: bool = False,
    progress: bool = True,
) -> P:
    """Train what a baseline has to train, for a network that stays as it is and a budget.

    Args:
        method: a baseline's name or entry, or a `Recipe` of your own.
        backbone: the network.
        dataset: labelled training images.
        target_gmacs: mean GMACs per image, policy and evidence included.
        config: settings of the method, such as a `DynamicViTConfig`; None: its defaults. `seed` replaces the seed in
            them.
        sites: where to prune; None: at the method's default sites.
        seed: of initial weights, batches and random numbers in the loss.
        output: folder for checkpoints; None: nothing is written.
        resume: whether to continue from the checkpoint in `output`; the result has the same bits as without the
            interruption.
        progress: whether to show a progress bar.

    Returns:
        The trained policy at the budget, which knows its sites.

    Raises:
        BudgetError: for a budget that the method cannot meet.
        CheckpointError: for a checkpoint of another fit.
        NumericalError: for a loss or gradient that is not finite; the last good checkpoint stays.
        UnknownNameError: for an unknown name of a baseline.
        ValueError: for a baseline with nothing to train, too few images, or sites outside the network.
    """
    recipe = _recipe(method) if isinstance(method, str | Method) else method
    options: FitOptions = {"sites": sites, "seed": seed, "output": output, "resume": resume, "progress": progress}
    return cast(P, fit_policy(recipe, backbone, dataset, target_gmacs, config=config, **options))


def _recipe(method: str | Method) -> Recipe[Policy]:
    """The recipe of a baseline.

    Raises:
        ValueError: if it has nothing to train.
    """
    entry = describe(method) if isinstance(method, str) else method
    if entry.recipe is None:
        names = ", ".join(known.name for known in METHODS if known.recipe is not None)
        raise ValueError(f"method: expected one with something to train ({names}), got {entry.name!r}")
    return entry.recipe
