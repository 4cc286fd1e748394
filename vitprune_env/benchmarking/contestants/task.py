"""What policies are compared on, and what a line of the table is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from vitprune_env.benchmarking.images import Images
from vitprune_env.benchmarking.measurement import Group, Sites
from vitprune_env.benchmarking.prepared import PreparedImages
from vitprune_env.engine.backbone import Backbone
from vitprune_env.game.token_game import TokenGame
from vitprune_env.policy import Policy
from vitprune_env.types import parse_sites

PUBLISHED = " (published sites)"  # follows the name of a method in its second row


@dataclass(frozen=True)
class Fits:
    """How methods are trained that need it.

    Attributes:
        budgets: train for "each" budget, or once for the "middle" one, and turn the result to the others.
        steps: optimiser steps; None: each method's own number.
        quick: a few steps, to see that everything works.
    """

    budgets: Literal["each", "middle"] = "each"
    steps: int | None = None
    quick: bool = False


@dataclass(frozen=True)
class Task:
    """What all policies are compared on.

    Attributes:
        backbone: the network.
        test: images to report on.
        tune: images to calibrate on.
        fit: images to train methods on that need it; None: there are none.
        shares: all budgets of the comparison, as shares of the dense GMACs.
        sites: where methods act: None for the same sites (the backbone's own, or inside every block for methods that
            are made to act there), "published" for those of each paper, or the sites themselves.
        seed: first of the seeds.
        seeds: runs of what is random.
        fits: how methods are trained.
        output: folder for fits; None: they are not kept.
        resume: whether to go on with fits that are there.
        progress: whether fits show a progress bar.
        fitted: methods trained so far, by the names of their folders.
        notes: what bringing the present policy to its budget has to say.
    """

    backbone: Backbone
    test: PreparedImages
    tune: PreparedImages
    fit: Images | None = None
    shares: tuple[float, ...] = ()
    sites: Sites | Literal["published"] | None = None
    seed: int = 0
    seeds: int = 5
    fits: Fits = Fits()
    output: Path | None = None
    resume: bool = False
    progress: bool = False
    fitted: dict[str, Policy] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def dense_gmacs(self) -> float:
        """GMACs of the unpruned network."""
        return TokenGame(self.backbone).cost.dense() / 1e9

    def where(self, usual: Sites, published: Sites) -> Sites:
        """Where a method acts, given its place in a fair comparison and its published one."""
        if self.sites is None:
            return usual
        return published if isinstance(self.sites, str) else self.sites

    def where_for(self, policy: Policy) -> Sites:
        """Where a policy acts that says itself where it is made to act and where it was published."""
        return self.where(self.backbone.sites_for(policy), self.backbone.sites_for(policy, "published"))


@dataclass(frozen=True)
class Contestant:
    """A line of the table.

    Attributes:
        name: of the line.
        group: what it is.
        at: brings it to a budget in GMACs; one policy per run.
        sites: where these policies act; None: where they want to.
        knob: parameter that is turned to meet the budget, for the report.
        origin: tells policies with the same name apart: saved ones, and those whose code was changed.
        fixed: whether it has nothing to turn, and plays as it is.
        needs_fit: whether it is trained for the budget.
    """

    name: str
    group: Group
    at: Callable[[Task, float], list[Policy]]
    sites: Callable[[Task], Sites | None]
    knob: str = ""
    origin: str = ""
    fixed: bool = False
    needs_fit: bool = False

    def setting(self, policy: Policy) -> str:
        """Where the knob of one of its policies stands."""
        value = getattr(policy, self.knob, None)
        text = f"{value:.5g}" if isinstance(value, float) else str(value)
        return "" if value is None else f"{self.knob}={text}"

    def published(self, task: Task) -> Contestant | None:
        """The same at its published sites, for a row of its own; None: they are no others."""
        elsewhere = replace(task, sites="published")
        here, there = self.sites(task), self.sites(elsewhere)
        depth = task.backbone.depth
        if self.group == "control" or here is None or there is None:
            return None
        if parse_sites(here, depth) == parse_sites(there, depth):
            return None
        return replace(
            self,
            name=self.name + PUBLISHED,
            at=lambda task, budget: self.at(replace(task, sites="published"), budget),
            sites=lambda task: self.sites(replace(task, sites="published")),
        )
