"""Fits of policies that are modules with a keep rate: the budget sets the rate, and the module is trained at it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Generic, Protocol, Self, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...data import batches_of
from ...engine.backbone import Backbone
from ...engine.tokens import start_state
from ...game.rollout import play
from ...game.token_game import TokenGame
from ...policy import Policy
from ...types import Site
from ..argument_checks import check_fields
from ..calibration import calibrate_policy
from .inputs import Inputs, device_of, inputs_of
from .loop import FitConfig
from .recipe import Problem, Sites
from .task import ModuleTask, Row


@dataclass(frozen=True)
class KeepRateConfig:
    """Settings that all of these fits have; a method adds those of its loss."""

    fit: FitConfig = field(default_factory=FitConfig)
    """The training loop."""
    images: int = 4096
    """Training images, spread evenly over the data set; each is run up to the first site once, when first drawn, and
    kept while memory lasts. 0: all, each run whenever it is drawn, as augmented images need."""

    def __post_init__(self) -> None:
        check_fields(self, ("images",), lambda value: value >= 0, "at least 0")

    def quick(self) -> Self:
        """The same settings with very few steps and images, for tests of the whole fit."""
        return replace(self, fit=self.fit.quick(), images=min(self.images, 64))


class KeepRateModule(Policy, Protocol):
    """A policy that is a module and prunes by a keep rate."""

    def at(self, value: float) -> Self:
        """The same policy at another keep rate; the weights are shared."""
        ...

    def config(self) -> dict[str, Any]:
        """Its settings as JSON values."""
        ...


M = TypeVar("M", bound=KeepRateModule)


class KeepRateTask(ModuleTask, Generic[M]):
    """Trains a policy at its keep rate; a subclass adds the loss.

    Args:
        policy: what learns, at the keep rate of the budget.
        game: on the network and the sites that it is trained for.
        data: training images up to the first site.
        config: settings of the method.
    """

    def __init__(self, policy: M, game: TokenGame, data: Inputs, config: Any) -> None:
        super().__init__(cast(nn.Module, policy))
        self.policy, self.game, self.data, self.config = policy, game, data, config

    @property
    def settings(self) -> Mapping[str, Any]:
        """Settings of method and policy, without those of the training loop."""
        loops = {field.name: None for field in fields(self.config)
                 if isinstance(getattr(self.config, field.name), FitConfig)}  # fmt: skip
        return {**asdict(self.config), **loops, **self.policy.config(), "backbone": self.game.backbone.name}

    @torch.no_grad()
    def validate(self, batches: Sequence[tuple[Tensor, Tensor]]) -> Row:
        """Mean cross-entropy and accuracy of the policy as deployed, pruned tokens removed."""
        loss = correct = images = 0.0
        for batch, labels in batches:
            state = self.data.state(batch)
            start = start_state(state.x, state.num_prefix, state.half)
            logits = play(self.game, self.policy, start, labels).outcome.logits
            loss += float(F.cross_entropy(logits, labels, reduction="sum"))
            correct += float((logits.argmax(dim=1) == labels).sum())
            images += len(labels)
        return {"loss": loss / images, "accuracy": correct / images}

    def fitted(self) -> M:
        """The policy, in evaluation mode."""
        return cast(Any, self.policy).eval()


def before_site(site: Site) -> int:
    """Half-blocks before a site, so that prepared tokens are those at the site."""
    return site.half


def before_block(site: Site) -> int:
    """Half-blocks before the block of a site, so that its attention, and evidence from it, can still be computed."""
    return 2 * (site.block - 1)


@dataclass(frozen=True)
class KeepRateRecipe(Generic[M]):
    """The recipe of a module with a keep rate.

    Args:
        config: default settings.
        sites: default sites in a network.
        untrained: the policy for a problem, at keep rate 1 and with initial weights.
        make_task: the task of a policy at the keep rate of the budget.
        prepared: half-blocks of the network that the training inputs have been through, from the first site.
        dense: whether the loss needs the tokens that leave the dense network (`Inputs.dense`).
        published: the paper's sites in a network; None: `sites`.
    """

    config: KeepRateConfig
    sites: Callable[[Backbone], Sites]
    untrained: Callable[[Problem], M]
    make_task: Callable[[M, TokenGame, Inputs, Any], KeepRateTask[M]]
    prepared: Callable[[Site], int] = before_site
    dense: bool = False
    published: Callable[[Backbone], Sites] | None = None

    def default_sites(self, backbone: Backbone) -> Sites:
        """Those of the method."""
        return self.sites(backbone)

    def published_sites(self, backbone: Backbone) -> Sites:
        """Those of the paper."""
        return (self.published or self.sites)(backbone)

    def task(self, problem: Problem) -> KeepRateTask[M]:
        """The task at the keep rate of the budget.

        Raises:
            BudgetError: if no keep rate meets the budget.
        """
        backbone, policy = problem.backbone, self.at_budget(problem)
        half, images = self.prepared(problem.sites[0]), problem.config.images
        data = inputs_of(backbone, problem.dataset, half, images, self.dense)
        game = TokenGame.for_policy(backbone, policy, sites=problem.sites, grad=True)
        return self.make_task(policy, game, data, problem.config)

    def at_budget(self, problem: Problem) -> M:
        """The untrained policy at the keep rate of the budget, measured on one image: it costs the same for all.

        Raises:
            BudgetError: if no keep rate meets the budget.
        """
        backbone, device = problem.backbone, device_of(problem.backbone)
        start = cast(Any, self.untrained(problem)).to(device)
        image = batches_of(problem.dataset, 1, device, images=1)
        return calibrate_policy(start.at, problem.target_gmacs, backbone, image, sites=problem.sites)
