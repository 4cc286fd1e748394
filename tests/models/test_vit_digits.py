"""The shipped backbone: it is accurate, it needs its tokens, and its training is reproducible."""

from pathlib import Path
from typing import cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import nn
from torch.nn import functional as F

from vitprune_env.data import Digits
from vitprune_env.engine.backbone import Backbone
from vitprune_env.engine.cost import CostModel
from vitprune_env.errors import CheckpointError, NumericalError
from vitprune_env.examples.train_backbone import (
    GATES,
    Config,
    DropAll,
    Scored,
    Training,
    around_digit,
    far_looking,
    ink_per_patch,
    measure,
    train,
)
from vitprune_env.game.rollout import evaluate, play
from vitprune_env.game.token_game import TokenGame
from vitprune_env.models.vit_digits import VIT_DIGITS, WEIGHTS, create_vit_digits, load_vit_digits

TINY = {"steps": 6, "batch_size": 4, "eval_images": 20, "checkpoint_every": 2}


@pytest.fixture(scope="module")
def shipped() -> Backbone:
    return Backbone(load_vit_digits(), "vit_digits", VIT_DIGITS.sites)


@pytest.fixture(scope="module")
def measured(shipped: Backbone) -> dict[str, float]:
    return measure(shipped, Digits("validation", 250, seed=1))


def test_the_backbone_is_a_plain_timm_vit_of_the_promised_size(shipped: Backbone) -> None:
    assert type(shipped.model) is VisionTransformer
    assert all(type(block) is Block for block in shipped.model.blocks)
    assert shipped.num_prefix == 1
    assert 64 <= shipped.num_patches <= 144
    assert (shipped.depth, shipped.embed_dim, shipped.num_heads) == (8, 48, 3)
    assert not shipped.model.training
    assert (WEIGHTS / "vit_digits.safetensors").stat().st_size < 1.5e6


@pytest.mark.parametrize("gate", GATES, ids=lambda gate: gate.name)
def test_the_shipped_weights_pass_their_gates(measured: dict[str, float], gate) -> None:  # noqa: ANN001
    slack = 2.5 if gate.name == "dense accuracy" else 0.0  # two standard errors on so few scenes
    assert gate.passed(measured[gate.name] + slack), measured


def test_the_shipped_weights_are_accurate(shipped: Backbone) -> None:
    images, labels = Digits("validation", 1000, seed=1).batch(range(1000))
    with torch.no_grad():
        accuracy = (shipped(images).argmax(1) == labels).float().mean()
    assert accuracy > 0.955, "96 %, less one standard error"


def test_knowing_where_the_digit_is_makes_pruning_nearly_free(measured: dict[str, float]) -> None:
    assert measured["lost by the ink oracle at 35 %"] < 1.5
    assert measured["lost by RandomDrop at 25 %"] > measured["lost by EViT at 25 %"] + 5
    assert measured["lost by EViT at 25 %"] > measured["lost by the ink oracle at 25 %"] + 3


def test_the_compared_policies_cost_what_they_should(shipped: Backbone) -> None:
    scenes, cost = Digits("validation", 8), CostModel.of(shipped)
    images, labels = scenes.batch(range(8))
    game = TokenGame(shipped)
    alone = play(game, DropAll(), images, labels).outcome
    assert (alone.n_kept == 0).all()
    assert torch.equal(alone.macs, torch.full((8,), cost.floor(shipped.default_sites), dtype=torch.float64))
    rate = cost.keep_rate_for(0.25 * cost.dense(), shipped.default_sites)
    found = evaluate(game, Scored(rate, ink_per_patch(scenes, shipped)), [(images, labels)])
    assert found.macs == pytest.approx(0.25 * cost.dense(), rel=0.03)


def test_scores_keep_the_best_tokens_of_the_right_images(shipped: Backbone) -> None:
    images, labels = Digits("validation", 6).batch(range(6))
    scores = torch.rand(6, shipped.num_patches, generator=torch.Generator().manual_seed(0))
    policy, game = Scored(0.1, scores), TokenGame(shipped)
    first = play(game, policy, images[:4], labels[:4])
    second = play(game, policy, images[4:], labels[4:])
    kept = torch.cat((first.keep[0], second.keep[0]))
    assert torch.equal(kept, scores >= scores.topk(10, 1).values[:, -1:])


def test_fresh_weights_follow_the_seed_and_leave_the_global_state_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, same, other = (create_vit_digits(seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["blocks.0.attn.qkv.weight"], other["blocks.0.attn.qkv.weight"])


def test_unreadable_and_foreign_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"missing\.safetensors"):
        load_vit_digits(tmp_path / "missing.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"not weights")
    with pytest.raises(CheckpointError, match=r"broken\.safetensors"):
        load_vit_digits(tmp_path / "broken.safetensors")
    save_file({"weight": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(CheckpointError, match="cls_token"):
        load_vit_digits(tmp_path / "foreign.safetensors")


def test_the_training_window_covers_the_digit() -> None:
    scenes = Digits("train", 200)
    rows = torch.arange(200)
    near = around_digit(scenes.boxes(rows), window=7)
    assert near.shape == (200, 49)
    assert all(len(set(patches.tolist())) == 49 for patches in near)
    assert near.min() >= 0
    assert near.max() < 100
    ink = F.avg_pool2d(scenes.ink(rows)[:, None], 4).flatten(1)
    seen = ink.gather(1, near).sum(1) / ink.sum(1)
    assert (seen[scenes.sides(rows) < 22] > 0.99).all()
    assert (seen > 0.7).all()
    assert seen.mean() > 0.95


def test_far_looking_is_minus_the_log_share_of_near_attention() -> None:
    block = cast(Block, create_vit_digits().blocks[0])
    tokens = torch.randn(2, 101, 48, generator=torch.Generator().manual_seed(0))
    patches = torch.arange(100).expand(2, -1)
    with torch.no_grad():
        cast(Attention, block.attn).qkv.weight.zero_()  # every token looks everywhere alike
        assert float(far_looking(block, tokens, patches, radius=10)) == pytest.approx(0, abs=1e-3)
        penalty = float(far_looking(block, tokens, patches, radius=1))
    # 8 x 8 inner patches see 9 near ones, 4 x 8 at the border 6, 4 corners 4; each also the class token.
    counts = torch.tensor([9.0] * 64 + [6.0] * 32 + [4.0] * 4)
    assert penalty == pytest.approx(-float(((counts + 1) / 101 + 1e-4).log().mean()), rel=1e-4)


def test_an_interrupted_training_ends_like_an_uninterrupted_one(tmp_path: Path) -> None:
    train(Config(output=tmp_path / "whole", **TINY))
    cut = Training(Config(output=tmp_path / "cut", **TINY))
    (tmp_path / "cut").mkdir()
    for _ in range(3):
        cut.advance()
    cut.save(tmp_path / "cut" / "checkpoint.pt")
    train(Config(output=tmp_path / "cut", resume=True, **TINY))
    whole, resumed = (load_file(tmp_path / name / "vit_digits.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    fresh = create_vit_digits().state_dict()
    assert not torch.equal(whole["blocks.0.attn.qkv.weight"], fresh["blocks.0.attn.qkv.weight"])
    assert (tmp_path / "whole" / "vit_digits.json").exists()


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path: Path) -> None:
    training = Training(Config(output=tmp_path, **TINY))
    training.save(tmp_path / "checkpoint.pt")
    with pytest.raises(CheckpointError, match="seed"):
        train(Config(output=tmp_path, resume=True, seed=1, **TINY))


def test_a_loss_that_is_not_finite_stops_the_training(tmp_path: Path) -> None:
    training = Training(Config(output=tmp_path, **TINY))
    with torch.no_grad():
        cast(nn.Linear, training.model.head).bias.fill_(float("nan"))
    with pytest.raises(NumericalError, match="step 0"):
        training.advance()
