"""The engine and the first policies against the original public codes (see tests/golden)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from helpers import Fixed, golden, keeps_to_decisions
from vitprune_env.baselines import EViT, TopK
from vitprune_env.engine.backbone import Backbone
from vitprune_env.game.rollout import play
from vitprune_env.game.token_game import TokenGame
from vitprune_env.policy import BasePolicy, KeepAll
from vitprune_env.types import Decision, Episode, Observation


class Watch(BasePolicy):
    """Keeps everything and writes down what it sees."""

    needs = frozenset({"cls_attention"})

    def __init__(self) -> None:
        self.seen: list[Observation] = []

    def decide(self, obs: Observation) -> Decision:
        self.seen.append(obs)
        return Decision(keep=obs.alive)


def as_keep(indices: Tensor) -> Tensor:
    """Patch numbers `[B, k]` as flags `[B, 64]`."""
    return torch.zeros(len(indices), 64, dtype=torch.bool).scatter(1, indices, True)


def check_class_tokens(episode: Episode, expected: Tensor, sites: list[int]) -> None:
    """Class tokens that enter a site after a block equal those that leave the block, `[B, depth, D]`."""
    for obs, block in zip(episode.observations, sites, strict=True):
        torch.testing.assert_close(obs.cls, expected[:, block - 1], atol=1e-4, rtol=0)


def test_reference_logits_and_class_attention(golden_backbone: Backbone, golden_images: Tensor) -> None:
    watch, file = Watch(), golden("reference")
    game = TokenGame(golden_backbone, range(1, 13), needs=watch.needs)
    outcome = play(game, watch, golden_images).outcome
    torch.testing.assert_close(outcome.logits, file["logits"], atol=1e-4, rtol=0)
    for block, obs in enumerate(watch.seen):
        scores = obs.scatter(obs.evidence["cls_attention"])
        torch.testing.assert_close(scores, file["cls_attn_mean"][block], atol=1e-5, rtol=0)
        rows = torch.cat([obs.cls[:1], obs.dense()[0]])
        torch.testing.assert_close(rows, file["block_out_b0"][block], atol=1e-4, rtol=0)


def test_mean_attention_is_the_column_mean_of_the_reference(golden_backbone: Backbone, golden_images: Tensor) -> None:
    needs = frozenset({"mean_attention", "cls_attention"})
    game = TokenGame(golden_backbone, [f"{block}.attn" for block in range(1, 13)], needs=needs)
    policy = Fixed(keeps_to_decisions([torch.ones(1, 64, dtype=torch.bool)] * 12), needs)
    play(game, policy, golden_images[:1])
    attention = golden("reference")["attn_b0"].mean(dim=1)
    for block, obs in enumerate(policy.seen):
        received = attention[block].mean(dim=0)[1:]
        torch.testing.assert_close(obs.evidence["mean_attention"], received, atol=1e-5, rtol=0)
        torch.testing.assert_close(obs.evidence["cls_attention"], attention[block, 0, 1:], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        ("evit_kr07_fuse", EViT(0.7, fuse=True)),
        ("evit_kr05_nofuse", EViT(0.5, fuse=False)),
        ("tr_topk_kr07", TopK(0.7)),
    ],
)
def test_attention_policies(name: str, policy: EViT | TopK, golden_backbone: Backbone, golden_images: Tensor) -> None:
    file = golden(name)
    game = TokenGame.for_policy(golden_backbone, policy, sites="published")
    assert [site.label for site in game.sites] == [f"{block + 1}.attn" for block in file["sites"].tolist()]
    episode = play(game, policy, golden_images, record=True)
    torch.testing.assert_close(episode.outcome.logits, file["logits"], atol=1e-4, rtol=0)
    for step, block in enumerate(file["sites"].tolist()):
        count = int(file["token_counts_after_block"][block])
        assert (episode.outcome.n_kept[:, step] == count - 1).all(), "the class token is counted there"
    fused = isinstance(policy, EViT) and policy.fuse
    slots: list[Tensor] = []  # where the fused tokens of earlier sites are, [B] each
    for step, obs in enumerate(episode.observations):
        if f"cls_attn_{step}" in file and not step:
            torch.testing.assert_close(
                obs.scatter(obs.evidence["cls_attention"]), file["cls_attn_0"], atol=1e-5, rtol=0
            )
        wanted = file[f"idx_orig_{step}"]
        for site, slot in enumerate(slots):
            wanted = torch.where(wanted == 1000 + site, slot[:, None], wanted)
        keep = as_keep(wanted)
        if fused:
            dropped = obs.alive & ~keep
            slots.append(dropped.int().argmax(dim=1))
            keep = keep.scatter(1, slots[-1][:, None], True)
        assert torch.equal(episode.keep[step], keep)


def test_scores_of_a_fused_token_are_those_of_the_original(golden_backbone: Backbone, golden_images: Tensor) -> None:
    policy, file = EViT(0.7, fuse=True), golden("evit_kr07_fuse")
    episode = play(TokenGame.for_policy(golden_backbone, policy, sites="published"), policy, golden_images, record=True)
    for step in (1, 2):  # entering order of the original: kept tokens as listed, then the fused one
        scores = episode.observations[step].evidence["cls_attention"].view(8, -1)
        expected = file[f"cls_attn_{step}"]
        torch.testing.assert_close(scores.sort(dim=1).values, expected.sort(dim=1).values, atol=1e-5, rtol=0)


def test_rl4evit_masking_is_removal(golden_backbone: Backbone, golden_images: Tensor) -> None:
    file = golden("rl4evit_masked")

    class Raw(BasePolicy):
        """The original's actions before they are combined with earlier deaths."""

        def decide(self, obs: Observation) -> Decision:
            return Decision(keep=file["raw_actions"][obs.step].bool() & obs.alive)

    episode = play(TokenGame(golden_backbone, file["sites"].tolist()), Raw(), golden_images, record=True)
    assert torch.equal(episode.keep, file["executed_actions"].bool())
    assert torch.equal(episode.outcome.n_kept.T, file["alive_patch_counts"])
    for logits in ("logits", "logits_bias1000", "logits_deleted"):
        torch.testing.assert_close(episode.outcome.logits, file[logits], atol=1e-4, rtol=0)
    check_class_tokens(episode, file["cls_out"], [3, 6, 9])
    first = episode.observations[0]
    torch.testing.assert_close(first.dense()[0], file["block_out_b0"][2, 1:], atol=1e-4, rtol=0)


def test_masked_execution_matches_rl4evit(golden_backbone: Backbone, golden_images: Tensor) -> None:
    file = golden("rl4evit_masked")
    with torch.no_grad():
        logits, tokens = golden_backbone.forward_soft(golden_images, file["masks_per_block"][:, :, 1:].float())
    torch.testing.assert_close(logits, file["logits"], atol=1e-4, rtol=0)
    torch.testing.assert_close(tokens[0], file["block_out_b0"][-1], atol=1e-4, rtol=0)


def test_keep_all_is_bitwise_timm(golden_backbone: Backbone, golden_images: Tensor) -> None:
    outcome = play(TokenGame(golden_backbone), KeepAll(), golden_images).outcome
    with torch.no_grad():
        assert torch.equal(outcome.logits, golden_backbone.model(golden_images))
