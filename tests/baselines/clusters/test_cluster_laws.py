"""What every clustering, sampling and merging baseline owes the game, on ragged batches too."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from helpers import permuted, random_images, toy
from ragged import check_batch_independence, play_ragged, ragged_keep
from vitprune_env.baselines import ATS, DPCKNN, DPCMerge, KMeansMerge, PoolMerge, SubSampleMerge, TriLevel
from vitprune_env.baselines.clusters.subsample import SubSample
from vitprune_env.deploy.export import export_program
from vitprune_env.deploy.pruned_vit import PrunedViT
from vitprune_env.game.rollout import play
from vitprune_env.game.token_game import TokenGame
from vitprune_env.policy import Policy


def trained(kind: Any) -> SubSampleMerge:
    """A merger for two sites whose layers do something."""
    policy = SubSampleMerge(0.6, embed_dim=48, num_sites=2, kind=kind)
    for layer in policy.layers:
        torch.nn.init.normal_(cast(SubSample, layer).out.weight, std=0.2, generator=torch.Generator().manual_seed(1))
    return policy.requires_grad_(False)


def name_of(policy: Any) -> str:
    """What to call a policy in a test's name."""
    return policy.kind if isinstance(policy, SubSampleMerge) else repr(policy)


NAMES = ["golden", "deit_tiny_distilled_patch16_224", "vit_small_patch14_reg4_dinov2"]
TOKEN_WISE = [
    DPCMerge(0.7),
    DPCMerge(0.3),
    DPCMerge(0.5, clusters=3, pairs=[1, 0]),
    DPCMerge(0.6, strategy="pack"),
    DPCMerge(0.6, strategy="cluster"),
    DPCKNN(0.6),
    ATS(),
    ATS(samples=9),
    TriLevel(0.6),
]
IN_PATCH_ORDER = [
    PoolMerge(0.6),
    PoolMerge(0.6, pooling="max"),
    PoolMerge(0.6, pooling="spatial"),
    KMeansMerge(0.5),
    KMeansMerge(0.5, iterations=3),
    trained("convolution"),
    trained("mlp"),
]
every_policy = pytest.mark.parametrize("policy", TOKEN_WISE + IN_PATCH_ORDER, ids=name_of)
seeds = st.integers(0, 2**31)


@every_policy
@settings(max_examples=4)
@given(seed=seeds)
def test_images_do_not_see_each_other(policy: Policy, seed: int) -> None:
    check_batch_independence(policy, seed)


@every_policy
@settings(max_examples=4)
@given(seed=seeds, name=st.sampled_from(NAMES), is_ragged=st.booleans())
def test_macs_are_counted_macs(policy: Policy, seed: int, name: str, is_ragged: bool) -> None:
    backbone = toy(name)
    images = random_images(backbone, 8, seed)
    keep = ragged_keep(backbone, 8, seed) if is_ragged else torch.ones(8, backbone.num_patches, dtype=torch.bool)
    with FlopCounterMode(display=False) as counter:
        episode = play_ragged(backbone, policy, keep, images)
    assert counter.get_total_flops() == 2 * episode.outcome.macs.sum().item()


@every_policy
@settings(max_examples=4)
@given(seed=seeds)
def test_only_alive_tokens_are_kept_or_merged_into(policy: Policy, seed: int) -> None:
    backbone = toy("deit_tiny_patch16_224")
    episode = play_ragged(backbone, policy, ragged_keep(backbone, 8, seed), random_images(backbone, 8, seed))
    assert not (episode.keep & ~episode.alive).any()
    assert (episode.outcome.n_kept[:, 1:] > 0).eq(episode.outcome.n_kept[:, :1] > 0).all(), "none lose their last token"
    assert torch.isfinite(episode.outcome.logits).all()


@pytest.mark.parametrize("policy", TOKEN_WISE, ids=repr)
@settings(max_examples=3)
@given(seed=seeds)
def test_permuting_patches_permutes_decisions(policy: Policy, seed: int) -> None:
    backbone = toy("golden")
    order = torch.randperm(backbone.num_patches, generator=torch.Generator().manual_seed(seed))
    game = TokenGame(backbone, ("4.attn", "7.attn"), needs=policy.needs)
    state = game.prepare(random_images(backbone, 4, seed))
    first, second = play(game, policy, state), play(game, policy, permuted(state, order))
    assert torch.equal(first.keep[:, :, order], second.keep)
    torch.testing.assert_close(first.outcome.logits, second.outcome.logits, atol=2e-5, rtol=1e-5)


@every_policy
def test_at_other_sites_and_with_gradients(policy: Policy) -> None:
    backbone, images = toy("golden"), random_images(toy("golden"), 3)
    weights = list(backbone.block(1).parameters())
    (gradient, *_) = torch.autograd.grad(PrunedViT(backbone, policy, sites=("2.attn", "5"))(images).sum(), weights)
    assert torch.isfinite(gradient).all()
    assert gradient.any()


@pytest.mark.slow
@pytest.mark.parametrize("policy", [DPCMerge(0.6), DPCKNN(0.6), TriLevel(0.5)], ids=repr)
def test_policies_with_known_counts_become_graphs(policy: Policy) -> None:
    backbone = toy("deit_tiny_patch16_224")
    model = PrunedViT(backbone, policy).eval()
    images = random_images(backbone, 5)
    with torch.no_grad():
        torch.testing.assert_close(export_program(model).module()(images), model(images), atol=1e-5, rtol=1e-5)
