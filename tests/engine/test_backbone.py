"""What is walked and what is refused, training mode, gradients, half precision."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from helpers import (
    SMALL,
    TIMM_MODELS,
    Fixed,
    keeps_to_decisions,
    key_weights,
    make_model,
    random_images,
    random_keeps,
    toy,
)
from vitprune_env.engine.attention import Rows
from vitprune_env.engine.backbone import Backbone
from vitprune_env.engine.evidence import check_needs
from vitprune_env.engine.halves import drop_factor
from vitprune_env.engine.reduction import reduce_tokens
from vitprune_env.errors import EvidenceError, SiteError, UnsupportedBackboneError
from vitprune_env.game.rollout import play
from vitprune_env.game.token_game import TokenGame
from vitprune_env.policy import KeepAll
from vitprune_env.types import Decision

SITES = ["1.attn", "2", "3.attn", "3"]


@pytest.mark.parametrize(
    ("name", "options", "part"),
    [
        ("vit_small_patch16_18x2_224", {"depth": 2}, "a block of type ParallelThingsBlock"),
        ("vit_tiny_patch16_224", {"global_pool": "prr"}, "global_pool='prr'"),
        ("vit_tiny_patch16_224", {"global_pool": "max"}, "global_pool='max'"),
        ("vit_tiny_patch16_224", {"global_pool": "avg", "pool_include_prefix": True}, "pooling over the prefix tokens"),
        ("vit_tiny_patch16_224", {"dynamic_img_size": True}, "dynamic_img_size=True"),
        ("vit_tiny_patch16_224", {"patch_drop_rate": 0.5}, "patch_drop_rate > 0"),
        ("vit_tiny_patch16_224", {"num_classes": 0}, "no classifier"),
    ],
)
def test_unsupported_vits_are_refused_by_the_part(name: str, options: dict[str, Any], part: str) -> None:
    model = timm.create_model(name, **(SMALL | options))
    with pytest.raises(UnsupportedBackboneError, match="model: expected a plain timm VisionTransformer, got") as info:
        Backbone(model)
    assert part in str(info.value)


@pytest.mark.parametrize(
    ("name", "options"),
    [("swin_tiny_patch4_window7_224", {"depths": (1, 1)}), ("beit_base_patch16_224", {"depth": 1}), ("resnet18", {})],
)
def test_other_architectures_are_refused_by_name(name: str, options: dict[str, Any]) -> None:
    model = timm.create_model(name, **options)
    with pytest.raises(UnsupportedBackboneError, match=type(model).__name__):
        Backbone(model)


def test_foreign_attention_is_refused() -> None:
    class Other(nn.Module):
        pass

    model = make_model("vit_tiny_patch16_224")
    model.blocks[2].attn = Other()
    with pytest.raises(UnsupportedBackboneError, match="attention of type Other"):
        Backbone(model)


def test_what_a_backbone_knows_of_itself() -> None:
    backbone = toy("vit_small_patch14_reg4_dinov2")
    assert (backbone.depth, backbone.embed_dim, backbone.num_heads, backbone.num_classes) == (4, 48, 3, 7)
    assert (backbone.num_prefix, backbone.num_patches, backbone.grid_size) == (5, 16, (4, 4))
    assert (backbone.image_size, backbone.in_chans) == ((56, 56), 3)
    assert backbone.has_class_token
    assert not backbone.needs_patches
    assert [site.block for site in backbone.default_sites] == [1, 2, 3]
    gap = toy("vit_medium_patch16_gap_240")
    assert (gap.num_prefix, gap.has_class_token, gap.needs_patches) == (0, False, True)
    mae = toy("vit_base_patch16_224")
    assert (mae.num_prefix, mae.has_class_token, mae.needs_patches) == (1, True, True)


@pytest.mark.parametrize(("depth", "blocks"), [(1, [1]), (2, [1, 2]), (3, [1, 2]), (12, [3, 6, 9]), (24, [6, 12, 18])])
def test_default_sites_are_the_quarters(depth: int, blocks: list[int]) -> None:
    backbone = Backbone(make_model("vit_tiny_patch16_224", depth=depth))
    assert [site.block for site in backbone.default_sites] == blocks


def test_own_default_sites() -> None:
    model = make_model("vit_tiny_patch16_224")
    sites = Backbone(model, default_sites=("2.attn", 3)).default_sites
    assert [site.label for site in sites] == ["2.attn", "3"]
    with pytest.raises(SiteError, match="expected blocks 1 to 4"):
        Backbone(model, default_sites=(5,))


def test_not_square_images_and_other_channel_counts() -> None:
    model = make_model("vit_tiny_patch16_224", img_size=(32, 64), patch_size=16, in_chans=1)
    backbone = Backbone(model)
    assert (backbone.image_size, backbone.grid_size, backbone.in_chans) == ((32, 64), (2, 4), 1)
    images = random_images(backbone, 2)
    torch.testing.assert_close(play(TokenGame(backbone), KeepAll(), images).outcome.logits, model(images).detach())
    obs = TokenGame(backbone).reset(images)
    assert obs.position[5].tolist() == pytest.approx([1, 1 / 3])


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ([[1.0]], TypeError, "images: expected a floating-point tensor .B, C, H, W., got list"),
        (torch.zeros(2, 3, 64, 64, dtype=torch.uint8), TypeError, "got torch.uint8"),
        (torch.zeros(3, 64, 64), ValueError, r"images: expected shape \[B, 3, 64, 64\], got \[3, 64, 64\]"),
        (torch.zeros(2, 1, 64, 64), ValueError, r"got \[2, 1, 64, 64\]"),
        (torch.zeros(2, 3, 64, 32), ValueError, r"got \[2, 3, 64, 32\]"),
        (torch.zeros(0, 3, 64, 64), ValueError, r"expected at least one, got a batch of shape \[0, 3, 64, 64\]"),
        (torch.zeros(2, 3, 64, 64, device="meta"), ValueError, "expected them on cpu, where the network is, got meta"),
    ],
)
def test_wrong_images_are_refused(images: Any, error: type[Exception], message: str) -> None:
    backbone = toy("deit_tiny_patch16_224")
    with pytest.raises(error, match=message):
        TokenGame(backbone).reset(images)
    with pytest.raises(error, match=message):
        backbone.forward_soft(images, torch.ones(4, 2, 16))


@pytest.mark.parametrize("shape", [(3, 2, 16), (4, 1, 16), (4, 2, 17), (6, 2, 16)])
def test_wrong_key_weights_are_refused(shape: tuple[int, ...]) -> None:
    backbone = toy("deit_tiny_patch16_224")
    with pytest.raises(ValueError, match=r"key_weights: expected \[4, B, N\] with B, N = \(2, 16\)"):
        backbone.forward_soft(random_images(backbone, 2), torch.ones(shape))


def test_evidence_that_cannot_be_given_is_refused() -> None:
    with pytest.raises(EvidenceError, match="unknown evidence 'attention'; known: cls_attention"):
        check_needs(frozenset({"attention"}), toy("deit_tiny_patch16_224"))
    with pytest.raises(EvidenceError, match="'cls_attention' asks for a class token, and vit_medium_patch16_gap_240"):
        check_needs(frozenset({"cls_attention"}), toy("vit_medium_patch16_gap_240"))


def test_cls_is_the_mean_of_the_alive_where_there_is_no_class_token() -> None:
    backbone = toy("vit_medium_patch16_gap_240")
    state = backbone.run(backbone.embed(random_images(backbone, 3)), 2)[0]
    torch.testing.assert_close(backbone.cls(state), state.x.view(3, 16, -1).mean(dim=1))
    keep = torch.zeros(3, 16, dtype=torch.bool)
    keep[:, 3], keep[0, 5] = True, True
    mean = backbone.cls(reduce_tokens(state, Decision(keep=keep)))
    torch.testing.assert_close(mean[0], state.x.view(3, 16, -1)[0, [3, 5]].mean(dim=0))
    torch.testing.assert_close(mean[1], state.x.view(3, 16, -1)[1, 3])


def test_evidence_is_collected_in_the_last_attention_of_a_range() -> None:
    backbone = toy("deit_tiny_patch16_224")
    state = backbone.embed(random_images(backbone, 2))
    needs = frozenset({"keys"})
    for stop, start in ((5, 4), (6, 4), (8, 6)):
        near = backbone.run(backbone.run(state, start)[0], stop, needs)[1]["keys"]
        torch.testing.assert_close(backbone.run(state, stop, needs)[1]["keys"], near)


@pytest.mark.parametrize("name", ["golden", *TIMM_MODELS])
def test_gradients_of_packed_are_gradients_of_masked(name: str) -> None:
    sites: list[Any] = ["1.attn", 2, 3]
    backbone = toy(name)
    least = int(backbone.needs_patches)
    images, keeps = random_images(backbone, 8), random_keeps(3, 8, backbone.num_patches, seed=1, least=least)
    labels = torch.arange(8) % backbone.num_classes
    parameters = [backbone.block(1).attn.qkv.weight, backbone.block(4).mlp.fc1.weight, backbone.model.head.weight]  # type: ignore[union-attr]
    packed = play(TokenGame(backbone, sites, grad=True), Fixed(keeps_to_decisions(keeps)), images).outcome.logits
    masked, _ = backbone.forward_soft(images, key_weights(backbone, sites, keeps))
    first = torch.autograd.grad(nn.functional.cross_entropy(packed, labels), parameters)
    second = torch.autograd.grad(nn.functional.cross_entropy(masked, labels), parameters)
    for mine, theirs in zip(first, second, strict=True):
        assert mine.abs().max() > 1e-4
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-3)


def test_the_environment_records_no_graph_unless_asked() -> None:
    backbone, images = toy("deit_tiny_patch16_224"), random_images(toy("deit_tiny_patch16_224"), 2)
    assert not play(TokenGame(backbone), KeepAll(), images).outcome.logits.requires_grad
    assert play(TokenGame(backbone, grad=True), KeepAll(), images).outcome.logits.requires_grad
    with torch.no_grad():
        assert not play(TokenGame(backbone, grad=True), KeepAll(), images).outcome.logits.requires_grad


def test_masked_execution_is_differentiable_in_its_masks() -> None:
    for name in ("deit_tiny_patch16_224", "vit_medium_patch16_gap_240"):
        backbone = toy(name)
        weights = torch.ones(4, 2, 16)
        weights[1:, :, 3:9] = 0.0
        weights.requires_grad_()
        logits, tokens = backbone.forward_soft(random_images(backbone, 2), weights)
        assert tokens.shape == (2, backbone.num_prefix + 16, 48)
        logits.square().sum().backward()
        assert weights.grad is not None
        assert torch.isfinite(weights.grad).all()
        assert (weights.grad[1:, :, 3:9] != 0).any(), "a removed token must feel what it would change"


def test_drop_path_keeps_or_drops_whole_images() -> None:
    backbone = Backbone(make_model("vit_tiny_patch16_224", drop_path_rate=0.6)).train()
    branch = backbone.block(4).drop_path2
    rows = Rows.of(3, 1, 4, 2, 5, 1)
    torch.manual_seed(0)
    seen = set()
    for _ in range(20):
        parts = drop_factor(branch, torch.ones(16, 2), rows).split(rows.lengths)
        values = [set(part.flatten().tolist()) for part in parts]
        assert all(len(value) == 1 for value in values), "all rows of an image share their fate"
        seen |= set().union(*values)
    assert sorted(seen) == pytest.approx([0.0, 1 / 0.4])
    assert drop_factor(branch.eval(), torch.ones(16, 2), rows) is None


def test_training_mode_draws_as_timm_does() -> None:
    model = make_model("deit3_small_patch16_224", drop_path_rate=0.4, proj_drop_rate=0.0).train()
    backbone = Backbone(model)
    images = random_images(backbone, 6)
    torch.manual_seed(5)
    mine = play(TokenGame(backbone, grad=True), KeepAll(), images).outcome.logits
    torch.manual_seed(5)
    torch.testing.assert_close(mine, model(images), atol=1e-5, rtol=1e-5)
    torch.manual_seed(6)
    assert not torch.allclose(mine, model(images), atol=1e-3)


@pytest.mark.parametrize("name", ["deit3_small_patch16_224", "vit_medium_patch16_gap_240", "vit_small_patch16_224"])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision(name: str, autocast: bool) -> None:
    model = make_model(name)
    exact, half = Backbone(model), Backbone(make_model(name) if autocast else make_model(name).bfloat16())
    images = random_images(exact, 8)
    keeps = random_keeps(len(SITES), 8, 16, seed=2, least=1)
    needs = frozenset({"mean_attention", "keys", "value_norms"})
    policy = Fixed(keeps_to_decisions(keeps), needs, "log_size")
    wanted = play(TokenGame(exact, SITES, needs=needs, attention_bias="log_size"), policy, images).outcome
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), torch.no_grad():
        game = TokenGame(half, SITES, needs=needs, attention_bias="log_size")
        given = play(game, policy, images if autocast else images.bfloat16()).outcome
        dense = play(TokenGame(half), KeepAll(), images if autocast else images.bfloat16()).outcome
        timms = half.model(images if autocast else images.bfloat16())
    assert given.logits.dtype == torch.bfloat16
    assert torch.equal(given.source, wanted.source)
    assert torch.equal(given.macs, wanted.macs)
    torch.testing.assert_close(given.logits.float(), wanted.logits, atol=0.15, rtol=0.1)
    torch.testing.assert_close(dense.logits, timms, atol=0.05, rtol=0.05)


def test_walking_leaves_the_model_as_it_was() -> None:
    model = make_model("vit_tiny_patch16_224")
    before, keys = type(model), set(model.__dict__)
    images = random_images(Backbone(model), 2)
    logits = model(images)
    play(TokenGame(Backbone(model)), Fixed(keeps_to_decisions(random_keeps(3, 2, 25, 0))), images)
    assert type(model) is before is VisionTransformer
    assert set(model.__dict__) == keys
    assert torch.equal(model(images), logits)


def test_images_in_any_memory_format() -> None:
    for name in ("deit_tiny_patch16_224", "vit_medium_patch16_gap_240"):
        backbone = toy(name)
        for batch in (1, 4):
            images = random_images(backbone, batch)
            keeps = keeps_to_decisions(random_keeps(len(SITES), batch, 16, seed=4, least=1))
            game = TokenGame(backbone, SITES)
            plain = play(game, Fixed(keeps), images).outcome.logits
            strided = images.transpose(2, 3).contiguous().transpose(2, 3)
            for other in (images.to(memory_format=torch.channels_last), strided):
                torch.testing.assert_close(play(game, Fixed(keeps), other).outcome.logits, plain, atol=1e-5, rtol=1e-5)
