"""Bring a policy to a budget with few passes through the network."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor

from vitprune_env.baselines import Knob
from vitprune_env.baselines.calibration import Setting, out_of_reach
from vitprune_env.benchmarking.contestants.task import Task
from vitprune_env.benchmarking.measurement import Sites
from vitprune_env.benchmarking.prepared import PreparedImages
from vitprune_env.game.rollout import play
from vitprune_env.game.token_game import TokenGame
from vitprune_env.policy import Policy

P = TypeVar("P", bound=Policy)

FEW = 8  # images of the search
TOLERANCE = 0.002  # how far from the budget the search may stop, as a share of it
STEPS = 40  # settings that the search on few images tries, at most
CORRECTIONS = 4  # settings that are tried on all images, at most
OFF = 0.02  # how far from the budget, as a share of it, the corrected aim may end
SEARCHED = 12  # further settings that are tried on all images where it ends farther off
ALIKE = 5e-4  # settings that differ by less than this share of them are not told apart

_log = logging.getLogger(__name__)


def at_budget(build: Callable[[Setting], P], knob: Knob, budget: float, task: Task, sites: Sites | None) -> P:
    """The policy whose knob is turned until the images to calibrate on cost the budget.

    The setting is searched on eight images. Most methods keep equally many tokens of every image: for them that is all.
    For the others all images tell how much more or less they cost than the few, the aim of the search is corrected by
    that, and the setting whose cost comes closest to the budget is taken. Where this ends more than two per cent off
    the budget, because the few are not like the others, the search goes on with all images, between the settings that
    were tried. If it still ends off the budget, `task.notes` and a warning say so.

    Args:
        build: makes the policy from a setting of its knob.
        knob: what is turned.
        budget: mean GMACs per image, policy and evidence included.
        task: network and images.
        sites: where the policy acts; None: where it is made to act.

    Raises:
        BudgetError: for a budget that no setting meets; the message gives the range.
    """
    backbone = task.backbone
    where = backbone.sites_for(build(knob.setting(1.0, backbone.num_patches, 1)), sites)
    few = task.tune.spread(FEW)

    @cache
    def setting(position: float) -> Setting:
        return knob.setting(position, backbone.num_patches, len(where))

    def macs(position: float, images: PreparedImages) -> Tensor:
        policy = build(setting(position))
        game = TokenGame.for_policy(backbone, policy, sites=where)
        with torch.inference_mode():
            return torch.cat([play(game, policy, batch).outcome.macs for batch, _ in images.inputs(game)])

    @cache
    def of_few(position: float) -> Tensor:
        return macs(position, few)

    @cache
    def of_all(position: float) -> float:
        return float(macs(position, task.tune).mean()) / 1e9

    def search(aim: float) -> float:
        return _search(lambda position: float(of_few(position).mean()) / 1e9, aim, setting)

    position = search(budget)
    if position in (0.0, 1.0):
        same = all(len(of_few(end).unique()) == 1 for end in (0.0, 1.0))
        low, high = (float(of_few(end).mean()) / 1e9 if same else of_all(end) for end in (0.0, 1.0))
        if not low <= budget <= high:
            name = type(build(setting(1.0))).__name__
            raise out_of_reach(f"{name} reaches", low, high, budget, backbone, where)
    elif len(of_few(position).unique()) == 1:
        return build(setting(position))
    tried, aim = {position: of_all(position)}, budget
    for _ in range(CORRECTIONS):
        if abs(tried[position] / budget - 1) <= TOLERANCE:
            break
        aim *= budget / tried[position]
        position = search(aim)
        if position in tried:
            break
        tried[position] = of_all(position)
    position = min(tried, key=lambda position: abs(tried[position] - budget))
    if abs(tried[position] / budget - 1) > OFF:
        high = min((position for position in tried if tried[position] >= budget), default=1.0)
        low = max((position for position in tried if position < high and tried[position] < budget), default=0.0)
        ends = _search(of_all, budget, setting, low, high, SEARCHED), position
        position = min(ends, key=lambda position: abs(of_all(position) - budget))
    if abs(of_all(position) / budget - 1) > OFF:
        dense = task.dense_gmacs / 100
        note = f"no setting found nearer to the budget than {of_all(position) / dense:.3g} % of dense"
        name = type(build(setting(position))).__name__
        _log.warning("%s: %s, which is %.3g %%", name, note, budget / dense)
        task.notes.append(note)
    return build(setting(position))


def _search(
    cost: Callable[[float], float],
    aim: float,
    setting: Callable[[float], Setting],
    low: float = 0.0,
    high: float = 1.0,
    steps: int = STEPS,
) -> float:
    """The smallest position found from `low` to `high` that costs at least `aim`; an end where `aim` is out of reach.

    Steps where the chord says and steps to the middle of the range take turns: the first are fast on a smooth cost, the
    second halve the range whatever the cost looks like.
    """
    if cost(low) >= aim:
        return low
    if cost(high) <= aim:
        return high
    for step in range(steps):
        if cost(high) <= (1 + TOLERANCE) * aim or _alike(setting(low), setting(high)):
            break
        part = 0.5
        if step % 2 == 0:
            part = ((1 + TOLERANCE / 2) * aim - cost(low)) / (cost(high) - cost(low))
            part = min(max(part, 0.02), 0.98)
        middle = low + part * (high - low)
        low, high = (middle, high) if cost(middle) < aim else (low, middle)
    return high


def _alike(one: Setting, other: Setting) -> bool:
    """Whether two settings are as good as the same."""
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) <= ALIKE * abs(other)
    return one == other
