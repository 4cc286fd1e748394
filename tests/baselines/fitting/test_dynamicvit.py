"""DynamicViT: the original's decisions and training form, its losses by hand, and what its policy promises."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from helpers import golden, random_images, random_keeps, toy
from vitprune_env.baselines.dynamicvit.fitting import (
    DynamicViTConfig,
    DynamicViTTask,
    forward_train,
    living_mean,
    ratio_loss,
    sample_keep,
    token_loss,
)
from vitprune_env.baselines.dynamicvit.policy import DynamicViT
from vitprune_env.baselines.fitting.inputs import ImageInputs
from vitprune_env.engine.backbone import Backbone
from vitprune_env.engine.masked import start_masked
from vitprune_env.engine.tokens import segment_mean
from vitprune_env.errors import CheckpointError, SiteError
from vitprune_env.game.policy_contract import check_policy
from vitprune_env.game.rollout import play
from vitprune_env.game.token_game import TokenGame
from vitprune_env.types import parse_sites


@pytest.fixture
def published() -> DynamicViT:
    return DynamicViT(0.7).load_published(golden("dynamicvit_rho07"))


def test_decisions_of_the_original(golden_backbone: Backbone, golden_images: Tensor, published: DynamicViT) -> None:
    file = golden("dynamicvit_rho07")
    game = TokenGame.for_policy(golden_backbone, published)
    assert [site.half // 2 for site in game.sites] == file["sites"].tolist()
    episode = play(game, published, golden_images, record=True)
    torch.testing.assert_close(episode.outcome.logits, file["logits"], atol=1e-4, rtol=0)
    for step, block in enumerate(file["sites"].tolist()):
        keep = torch.zeros(8, 64, dtype=torch.bool).scatter(1, file[f"idx_orig_{step}"], True)
        assert torch.equal(episode.keep[step], keep)
        assert (episode.outcome.n_kept[:, step] == int(file["token_counts_after_block"][block]) - 1).all()
    first = episode.observations[0].dense()
    with torch.no_grad():
        scores = published.predictor(0, 3, first)(first, lambda values: living_mean(values, torch.ones(8, 64)))
    torch.testing.assert_close(scores, file["pred_logsoftmax_0"], atol=1e-5, rtol=0)


def test_training_form_of_the_original(golden_backbone: Backbone, golden_images: Tensor) -> None:
    file = golden("dynamicvit_train_policy")
    sites = parse_sites(file["sites"].tolist(), golden_backbone.depth)

    def given_decisions(step: int, tokens: Tensor, alive: Tensor) -> Tensor:
        assert tokens.shape == (*alive.shape, 48)
        return file["raw_decisions"][step].float()

    with torch.no_grad():
        start = start_masked(golden_backbone, golden_images)
        logits, kept, _ = forward_train(golden_backbone, start, sites, given_decisions)
    torch.testing.assert_close(torch.stack(kept), file["cumulative_decisions"])
    torch.testing.assert_close(logits, file["logits"], atol=1e-4, rtol=0)


def test_training_form_is_what_is_deployed(golden_backbone: Backbone, golden_images: Tensor) -> None:
    policy = DynamicViT(0.7).load_published(golden("dynamicvit_rho07"))
    game = TokenGame.for_policy(golden_backbone, policy)
    episode = play(game, policy, golden_images)

    def same(step: int, tokens: Tensor, alive: Tensor) -> Tensor:
        scores = policy.predictor(step, 3, tokens)(tokens, lambda values: living_mean(values, alive))[..., 0]
        scores = scores.masked_fill(alive == 0, float("-inf"))
        best = scores.topk(policy.count(step, 64), dim=1).indices
        return torch.zeros_like(scores).scatter(1, best, 1.0)

    with torch.no_grad():
        logits, kept, _ = forward_train(golden_backbone, start_masked(golden_backbone, golden_images), game.sites, same)
    assert torch.equal(torch.stack(kept).bool(), episode.keep)
    torch.testing.assert_close(logits, episode.outcome.logits, atol=1e-4, rtol=0)


@given(seed=st.integers(0, 1000), batch=st.integers(1, 5))
def test_mean_over_the_living_is_the_same_packed_and_soft(seed: int, batch: int) -> None:
    keep = random_keeps(1, batch, 9, seed, least=1)[0]
    values = torch.randn(batch, 9, 4, generator=torch.Generator().manual_seed(seed))
    packed = segment_mean(values[keep], keep.nonzero()[:, 0], batch)
    soft = living_mean(values, keep.float())
    torch.testing.assert_close(soft, packed[:, None].expand(-1, 9, -1), atol=1e-6, rtol=1e-5)


def test_losses_by_hand() -> None:
    kept = [torch.tensor([[1.0, 1, 1, 0], [1, 1, 0, 0]]), torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 0]])]
    expected = ((0.75 - 0.5) ** 2 + 0 + (0.25 - 0.25) ** 2 + (0.5 - 0.25) ** 2) / 4
    assert ratio_loss(kept, 0.5).item() == pytest.approx(expected)
    tokens, teacher = torch.zeros(2, 4, 2), torch.ones(2, 4, 2)
    teacher[0, 0] = torch.tensor([2.0, 4.0])  # mean square 10
    teacher[1, 2] = 100  # of a removed token
    assert token_loss(tokens, teacher, kept[1]).item() == pytest.approx((10 + 1 + 1) / 3)


def test_the_loss_is_the_weighted_sum_and_vanishes_for_the_teacher_itself(
    golden_backbone: Backbone, golden_images: Tensor
) -> None:
    images, labels = golden_images[:4], torch.tensor([1, 2, 3, 4])
    inputs = ImageInputs(golden_backbone, [(image, 0) for image in images], half=6)
    policy = DynamicViT(1.0).load_published(golden("dynamicvit_rho07"))
    config = DynamicViTConfig(ratio_weight=2.0, logit_weight=0.3, token_weight=0.7)
    task = DynamicViTTask(policy, TokenGame.for_policy(golden_backbone, policy), inputs, config)
    total, found = task.loss(images, labels, torch.Generator().manual_seed(0))
    parts = found["class"] + 2 * found["ratio"] + 0.3 * found["logits"] + 0.7 * found["tokens"]
    assert total.item() == pytest.approx(parts, rel=1e-5)
    assert min(found["ratio"], found["logits"], found["tokens"]) > 1e-3
    with torch.no_grad():
        dense = golden_backbone(images)
        for module in policy.score_predictor:
            module.out_conv[4].bias.add_(torch.tensor([100.0, -100.0]))  # type: ignore[index,union-attr]
    total, found = task.loss(images, labels, torch.Generator().manual_seed(0))
    assert max(abs(found[name]) for name in ("ratio", "logits", "tokens")) < 1e-6
    assert total.item() == pytest.approx(torch.nn.functional.cross_entropy(dense, labels).item(), rel=1e-4)
    assert [found[f"keep/{site}"] for site in (3, 6, 9)] == [1, 1, 1]


def test_distillation_is_the_divergence_of_the_student_from_the_teacher(golden_backbone: Backbone) -> None:
    policy = DynamicViT(0.5)
    inputs = ImageInputs(golden_backbone, [(torch.zeros(3, 64, 64), 0)], half=6)
    task = DynamicViTTask(policy, TokenGame.for_policy(golden_backbone, policy), inputs, DynamicViTConfig())
    state = start_masked(golden_backbone, torch.zeros(1, 3, 64, 64))
    student, teacher = torch.tensor([[0.9, 0.1]]).log(), torch.tensor([[0.5, 0.5]]).log()
    found = task.losses(student, [torch.ones(1, 64)], state, torch.tensor([0]), teacher, state.tokens)
    expected = 0.5 * torch.tensor(0.5 / 0.9).log() + 0.5 * torch.tensor(0.5 / 0.1).log()
    assert found["logits"].item() == pytest.approx(expected.item())
    assert found["class"].item() == pytest.approx(-torch.tensor(0.9).log().item())


def test_sampled_decisions_are_hard_with_soft_gradients_and_the_right_frequency() -> None:
    scores = torch.tensor([[0.9, 0.1]]).log().expand(1, 20_000, 2).clone().requires_grad_()
    keep = sample_keep(scores, 1.0, torch.Generator().manual_seed(0))
    assert set(keep.unique().tolist()) == {0.0, 1.0}
    assert keep.mean().item() == pytest.approx(0.9, abs=0.01)
    assert torch.equal(keep, sample_keep(scores, 1.0, torch.Generator().manual_seed(0)))
    (gradient,) = torch.autograd.grad(keep.sum(), scores)
    noise = -torch.empty(scores.shape).exponential_(generator=torch.Generator().manual_seed(0)).log()
    soft = (scores + noise).softmax(dim=-1)[..., 0]
    torch.testing.assert_close(gradient[..., 0], soft * (1 - soft))
    torch.testing.assert_close(gradient[..., 1], -soft * (1 - soft))


@pytest.mark.parametrize(("rate", "counts"), [(0.9, [176, 158, 142]), (0.7, [137, 96, 67]), (0.5, [98, 49, 24])])
def test_counts_of_the_original(rate: float, counts: list[int]) -> None:
    assert [DynamicViT(rate).count(step, 196) for step in range(3)] == counts


@pytest.mark.parametrize("name", ["golden", "vit_medium_patch16_gap_240", "vit_small_patch14_reg4_dinov2"])
@pytest.mark.parametrize("rate", [0.01, 0.6, 1.0])
def test_contract_and_cost(name: str, rate: float) -> None:
    backbone, policy = toy(name), DynamicViT(rate)
    images = random_images(backbone, 3)
    check_policy(policy, backbone, images)
    with FlopCounterMode(display=False) as counter:
        outcome = play(TokenGame.for_policy(backbone, policy), policy, images).outcome
    assert counter.get_total_flops() == 2 * outcome.macs.sum().item()
    width = backbone.embed_dim
    per_token = width * width + width * width // 2 + width // 2 * width // 4 + width // 4 * 2
    looked_at = outcome.n_kept[0, :-1].sum().item() + backbone.num_patches
    assert outcome.policy_macs.tolist() == [per_token * looked_at] * 3


def test_fresh_weights_come_from_the_seed_alone(golden_backbone: Backbone, golden_images: Tensor) -> None:
    before = torch.get_rng_state()
    keeps = []
    for seed in (0, 0, 1):
        policy = DynamicViT(0.5, seed=seed)
        keeps.append(play(TokenGame.for_policy(golden_backbone, policy), policy, golden_images).keep)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(keeps[0], keeps[1])
    assert not torch.equal(keeps[0], keeps[2])


def test_another_keep_rate_shares_the_predictors(published: DynamicViT) -> None:
    other = published.at(0.4)
    assert (other.keep_rate, published.keep_rate) == (0.4, 0.7)
    assert other.score_predictor is published.score_predictor


def test_mistakes_are_named(golden_backbone: Backbone, golden_images: Tensor, published: DynamicViT) -> None:
    for rate in (0, 1.5, -1):
        with pytest.raises(ValueError, match="keep_rate: expected"):
            DynamicViT(rate)
    with pytest.raises(ValueError, match="embed_dim: expected a multiple of 4, got 6"):
        DynamicViT(0.5, embed_dim=6, sites=(1,))
    with pytest.raises(ValueError, match="sites: expected as many as there are predictors"):
        DynamicViT(0.5, embed_dim=8)
    with pytest.raises(SiteError, match="predictors for 3 sites, got 2"):
        play(TokenGame(golden_backbone, (3, 6)), published, golden_images)
    wide = DynamicViT(0.5, embed_dim=64, sites=(3, 6, 9))
    with pytest.raises(ValueError, match="made for width 64, got 48"):
        play(TokenGame.for_policy(golden_backbone, wide), wide, golden_images)
    with pytest.raises(CheckpointError, match="score_predictor"):
        DynamicViT(0.5).load_published({"head.weight": torch.zeros(1)})
    broken = dict(golden("dynamicvit_rho07"))
    broken.pop("param.score_predictor.1.out_conv.2.bias")
    with pytest.raises(CheckpointError, match="do not fit together"):
        DynamicViT(0.5).load_published(broken)
    for name in ("ratio_weight", "logit_weight", "token_weight", "temperature", "images"):
        with pytest.raises(ValueError, match=f"{name}: expected"):
            replace(DynamicViTConfig(), **{name: -1})
