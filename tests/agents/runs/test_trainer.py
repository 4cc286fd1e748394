"""Whole runs on a small network: budget met, reproducible, resumable, refusing nonsense."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from games import NAME, OwnLabels
from helpers import toy
from vitprune_env.agents import MAPPO, TrainConfig, TrainResult, load_policy, train
from vitprune_env.agents.runs import trainer
from vitprune_env.agents.runs.config import PRESETS, rl4evit
from vitprune_env.agents.runs.processes import Processes
from vitprune_env.errors import BudgetError, CheckpointError, NumericalError
from vitprune_env.game.rewards import Attribution, margin, unclamped_log_probability
from vitprune_env.game.rollout import play
from vitprune_env.game.token_game import TokenGame

TINY = TrainConfig(
    updates=6,
    images=16,
    minibatch=256,
    critic_hidden=(16,),
    actor_hidden=(8,),
    cache_images=48,
    calibration_images=48,
    target_share=0.5,
    sites=("1", "2", "3"),
    anneal_from=0.7,
    checkpoint_every=2,
)
DATA = OwnLabels(64)


def run(config: TrainConfig = TINY, data: Any = DATA, **options: Any) -> TrainResult:
    return train(toy(NAME), data, config, progress=False, **options)


def weights(result: TrainResult) -> Tensor:
    modules = (result.policy.actor, result.critic)
    return torch.cat([parameter.flatten() for module in modules for parameter in module.parameters()])


def assert_same(one: TrainResult, two: TrainResult) -> None:
    assert torch.equal(weights(one), weights(two))
    assert one.policy.threshold == two.policy.threshold
    timeless = [[{k: v for k, v in row.items() if k != "train_time"} for row in r.history] for r in (one, two)]
    assert timeless[0] == timeless[1]
    assert (one.train_macs, one.train_accuracy) == (two.train_macs, two.train_accuracy)


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


def test_same_seed_same_bits_whatever_the_global_streams_say() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = run()
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert_same(one, run())
    assert not torch.equal(weights(one), weights(run(replace(TINY, seed=1))))


@pytest.mark.parametrize("reward", ["shared_outcome", "paper"])
def test_resumed_equals_uninterrupted(reward: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(TINY, reward=reward, value_norm=True)
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
    config = replace(TINY, updates=2)
    assert_same(run(config), run(config, output=tmp_path / "new", resume=True))


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    config = replace(TINY, updates=1)
    run(config, output=tmp_path)
    with pytest.raises(CheckpointError, match="other clip, seed"):
        run(replace(config, seed=3, clip=0.1), output=tmp_path, resume=True)
    (tmp_path / "training.safetensors").write_text("nonsense")
    with pytest.raises(CheckpointError, match="unreadable"):
        run(config, output=tmp_path, resume=True)
    with pytest.raises(ValueError, match="resume"):
        run(config, resume=True)


def test_cached_prefix_changes_nothing_but_time() -> None:
    config = replace(TINY, updates=2, cache_images=len(DATA), calibration_images=64)
    cached, fresh = run(config), run(replace(config, cache_images=0))
    assert torch.allclose(weights(cached), weights(fresh), atol=1e-4)
    assert [row["accuracy"] for row in cached.history] == [row["accuracy"] for row in fresh.history]


def test_plain_torch_datasets_will_do() -> None:
    config = replace(TINY, updates=1)
    assert_same(run(config), run(config, TensorDataset(DATA.images, DATA.labels)))


def test_the_price_pulls_play_to_the_budget() -> None:
    """Asked for less, exploring play itself becomes cheaper, and tokens dearer."""
    config = replace(TINY, updates=16, lr=1e-2, price=0.03, price_rate=0.5, anneal_part=0.0)
    frugal, lavish = (run(replace(config, target_share=share)).history for share in (0.5, 0.95))
    assert frugal[0]["share"] == lavish[0]["share"] > 0.65
    assert frugal[-1]["share"] < lavish[-1]["share"] - 0.05
    assert frugal[-1]["price"] > 0.03 > lavish[-1]["price"]


def test_the_backbone_is_left_as_it_was() -> None:
    backbone = copy.deepcopy(toy(NAME)).train()
    before = copy.deepcopy(backbone.state_dict())
    train(backbone, DATA, replace(TINY, updates=1), progress=False)
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
    assert_same(run(), run(output=tmp_path, resume=True))


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="dataset: expected at least one image"):
        run(data=TensorDataset(torch.empty(0, 3, 40, 40), torch.empty(0)))
    with pytest.raises(BudgetError, match="budget: expected above"):
        run(replace(TINY, target_share=0.2))
    with pytest.raises(ValueError, match="at most one of target_gmacs"):
        TrainConfig(target_gmacs=1.0, target_keep=0.5)
    for bad in (
        {"updates": 0},
        {"lr": -1.0},
        {"discount": 2.0},
        {"reward": "fame"},
        {"minibatch": 1},
        {"update_chunk": 0},
        {"finetune_lr": 0.0},
        {"max_grad_norm": 0.0},
        {"merge_cost": 0.1, "reward": "paper"},
        {"charge_overhead": True, "reward": "attribution"},
    ):
        with pytest.raises(ValueError, match=f"{next(iter(bad))}: expected"):
            TrainConfig(**bad)


def test_attribution_is_of_the_outcome_that_was_chosen() -> None:
    for outcome, potential in (("correct", unclamped_log_probability), ("margin", margin)):
        config = replace(TINY, reward="attribution", outcome=outcome)
        trained = trainer.Run(toy(NAME), DATA, config, None, torch.device("cpu"), Processes())
        paid = trained.schedule.reward(0.5)
        assert isinstance(paid, Attribution)
        assert paid.potential is potential


def test_preset_of_the_paper() -> None:
    paper = PRESETS["rl4evit"]
    assert (paper.reward, paper.epochs, paper.minibatch, paper.clip, paper.trace) == ("paper", 15, None, 0.2, 0.95)
    assert paper.paper_sizes
    assert rl4evit(TrainConfig(seed=7)).seed == 7
    assert TrainConfig().budget == {"gmacs": None, "keep": None, "share": 0.35}
    assert paper.budget["share"] == 0.6
    assert rl4evit(TrainConfig(target_keep=0.9)).budget == {"gmacs": None, "keep": 0.9, "share": None}
    small = replace(paper, updates=1, images=8, epochs=2, cache_images=16, calibration_images=16, sites=("1", "3"))
    result = run(replace(small, target_share=0.9))
    assert result.policy.actor.hidden == (192, 256, 64)
    assert result.history[0]["gradient_steps"] == 2


def test_the_papers_weights_alone_decide_how_much_is_kept() -> None:
    """Without a budget keep_cost is annealed to what was asked, and the most probable action is taken as it is."""
    config = replace(TINY, reward="paper", keep_cost=4.0, outcome_bonus=2.0, target_share=None, updates=8)
    result = run(config)
    assert result.policy.threshold == 0.0
    prices = [row["price"] for row in result.history]
    assert prices == sorted(prices)
    assert prices[-1] == pytest.approx(4.0, rel=1e-6)
    cost = TokenGame.for_policy(toy(NAME), result.policy).cost
    half = torch.full((1, 3), cost.num_patches / 2)
    sites = result.policy.sites
    assert sites is not None
    looked_at = result.policy.actor.macs_per_token * 2 * cost.num_patches
    assert result.target_macs == pytest.approx(float(cost.forward(half, sites)) + looked_at)
    assert run(replace(config, target_share=0.5)).policy.threshold != 0.0


def test_keep_cost_belongs_to_the_papers_reward() -> None:
    with pytest.raises(ValueError, match=r"keep_cost: expected above 0, with reward='paper', got 1.0"):
        TrainConfig(keep_cost=1.0)
