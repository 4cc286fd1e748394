"""LV-ViT-S: published sizes, the engine walks it, token labels train it, the authors' weights load by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import timm
import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch.utils.flop_counter import FlopCounterMode

from helpers import Fixed, keeps_to_decisions, key_weights, naive_pass, random_images, random_keeps
from vitprune_env import Backbone, TokenGame, load_backbone, play
from vitprune_env.baselines import EViT
from vitprune_env.engine.cost import CostModel
from vitprune_env.models.lv_vit import LvVit, token_label_loss

TINY: dict[str, Any] = {"img_size": 64, "depth": 3, "embed_dim": 48, "num_heads": 3, "num_classes": 5}


@pytest.fixture(scope="module")
def tiny() -> Backbone:
    torch.manual_seed(0)
    return load_backbone("lv_vit_s", **TINY)


def parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_published_parameter_counts() -> None:
    with torch.device("meta"):
        full, plain = timm.create_model("lv_vit_s", token_labels=True), timm.create_model("lv_vit_s")
    assert round(parameters(full) / 1e6, 2) == 26.15
    assert round(parameters(plain) / 1e6, 1) == 25.8
    assert parameters(full) - parameters(plain) == 384 * 1000 + 1000


def test_published_gmacs() -> None:
    """The printed 6.6 counts the auxiliary head, which the authors also run when evaluating."""
    cost = CostModel.of(load_backbone("lv_vit_s"))
    assert round((cost.dense() + 196 * 384 * 1000) / 1e9, 1) == 6.6
    assert cost.dense() / 1e9 == pytest.approx(6.476, abs=5e-4)


def test_it_is_a_plain_timm_vit(tiny: Backbone) -> None:
    assert isinstance(tiny.model, VisionTransformer)
    assert all(type(block) is Block for block in tiny.model.blocks)
    assert tiny.num_patches == 16
    assert load_backbone("lv_vit_s", **(TINY | {"depth": 16})).default_sites[2].block == 12
    assert list(EViT(0.7).published_sites(16)) == ["5.attn", "9.attn", "13.attn"]


def test_the_game_plays_it(tiny: Backbone) -> None:
    images, sites = random_images(tiny, 3), ["1.attn", "2"]
    keeps = random_keeps(2, 3, tiny.num_patches, seed=1)
    outcome = play(TokenGame(tiny, sites), Fixed(keeps_to_decisions(keeps)), images).outcome
    soft, _ = tiny.forward_soft(images, key_weights(tiny, sites, keeps))
    assert torch.allclose(outcome.logits, soft, atol=1e-5)
    naive = naive_pass(tiny, images[1], sites, keeps_to_decisions(keeps), 1)
    assert torch.allclose(outcome.logits[1], naive.logits, atol=1e-5)


def test_counted_macs_equal_the_flop_counter(tiny: Backbone) -> None:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        tiny(random_images(tiny, 1))
    assert counter.get_total_flops() == 2 * CostModel.of(tiny).dense()


def test_residual_branches_are_halved(tiny: Backbone) -> None:
    block, x = cast(Any, tiny.block(1)), torch.randn(2, 4, 48)
    by_hand = x + block.attn(block.norm1(x)) / 2
    by_hand = by_hand + block.mlp(block.norm2(by_hand)) / 2
    assert torch.allclose(block(x), by_hand, atol=1e-6)


def test_token_labels_train_both_heads() -> None:
    model = cast(LvVit, timm.create_model("lv_vit_s", token_labels=True, **TINY))
    logits, token_logits = model.forward_token_labels(torch.randn(2, 3, 64, 64))
    assert logits.shape == (2, 5)
    assert token_logits.shape == (2, 16, 5)
    soft = torch.rand(2, 16, 5).softmax(dim=2)
    loss = token_label_loss(logits, token_logits, torch.tensor([1, 4]), soft)
    dense = -(soft * token_logits.log_softmax(2)).sum(2).mean()
    plain = -logits.log_softmax(1)[torch.arange(2), torch.tensor([1, 4])].mean()
    assert torch.allclose(loss, plain + 0.5 * dense)
    loss.backward()
    for head in cast(list[Any], [model.head, model.aux_head]):
        assert head.weight.grad.abs().sum() > 0


def test_token_labels_need_the_auxiliary_head(tiny: Backbone) -> None:
    with pytest.raises(ValueError, match="pass token_labels=True"):
        cast(LvVit, tiny.model).forward_token_labels(torch.randn(1, 3, 64, 64))


def authors_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights as the authors' code names them: conv1, bn1, ... in the patch embedding."""
    renamed = {}
    for name, value in state.items():
        parts = name.split(".")
        if name.startswith("patch_embed.backbone."):
            name = ".".join(["patch_embed", f"{parts[3]}{int(parts[2]) + 1}", *parts[4:]])
        renamed[name] = value
    return renamed


@pytest.mark.parametrize("keep_head", [False, True])
def test_the_authors_weights_load_by_name_and_at_another_size(tmp_path: Path, keep_head: bool) -> None:
    source = timm.create_model("lv_vit_s", token_labels=True, **TINY).eval()
    names = authors_names(source.state_dict())
    assert {"patch_embed.conv1.weight", "patch_embed.bn3.running_var", "patch_embed.proj.weight"} <= set(names)
    torch.save(names, tmp_path / "lvvit_s.pth")
    loaded = load_backbone("lv_vit_s", checkpoint=tmp_path / "lvvit_s.pth", token_labels=keep_head, **TINY)
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(loaded(images), source(images))
    larger = load_backbone("lv_vit_s", checkpoint=tmp_path / "lvvit_s.pth", **(TINY | {"img_size": 96}))
    assert larger.num_patches == 36
    assert larger(torch.randn(1, 3, 96, 96)).isfinite().all()


def test_nobody_publishes_its_weights_through_timm() -> None:
    with pytest.raises(ValueError, match="pretrained: expected a model whose weights timm has, got lv_vit_s"):
        load_backbone("lv_vit_s", pretrained=True)
