"""Whole runs on a small network: budget met, reproducible, resumable, refusing nonsense."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from games import NAME, OwnLabels
from helpers import toy
from runs import TINY, but
from vitprune_env.agents import (
    MAPPO,
    PRESETS,
    BudgetRange,
    Equilibrium,
    FinetuneConfig,
    GMACs,
    KeepRate,
    MAPPOConfig,
    PaperNetworks,
    PPOSingleConfig,
    Preset,
    RunConfig,
    Share,
    TrainResult,
    load_policy,
    train,
)
from vitprune_env.errors import BudgetError, CheckpointError, NumericalError, SettingsError
from vitprune_env.files import load_state
from vitprune_env.game.rewards import Attribution, PaperReward, SharedOutcome, margin
from vitprune_env.game.rollout import play
from vitprune_env.game.token_game import TokenGame

DATA = OwnLabels(64)


def run(config: Preset = TINY, data: Any = DATA, **options: Any) -> TrainResult:
    return train(toy(NAME), data, **config.arguments, progress=False, **options)


@cache
def whole() -> TrainResult:
    """The uninterrupted run that many others are compared with."""
    return run()


def weights(result: TrainResult) -> Tensor:
    modules = (result.policy.actor, result.critic)
    return torch.cat([parameter.flatten() for module in modules for parameter in module.parameters()])


def assert_same(one: TrainResult, two: TrainResult) -> None:
    assert torch.equal(weights(one), weights(two))
    assert one.policy.threshold == two.policy.threshold
    timeless = [[{k: v for k, v in row.items() if k != "train_time"} for row in r.history] for r in (one, two)]
    assert timeless[0] == timeless[1]
    assert (one.train_macs, one.train_accuracy) == (two.train_macs, two.train_accuracy)


def test_the_threshold_is_set_on_other_images_if_there_are_any() -> None:
    others = OwnLabels(48, seed=7)
    one, two = whole(), run(calibration=others)
    assert torch.equal(weights(one), weights(two))  # learning does not see them
    assert one.policy.threshold != two.policy.threshold
    game = TokenGame.for_policy(toy(NAME), two.policy)
    assert float(play(game, two.policy, others.images).outcome.macs.mean()) == pytest.approx(two.train_macs)
    assert 0.95 * two.target_macs < two.train_macs <= two.target_macs


def test_a_run_meets_its_budget_and_says_what_happened(tmp_path: Path) -> None:
    result = run(output=tmp_path)
    game = TokenGame.for_policy(toy(NAME), result.policy)
    assert result.target_macs == 0.5 * game.cost.dense()
    assert 0.95 * result.target_macs < result.train_macs <= result.target_macs
    assert len(result.history) == 6
    row = result.history[0]
    assert {"accuracy", "gmacs", "keep/1", "keep/3", "price", "loss", "ent_loss", "approx_kl"} <= set(row)
    assert {"clip_frac", "explained_variance", "actor_loss", "vf_loss", "grad_norm"} <= set(row)
    assert [round(row["target_share"], 4) for row in result.history] == [0.7, 0.6333, 0.5667, 0.5, 0.5, 0.5]
    loaded = load_policy(tmp_path / "policy.safetensors")
    assert torch.equal(play(game, loaded, DATA.images).keep, play(game, result.policy, DATA.images).keep)
    assert loaded.info["backbone"] == NAME
    assert loaded.info["target_macs"] == result.target_macs
    assert list((tmp_path / "tensorboard").iterdir())
    with pytest.raises(SettingsError, match=r"output: expected a folder without a run, got .*policy\.safetensors"):
        run(but(TINY, updates=1), output=tmp_path)
    assert load_policy(tmp_path / "policy.safetensors").info["updates"] == 6
    run(but(TINY, updates=1), output=tmp_path, overwrite=True)
    assert load_policy(tmp_path / "policy.safetensors").info["updates"] == 1


def test_same_seed_same_bits_whatever_the_global_streams_say() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = run()
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert_same(one, run())
    assert not torch.equal(weights(one), weights(run(but(TINY, seed=1))))


@pytest.mark.parametrize("reward", [None, PaperReward(outcome_bonus=1.0)], ids=["shared_outcome", "paper"])
def test_resumed_equals_uninterrupted(reward: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = but(TINY, reward=reward, value_norm=True)
    whole = run(config)
    update, calls = MAPPO.update, []

    def cut(self: MAPPO, *args: Any, **kwargs: Any) -> Any:
        calls.append(self)
        if len(calls) == 6:  # after the checkpoint of update 4, in the middle of what follows it
            raise KeyboardInterrupt
        return update(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(MAPPO, "update", cut)
        with pytest.raises(KeyboardInterrupt):
            run(config, output=tmp_path)
    assert_same(whole, run(config, output=tmp_path, resume=True))
    assert_same(whole, run(config, output=tmp_path, resume=True))  # nothing left to do but calibrate


def test_resume_on_an_empty_folder_starts_afresh(tmp_path: Path) -> None:
    config = but(TINY, updates=2)
    assert_same(run(config), run(config, output=tmp_path / "new", resume=True))


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    config = but(TINY, updates=1)
    run(config, output=tmp_path)
    with pytest.raises(CheckpointError, match="other clip, seed"):
        run(but(config, seed=3, clip=0.1), output=tmp_path, resume=True)
    (tmp_path / "training.safetensors").write_text("nonsense")
    with pytest.raises(CheckpointError, match="unreadable"):
        run(config, output=tmp_path, resume=True)
    with pytest.raises(ValueError, match="resume"):
        run(config, resume=True)


def test_cached_prefix_changes_nothing_but_time() -> None:
    config = but(TINY, updates=2, cache_images=len(DATA), calibration_images=64)
    cached, fresh = run(config), run(but(config, cache_images=0))
    assert torch.allclose(weights(cached), weights(fresh), atol=1e-4)
    assert [row["accuracy"] for row in cached.history] == [row["accuracy"] for row in fresh.history]


def test_plain_torch_datasets_will_do() -> None:
    config = but(TINY, updates=1)
    assert_same(run(config), run(config, TensorDataset(DATA.images, DATA.labels)))


def test_the_price_pulls_play_to_the_budget() -> None:
    """Asked for less, exploring play itself becomes cheaper, and tokens dearer."""
    config = but(TINY, updates=16, lr=1e-2, reward=SharedOutcome(0.03), price_rate=0.5, anneal_part=0.0)
    frugal, lavish = (run(but(config, share=share)).history for share in (0.5, 0.95))
    assert frugal[0]["share"] == lavish[0]["share"] > 0.65
    assert frugal[-1]["share"] < lavish[-1]["share"] - 0.05
    assert frugal[-1]["price"] > 0.03 > lavish[-1]["price"]


def test_the_backbone_is_left_as_it_was() -> None:
    backbone = copy.deepcopy(toy(NAME)).train()
    before = copy.deepcopy(backbone.state_dict())
    train(backbone, DATA, **but(TINY, updates=1).arguments, progress=False)
    assert backbone.training
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


def test_nan_stops_training_and_keeps_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    update, calls = MAPPO.update, []

    def poison(self: MAPPO, *args: Any, **kwargs: Any) -> Any:
        calls.append(self)
        if len(calls) == 4:
            with torch.no_grad():
                next(self.critic.parameters()).fill_(float("nan"))
        return update(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(MAPPO, "update", poison)
        with pytest.raises(NumericalError, match="last checkpoint is kept"):
            run(output=tmp_path)
    assert_same(whole(), run(output=tmp_path, resume=True))


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="dataset: expected at least one image"):
        run(data=TensorDataset(torch.empty(0, 3, 40, 40), torch.empty(0)))
    with pytest.raises(BudgetError, match="budget: expected above"):
        run(but(TINY, share=0.2))
    bad: dict[Any, dict[str, Any]] = {
        RunConfig: {"updates": 0, "images": 0, "cache_images": -1, "log_images_every": -1},
        MAPPOConfig: {"lr": -1.0, "discount": 2.0, "minibatch": 1, "update_chunk": 0, "max_grad_norm": 0.0,
                      "clip": 1.0, "value_clip": 0.0, "precision": "fp8", "epochs": 0},
        FinetuneConfig: {"lr": 0.0, "when": "never", "every": 0},
        Share: {"anneal_from": 1.5, "price_rate": -1.0},
    }  # fmt: skip
    for settings, wrong in bad.items():
        for name, value in wrong.items():
            with pytest.raises(ValueError, match=f"{name}: expected"):
                settings(**{name: value})
    for price in (0.0, torch.ones(3)):
        with pytest.raises(ValueError, match="price: expected one number above 0"):
            run(but(TINY, reward=SharedOutcome(price)))


def test_every_settings_object_is_small() -> None:
    for settings in (RunConfig, MAPPOConfig, PPOSingleConfig, FinetuneConfig, Share, BudgetRange, PaperNetworks):
        assert len(fields(settings)) < 20


def test_three_ways_to_say_a_budget_train_alike() -> None:
    short = but(TINY, updates=1)
    cost = run(short).target_macs
    assert run(replace(short, budget=GMACs(cost / 1e9))).target_macs == pytest.approx(cost)
    keep = run(replace(short, budget=KeepRate(0.5))).target_macs
    assert 0.3 * cost < keep < cost / 0.5


def test_a_reward_of_ones_own_follows_the_budget() -> None:
    """Whoever wrote it: with a field `price`, or a method `at_price`; dearer where play costs too much."""

    @dataclass(frozen=True)
    class Mine(SharedOutcome):
        price: float = 0.03

    class AtPrice:
        def __init__(self, price: float) -> None:
            self.price, self.paid = price, SharedOutcome(price)

        def at_price(self, price: float) -> AtPrice:
            return AtPrice(price)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.paid, name)

    config = but(TINY, updates=3, price_rate=0.5, anneal_from=0.5)
    for reward in (Mine(), AtPrice(0.03), Attribution(0.03)):
        history = run(but(config, reward=reward)).history
        assert history[0]["price"] == 0.03
        assert history[0]["share"] > 0.5
        assert history[1]["price"] > 0.03
    same = [run(but(config, reward=reward)).history for reward in (Mine(), SharedOutcome(0.03))]
    assert [row["price"] for row in same[0]] == [row["price"] for row in same[1]]


def test_checkpoints_say_which_settings_differ(tmp_path: Path) -> None:
    config = but(TINY, updates=1)
    run(config, output=tmp_path)
    settings = load_state(tmp_path / "training.safetensors")["settings"]
    assert settings["learner"]["name"] == "MAPPOConfig"
    assert settings["reward"] == {
        "name": "SharedOutcome", "price": 0.01, "outcome": "correct", "merge_cost": 0.0, "charge_overhead": False,
    }  # fmt: skip
    assert "vitprune_env." not in json.dumps(settings)
    for other, said in (
        (but(config, actor_hidden=(9,)), r"learner.networks.actor_hidden was \[8\], now is \[9\]"),
        (but(config, budget=GMACs(0.002)), "budget was Share, now is GMACs"),
        (but(config, reward=SharedOutcome(0.01, margin)), "reward.outcome was 'correct', now is 'margin'"),
        (but(config, sites=("1", "3")), "sites was"),
    ):
        with pytest.raises(CheckpointError, match=said):
            run(other, output=tmp_path, resume=True)
    run(but(config, lr=1e-4, max_grad_norm=1.0, checkpoint_every=7), output=tmp_path, resume=True)


def test_preset_of_the_paper() -> None:
    paper = PRESETS["rl4evit"]
    learner = paper.learner
    assert isinstance(learner, MAPPOConfig)
    assert isinstance(paper.reward, PaperReward)
    assert (learner.epochs, learner.minibatch, learner.clip, learner.trace) == (15, None, 0.2, 0.95)
    assert isinstance(learner.networks, PaperNetworks)
    assert PRESETS["default"].budget == Share(0.35)
    assert paper.budget == Share(0.6, anneal_from=0.7)
    small = but(paper, updates=1, images=8, epochs=2, cache_images=16, calibration_images=16, sites=("1", "3"))
    result = run(but(small, share=0.9))
    assert result.policy.actor.hidden == (192, 256, 64)
    assert result.history[0]["gradient_steps"] == 2


def test_the_papers_weights_alone_decide_how_much_is_kept() -> None:
    """Without a budget keep_cost is annealed to what was asked, and deployed play costs what exploring play costs."""
    reward = PaperReward(keep_cost=4.0, outcome_bonus=2.0)
    config = but(TINY, reward=reward, budget=Equilibrium(anneal_from=0.7), updates=8)
    result = run(config)
    game = TokenGame(toy(NAME), ("1", "2", "3"))
    exploring = play(game, result.policy.sampling(), DATA.images).outcome.macs.mean()
    assert result.train_macs == pytest.approx(float(exploring), rel=0.03)
    prices = [row["price"] for row in result.history]
    assert prices == sorted(prices)
    assert prices[-1] == 4.0
    cost = TokenGame.for_policy(toy(NAME), result.policy).cost
    half = torch.full((1, 3), cost.num_patches / 2)
    sites = result.policy.sites
    assert sites is not None
    looked_at = result.policy.actor.macs_per_token * 2 * cost.num_patches
    assert result.target_macs == pytest.approx(float(cost.forward(half, sites)) + looked_at)
    assert run(but(config, budget=None, updates=1)).target_macs == result.target_macs


def test_weights_that_keep_more_than_dense_costs_are_reached() -> None:
    """The policy's own MACs put the equilibrium above the dense network; keep_cost is still the one that was given."""
    config = but(TINY, reward=PaperReward(keep_cost=1.0, outcome_bonus=0.95), budget=None, networks=PaperNetworks())
    result = run(but(config, updates=2, epochs=1))
    assert result.target_macs > TokenGame(toy(NAME), ("1", "2", "3")).cost.dense()
    assert [row["price"] for row in result.history] == [1.0, 1.0]


def test_deployed_play_may_draw_its_actions() -> None:
    config = but(TINY, reward=PaperReward(keep_cost=4.0, outcome_bonus=2.0), updates=2)
    free = run(but(config, budget=Equilibrium(sampled=True))).policy
    assert (free.threshold, free.seed) == (0.0, 0)
    result = run(but(config, budget=Share(0.5, sampled=True)))
    assert result.policy.seed == 0
    assert result.train_macs == pytest.approx(result.target_macs, rel=0.05)  # other draws than those of calibration
    ranged = run(but(TINY, budget=BudgetRange(0.45, 0.8, sampled=True), updates=2)).policy
    assert ranged.seed == 0


def test_the_price_of_a_reward_without_one_cannot_be_set() -> None:
    for budget, name in ((Share(0.5, price_rate=0.3), "price_rate"), (Equilibrium(price_gain=1.0), "price_gain")):
        with pytest.raises(ValueError, match=f"{name}: expected .* with PaperReward, which has no price to move"):
            run(but(TINY, budget=budget, reward=PaperReward()))


def test_the_paper_to_the_letter() -> None:
    """All that RL4EViT and its reference for the other settings print; play goes to where nothing is kept."""
    printed = PRESETS["rl4evit-printed"]
    learner = printed.learner
    assert isinstance(learner, MAPPOConfig)
    found = (learner.lr, learner.lr_final, learner.epochs, learner.minibatch, learner.discount, learner.trace,
             learner.value_norm, learner.huber_delta, learner.max_grad_norm, learner.clip, learner.entropy)  # fmt: skip
    assert found == (5e-5, 1.0, 15, None, 0.99, 0.95, True, 10.0, 10.0, 0.2, 0.01)
    assert printed.reward == PaperReward(keep_cost=0.8, outcome_bonus=1.0, scaled=False, pay="all")
    small = but(printed, updates=6, images=16, cache_images=48, calibration_images=48, sites=("1", "2", "3"))
    result = run(but(small, lr=3e-3, actor_hidden=(8,), critic_hidden=(16,)))
    assert result.policy.seed == 0
    assert {row["price"] for row in result.history} == {0.8}
    kept = [row["keep/1"] for row in result.history]
    assert kept[-1] < kept[0] - 0.05


def test_all_blocks_learn_only_if_nothing_before_the_first_site_is_kept() -> None:
    tuned = FinetuneConfig(when="alternate", every=1, steps=2, batch_size=8, trainable="all")
    with pytest.raises(ValueError, match="cache_images: expected 0 with trainable='all'"):
        run(but(TINY, finetune=tuned))
    for when in ("alternate", "after"):
        config = but(
            replace(TINY, run=replace(TINY.run, cache_images=0)), updates=2, finetune=replace(tuned, when=when)
        )
        learnt = run(config).backbone.model.state_dict()
        first = "blocks.0.attn.qkv.weight"
        assert not torch.equal(learnt[first], toy(NAME).model.state_dict()[first])


def test_without_a_budget_the_reward_has_to_settle() -> None:
    with pytest.raises(ValueError, match=r"budget: expected one, such as Share\(0.35\), with SharedOutcome"):
        run(but(TINY, budget=None))
    with pytest.raises(ValueError, match=r"keep_cost: expected above 0, got 0.0"):
        run(but(TINY, budget=None, reward=PaperReward(keep_cost=0.0)))
