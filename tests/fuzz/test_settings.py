"""Settings of all kinds with odd values: refused, or numbers of the declared type in the range of this table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from math import inf, isfinite
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from fuzzing import TIMES, attempt, inputs, odd
from vitprune_env import PaperReward, SharedOutcome, TeamOutcome
from vitprune_env.agents import (
    BackboneConfig,
    BudgetRange,
    FinetuneConfig,
    GMACs,
    KeepRate,
    LightNetworks,
    MAPPOConfig,
    PaperNetworks,
    PGPEConfig,
    PPOSingleConfig,
    RunConfig,
    Share,
    TokenDropping,
)
from vitprune_env.agents.runs.settings import Settings
from vitprune_env.agents.shared.processes import Processes
from vitprune_env.baselines import ToMe, TopK
from vitprune_env.cli.flags.ranges import RANGES
from vitprune_env.data import DigitsConfig
from vitprune_env.envs.actions import KeepActions

REWARDS = (SharedOutcome, TeamOutcome, PaperReward)  # are checked where they are used
KINDS: tuple[Callable[..., Any], ...] = (
    *(RunConfig, MAPPOConfig, PPOSingleConfig, PGPEConfig, FinetuneConfig, BackboneConfig, TokenDropping),
    *(Share, GMACs, KeepRate, BudgetRange, LightNetworks, PaperNetworks, DigitsConfig),
    *REWARDS,
)
LEAST: dict[str, float] = {  # of numbers that are accepted; other names may be any finite number
    **dict.fromkeys(("updates", "images", "calibration_images", "validation_images", "checkpoint_every"), 1),
    **dict.fromkeys(("steps", "batch_size", "every", "copies", "update_chunk"), 1),
    **dict.fromkeys(("cache_images", "validate_every", "patience", "log_images_every", "warmup_steps"), 0),
    **dict.fromkeys(("lr", "lr_final", "adam_eps", "clip", "value_coef", "entropy", "noise", "tint"), 0),
    **dict.fromkeys(("anneal_from", "anneal_part", "price_rate", "price_gain", "keep"), 0),
    **dict.fromkeys(("weight_decay", "min_lr", "label_smoothing", "distill", "temperature"), 0),
    "minibatch": 2,
}
MOST: dict[str, float] = dict.fromkeys(("anneal_from", "anneal_part", "keep", "label_smoothing", "distill"), 1)
MOST |= {"clip": 1, "lr_final": 1}


@TIMES
def test_settings_are_refused_or_in_range(times: int) -> None:
    @inputs(600 * times)
    @given(st.sampled_from(KINDS), st.data())
    def check(kind: Any, data: st.DataObject) -> None:
        names = [each.name for each in fields(kind) if each.init]
        name, value = data.draw(st.sampled_from(names)), data.draw(odd)
        required = {"GMACs": {"gmacs": 1.0}, "KeepRate": {"keep": 0.5}, "BudgetRange": {"low": 0.2, "high": 0.6}}

        def made() -> Any:
            settings = kind(**{**required.get(kind.__name__, {}), name: value})
            if kind in REWARDS:
                Settings(Share(), PPOSingleConfig(), settings, RunConfig(), None, None, KeepActions()).check(
                    Processes()
                )
            return settings

        settings = attempt(made)
        if settings is None:
            return
        kept = getattr(settings, name)
        if isinstance(kept, int | float) and not isinstance(kept, bool):
            assert isfinite(kept), (name, kept)
            assert LEAST.get(name, -inf) <= kept <= MOST.get(name, inf), (name, kept)

    check()


@TIMES
def test_keep_rates_are_refused_or_in_range(times: int) -> None:
    @inputs(50 * times)
    @given(st.sampled_from([TopK, ToMe]), odd)
    def check(kind: Any, value: Any) -> None:
        policy = attempt(lambda: kind(value))
        if policy is not None and kind is TopK:
            assert 0 < policy.keep_rate <= 1
            assert value in RANGES["keep_rate"]

    check()
