"""Fine-tuning: what learns, what stays, the schedule's numbers, the loss by hand, resume to the bit."""

from __future__ import annotations

import signal
from copy import deepcopy
from dataclasses import replace
from math import cos, pi
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch.nn import functional as F

from games import NAME, OwnLabels
from helpers import toy
from vitprune_env import Backbone, KeepAll, TokenGame, load_backbone, play
from vitprune_env.agents.finetuning.loop import CosineKeepRate, FinetuneConfig, FineTuner, _scheduled, finetune
from vitprune_env.agents.shared.processes import Processes
from vitprune_env.agents.shared.signals import TrainingStopped
from vitprune_env.baselines import Brightness, EViT, LifeRegression, RandomDrop
from vitprune_env.data import Digits, fetch
from vitprune_env.errors import CheckpointError, NumericalError, SettingsError

SITES = ("1.attn", "3")
SHORT = FinetuneConfig(steps=6, batch_size=8, cache_images=16, warmup_steps=2, checkpoint_every=2, lr=1e-2)
DATA = OwnLabels(24)
TEACHERS_WEIGHT = 0.25


def tuned(config: FinetuneConfig = SHORT, policy: Any = None, **options: Any) -> Any:
    policy = EViT(0.6) if policy is None else policy
    return finetune(toy(NAME), policy, DATA, config=config, **{"sites": SITES, "progress": False, **options})


def parameters(backbone: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in backbone.model.state_dict().items()}


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_keep_rate_falls_along_a_half_cosine_over_the_first_third() -> None:
    schedule = CosineKeepRate(0.7)
    assert schedule(0.0) == 1.0
    assert schedule(1 / 6) == pytest.approx(0.85)
    assert schedule(1 / 12) == pytest.approx(0.7 + 0.3 * (1 + cos(pi / 4)) / 2)
    assert schedule(1 / 3) == schedule(0.5) == schedule(1.0) == 0.7
    assert CosineKeepRate(0.7, part=0.0)(0.0) == 0.7


@pytest.mark.parametrize("wrong", [{"target": 0.0}, {"target": 1.2}, {"target": 0.5, "part": 2.0}])
def test_schedule_refuses_nonsense(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"keep_rate|part"):
        CosineKeepRate(**wrong)


@pytest.mark.parametrize(
    "wrong",
    [{"steps": 0}, {"lr": 0.0}, {"distill": 1.5}, {"trainable": "some"}, {"temperature": 0.0}, {"warmup_steps": -1}],
)
def test_settings_refuse_nonsense_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        FinetuneConfig(**wrong)


def test_only_what_comes_after_the_first_site_learns_and_the_original_stays() -> None:
    before = parameters(toy(NAME))
    after = parameters(tuned().backbone)
    assert not changed(before, parameters(toy(NAME)))
    moved = changed(before, after)
    frozen = {"cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.norm1.weight", "blocks.0.attn.qkv.weight"}
    assert not moved & (frozen | {"blocks.0.attn.proj.weight"})
    assert {"blocks.0.mlp.fc1.weight", "blocks.0.norm2.weight", "blocks.1.attn.qkv.weight", "head.weight"} <= moved


def test_the_family_says_which_parameters_come_after_a_site_inside_a_block() -> None:
    sizes = {"img_size": 64, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 4, "init_values": 0.5}
    model = timm.create_model("vit_small_patch16_dinov3", dynamic_img_size=False, **sizes)
    config = replace(SHORT, cache_images=0)
    tuner = FineTuner(Backbone(model), DATA, config, KeepAll(), torch.Generator(), ("1.attn",))
    learning = {name for name, _ in tuner._parameters}
    assert {"blocks.0.gamma_2", "blocks.0.mlp.fc1.weight", "blocks.1.gamma_1", "head.weight"} <= learning
    assert not learning & {"blocks.0.gamma_1", "blocks.0.attn.proj.weight"}


def test_all_blocks_learn_when_asked() -> None:
    moved = changed(parameters(toy(NAME)), parameters(tuned(replace(SHORT, trainable="all")).backbone))
    assert {"cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight"} <= moved


def test_kept_tokens_of_the_frozen_part_change_nothing() -> None:
    kept, fresh = tuned(replace(SHORT, cache_images=24)), tuned(replace(SHORT, cache_images=0))
    for name, value in parameters(kept.backbone).items():
        torch.testing.assert_close(value, parameters(fresh.backbone)[name], atol=1e-5, rtol=1e-4)


def test_a_policy_that_sees_pixels_sees_those_of_kept_images_too() -> None:
    kept, fresh = (tuned(replace(SHORT, cache_images=count), Brightness(0.6)) for count in (24, 0))
    for name, value in parameters(kept.backbone).items():
        torch.testing.assert_close(value, parameters(fresh.backbone)[name], atol=1e-5, rtol=1e-4)


def test_loss_is_cross_entropy_mixed_with_the_dense_models_answer() -> None:
    config = replace(SHORT, distill=TEACHERS_WEIGHT, temperature=2.0, label_smoothing=0.1, cache_images=0)
    policy = EViT(0.6)
    backbone = load_backbone(deepcopy(toy(NAME).model))  # a tuner freezes what it does not train
    tuner = FineTuner(backbone, DATA, config, policy, torch.Generator().manual_seed(0), SITES)
    images, labels = fetch(DATA, range(8))
    tuner.images.draw = lambda _: (images, labels)  # type: ignore[method-assign]
    with torch.no_grad():
        pruned = play(TokenGame.for_policy(backbone, policy, sites=SITES), policy, images).outcome.logits
        dense = backbone(images)
    p, q = (dense / 2).softmax(1), (pruned / 2).softmax(1)
    divergence = (p * (p / q).log()).sum(1).mean()
    expected = 0.75 * F.cross_entropy(pruned, labels, label_smoothing=0.1) + TEACHERS_WEIGHT * 4 * divergence
    assert tuner.step(policy)["loss"] == pytest.approx(float(expected), rel=1e-5)


def test_the_loss_falls_and_the_history_says_what_was_asked() -> None:
    config = replace(SHORT, steps=30, lr=3e-3)
    result = finetune(toy(NAME), EViT(0.4), OwnLabels(24), CosineKeepRate(0.4), config, sites=SITES, progress=False)
    losses = [row["loss"] for row in result.history]
    assert sum(losses[-5:]) < 0.9 * sum(losses[10:15])
    rates = [row["keep_rate"] for row in result.history]
    assert rates[0] == 1.0
    assert rates[10:] == [0.4] * 20
    assert result.history[0]["gmacs"] > 1.2 * result.history[-1]["gmacs"]
    assert result.history[-1]["lr"] < result.history[5]["lr"]
    assert not result.backbone.training


def test_a_short_run_warms_up_for_a_fifth_of_it_at_most() -> None:
    config = replace(SHORT, steps=10, warmup_steps=8, cache_images=0)
    tuner = FineTuner(load_backbone(deepcopy(toy(NAME).model)), DATA, config, EViT(0.6), torch.Generator(), SITES)
    rates = []
    for tuner.steps_done in range(10):
        tuner._schedule()
        rates.append(tuner.optimizer.param_groups[0]["lr"])
    assert rates[0] < rates[1] < rates[2] == config.lr
    assert rates[2:] == sorted(rates[2:], reverse=True)


def test_killed_and_resumed_gives_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    straight = tuned()
    step, calls = FineTuner.step, []

    def dying(self: FineTuner, policy: Any) -> dict[str, float]:
        calls.append(policy)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return step(self, policy)

    monkeypatch.setattr(FineTuner, "step", dying)
    with pytest.raises(KeyboardInterrupt):
        tuned(output=tmp_path)
    monkeypatch.setattr(FineTuner, "step", step)
    resumed = tuned(output=tmp_path, resume=True)
    assert not changed(parameters(straight.backbone), parameters(resumed.backbone))
    assert resumed.history == straight.history
    with pytest.raises(CheckpointError, match="lr"):
        tuned(replace(SHORT, lr=1e-3), output=tmp_path, resume=True)


def test_a_signal_lets_the_step_finish_and_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policies = RandomDrop(0.5, seed=1), RandomDrop(0.5, seed=1), RandomDrop(0.5, seed=1)
    straight = tuned(policy=policies[0], schedule=CosineKeepRate(0.5))
    step, calls = FineTuner.step, []

    def interrupted(self: FineTuner, policy: Any) -> dict[str, float]:
        calls.append(policy)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGTERM)
        return step(self, policy)

    monkeypatch.setattr(FineTuner, "step", interrupted)
    with pytest.raises(TrainingStopped, match="SIGTERM: fine-tuning stopped after step 3 of 6") as stopped:
        tuned(policy=policies[1], schedule=CosineKeepRate(0.5), output=tmp_path)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert len((tmp_path / "history.jsonl").read_text().splitlines()) == 3
    resumed = tuned(policy=policies[2], schedule=CosineKeepRate(0.5), output=tmp_path, resume=True)
    assert len(calls) == SHORT.steps
    assert resumed.history == straight.history, "the random stream of the policy goes on, too"


def test_a_checkpoint_serves_only_the_run_that_left_it(tmp_path: Path) -> None:
    config = replace(SHORT, steps=2)
    tuned(config, output=tmp_path)
    with pytest.raises(CheckpointError, match="policy"):
        tuned(config, policy=RandomDrop(0.6), output=tmp_path, resume=True)
    with pytest.raises(CheckpointError, match="sites"):
        tuned(config, sites=("2",), output=tmp_path, resume=True)
    with pytest.raises(SettingsError, match=r"output: expected a folder without a run, .* backbone\.safetensors"):
        tuned(config, output=tmp_path)
    empty: Any = []
    begun: dict[str, Any] = {"sites": SITES, "output": tmp_path, "progress": False, "overwrite": True}
    with pytest.raises(ValueError, match="dataset"):  # begun anew, and ended before anything was saved
        finetune(toy(NAME), EViT(0.6), empty, config=config, **begun)
    assert not (tmp_path / "finetuning.safetensors").exists()


def test_weights_are_saved_where_load_backbone_reads_them(tmp_path: Path) -> None:
    backbone = load_backbone("vit_digits")
    config = replace(SHORT, steps=2)
    result = finetune(backbone, KeepAll(), Digits("train", size=16), config=config, output=tmp_path, progress=False)
    loaded = load_backbone("vit_digits", checkpoint=tmp_path / "backbone.safetensors")
    assert changed(parameters(backbone), parameters(loaded))
    assert not changed(parameters(result.backbone), parameters(loaded))


def test_stochastic_policies_and_the_global_generator() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    tuned(policy=RandomDrop(0.5, seed=1))
    assert torch.equal(before, torch.get_rng_state())


def test_a_random_policy_draws_anew_in_every_step() -> None:
    policy = RandomDrop(0.5, seed=1)
    at = _scheduled(policy, CosineKeepRate(0.5, part=0.0))
    obs = TokenGame(toy(NAME), SITES).reset(DATA.images[:2])
    one, two = at(0.5).decide(obs), at(0.5).decide(obs)
    assert not torch.equal(one.keep, two.keep)
    assert policy.keep_rate == 0.5


def test_policies_that_are_no_dataclasses_follow_a_schedule() -> None:
    policy = LifeRegression(0.5, embed_dim=toy(NAME).embed_dim)
    history = tuned(policy=policy, schedule=CosineKeepRate(0.5)).history
    assert history[0]["gmacs"] > history[-1]["gmacs"]
    assert policy.keep_rate == 0.5


def test_all_blocks_learn_also_in_a_network_that_was_fine_tuned_before() -> None:
    config = replace(SHORT, steps=2)
    first = tuned(config).backbone
    assert all(value.requires_grad for value in first.parameters())
    first.model.blocks[0].requires_grad_(False)
    again = finetune(
        first, EViT(0.6), DATA, config=replace(config, trainable="all"), sites=SITES, progress=False
    ).backbone
    assert "blocks.0.mlp.fc1.weight" in changed(parameters(first), parameters(again))


def test_half_precision_learns_nearly_the_same_and_keeps_full_weights() -> None:
    config = replace(SHORT, distill=TEACHERS_WEIGHT, lr=3e-3)
    full, half = tuned(config), tuned(replace(config, amp=True))
    losses = [[row["loss"] for row in result.history] for result in (full, half)]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    assert {value.dtype for value in half.backbone.parameters()} == {torch.float32}


def test_every_process_needs_an_image() -> None:
    with pytest.raises(ValueError, match="batch_size"):
        tuned(replace(SHORT, batch_size=1), processes=Processes(0, 2))


def test_a_policy_without_keep_rate_has_no_schedule() -> None:
    with pytest.raises(ValueError, match="KeepAll"):
        tuned(policy=KeepAll(), schedule=CosineKeepRate(0.5))


def test_resume_asks_for_a_folder() -> None:
    with pytest.raises(ValueError, match="output"):
        tuned(resume=True)


def test_an_exploding_loss_stops_with_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loss, calls = FineTuner._loss, []

    def exploding(self: FineTuner, *parts: Any) -> torch.Tensor:
        calls.append(1)
        return loss(self, *parts) * (float("nan") if len(calls) == 4 else 1.0)

    monkeypatch.setattr(FineTuner, "_loss", exploding)
    with pytest.raises(NumericalError, match="step 4"):
        tuned(output=tmp_path)
    monkeypatch.setattr(FineTuner, "_loss", loss)
    assert len(tuned(output=tmp_path, resume=True).history) == SHORT.steps
