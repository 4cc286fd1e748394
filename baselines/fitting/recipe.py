"""One fit for every baseline: a method brings a `Recipe`, and `fit_policy` trains it for a network and a budget.

`fit_policy` resolves the sites, freezes the network, runs the training loop with its checkpoints, and returns the
policy. The recipe says what is trained, by which loss, and how the budget is met.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, TypedDict, TypeVar

from ...data import ImageDataset
from ...engine.backbone import Backbone
from ...files import PathLike
from ...models.load import weights_digest
from ...policy import Policy
from ...types import Site, parse_sites
from .inputs import device_of
from .loop import FitConfig, fit_task
from .task import FitTask, frozen

Sites = Sequence[int | str | Site]
P_co = TypeVar("P_co", bound=Policy, covariant=True)


class FitOptions(TypedDict, total=False):
    """Options of every fit; see `baselines.fit`."""

    sites: Sites | Literal["published"] | None
    seed: int
    output: PathLike | None
    resume: bool
    progress: bool


@dataclass(frozen=True)
class Problem:
    """What a policy is fitted for."""

    backbone: Backbone  # frozen
    dataset: ImageDataset  # labelled training images
    target_gmacs: float  # mean GMACs per image
    sites: tuple[Site, ...]  # where it acts
    asked_sites: Sites | None  # where the user wants it to act; None: at the method's default sites
    seed: int  # of initial weights, batches and random numbers in the loss
    config: Any  # settings of the method


class PolicyTask(FitTask, Protocol[P_co]):
    """A task of the training loop that results in a policy."""

    @property
    def data(self) -> ImageDataset:
        """Inputs of the loss."""
        ...

    @property
    def settings(self) -> Mapping[str, Any]:
        """JSON values that must be equal in a checkpoint to be resumed."""
        ...

    def fitted(self) -> P_co:
        """The policy with the parameters as they are now, at the budget."""
        ...


class Recipe(Protocol[P_co]):
    """What a baseline brings to be fitted: its default settings and sites, and its task.

    Settings are a `FitConfig`, or a dataclass with one in its field `fit`; their `quick()` gives a fit of seconds.
    """

    @property
    def config(self) -> Any:
        """Default settings."""
        ...

    def default_sites(self, backbone: Backbone) -> Sites:
        """Where the method acts in a network if nothing else is asked for."""
        ...

    def task(self, problem: Problem) -> PolicyTask[P_co]:
        """Trainable parameters, loss and data for a problem.

        Raises:
            BudgetError: for a budget that the method cannot meet.
        """
        ...


def recipe_sites(
    recipe: Recipe[Any], backbone: Backbone, sites: Sites | Literal["published"] | None
) -> tuple[Site, ...]:
    """Where a method is trained to act: as asked, at its published sites, or where it acts by default (None)."""
    if sites is None:
        where = recipe.default_sites(backbone)
    elif sites == "published":
        where = getattr(recipe, "published_sites", recipe.default_sites)(backbone)
    else:
        where = sites
    return parse_sites(where, backbone.depth)


def fit_policy(
    recipe: Recipe[P_co],
    backbone: Backbone,
    dataset: ImageDataset,
    target_gmacs: float,
    *,
    config: Any = None,
    sites: Sites | Literal["published"] | None = None,
    seed: int = 0,
    output: PathLike | None = None,
    resume: bool = False,
    progress: bool = False,
) -> P_co:
    """Train a policy by its recipe; see `baselines.fit`, which does it by name, for arguments, result and errors."""
    config = recipe.config if config is None else config
    where = recipe_sites(recipe, backbone, sites)
    asked = where if sites == "published" else sites
    loop = replace(config if isinstance(config, FitConfig) else config.fit, seed=seed)
    with frozen(backbone):
        task = recipe.task(Problem(backbone, dataset, target_gmacs, where, asked, seed, config))
        options: dict[str, Any] = {"output": output, "resume": resume, "progress": progress}
        settings = {**task.settings, "network": weights_digest(backbone)}
        fit_task(task, task.data, loop, device=device_of(backbone), settings=settings, **options)
        return task.fitted()
