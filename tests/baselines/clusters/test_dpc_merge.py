"""Decouple and merge against the golden vectors, its numbers of tokens, and its steps one by one."""

from __future__ import annotations

from math import ceil
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from helpers import golden, random_images, toy
from ragged import play_ragged, ragged_keep
from vitprune_env.baselines import DPCMerge, EViT
from vitprune_env.baselines.clusters.decouple import Plan
from vitprune_env.engine.backbone import Backbone
from vitprune_env.game.rollout import play
from vitprune_env.game.token_game import TokenGame
from vitprune_env.types import Observation

GOLDEN = "dpc_eta07_A_knn_nearest_norm_greedy"


def first_members(groups: Tensor) -> Tensor:
    """Names every group by its first member, `[B, N]`, so that partitions can be compared."""
    return (groups[:, :, None] == groups[:, None, :]).int().argmax(dim=2)


def listed(flags: Tensor, alive: Tensor) -> list[set[int]]:
    """Per image, which of the alive tokens are flagged, counted among the alive ones."""
    return [set(row[there].nonzero()[:, 0].tolist()) for row, there in zip(flags, alive, strict=True)]


@pytest.mark.parametrize("given_numbers", [True, False])
def test_golden(golden_backbone: Backbone, golden_images: Tensor, given_numbers: bool) -> None:
    file = golden(GOLDEN)
    numbers = {"clusters": file["n_clusters"].tolist(), "pairs": file["n_pairs"].tolist()} if given_numbers else {}
    policy = DPCMerge(0.7, **numbers)
    game = TokenGame.for_policy(golden_backbone, policy, sites="published")
    assert [site.block - 1 for site in game.sites] == file["sites"].tolist()
    policy.reset(len(golden_images), 64)
    obs: Observation | None = game.reset(golden_images)
    rows = torch.arange(8)[:, None]
    order: Any = torch.arange(64).expand(8, 64)  # token in each place of the original's sequence
    for step, block in enumerate(file["sites"].tolist()):
        assert obs is not None
        decision = policy.decide(obs)
        scores = obs.scatter(obs.evidence["cls_attention"])
        torch.testing.assert_close(scores.gather(1, order), file[f"cls_attn_{step}"], atol=1e-5, rtol=0)
        attentive = order.gather(1, file[f"attentive_local_{step}"])
        inattentive = order.gather(1, file[f"inattentive_local_{step}"])
        centres = inattentive.gather(1, file[f"centers_{step}"])
        assert decision.merge_into is not None
        assigned = centres.gather(1, file[f"assign_{step}"])
        assert torch.equal(decision.merge_into.gather(1, inattentive), assigned)
        assert decision.keep.gather(1, centres).all()
        pairs = attentive[rows[..., None], file[f"pairs_{step}"]]
        assert torch.equal(decision.merge_into[rows, pairs[..., 0]], decision.merge_into[rows, pairs[..., 1]])
        obs = game.step(decision)[0]
        patches = file[f"group_of_patch_{step}"]
        source = game.state.source
        assert torch.equal(first_members(source), first_members(patches))
        count = int(file["token_counts_after_block"][0, block]) - 1
        assert game.state.count == count
        order = torch.zeros(8, count, dtype=torch.int64).scatter(1, patches, source)
    torch.testing.assert_close(game.outcome().logits, file["logits"], atol=1e-4, rtol=0)


@given(keep_rate=st.floats(0.01, 1.0), seed=st.integers(0, 2**31))
def test_the_asked_fraction_remains(keep_rate: float, seed: int) -> None:
    backbone = toy("deit_tiny_patch16_224")
    keep = ragged_keep(backbone, 8, seed)
    episode = play_ragged(backbone, DPCMerge(keep_rate), keep, random_images(backbone, 8, seed))
    for before, after in zip(episode.alive[1:], episode.keep[1:], strict=True):
        assert after.sum(dim=1).tolist() == [ceil(keep_rate * n) for n in before.sum(dim=1).tolist()]


def observation(step: int) -> Any:
    """As much of an observation as a plan looks at."""

    class Seen:
        num_steps = 3

    Seen.step = step  # pyright: ignore[reportAttributeAccessIssue]
    return Seen()


@pytest.mark.parametrize(
    ("policy", "tokens", "plan"),
    [
        (DPCMerge(0.7), 196, (138, 58, 14, 14)),
        (DPCMerge(0.5), 196, (98, 98, 24, 24)),
        (DPCMerge(0.1), 100, (10, 90, 5, 5)),  # no more pairs than 5, so no more clusters either
        (DPCMerge(0.2), 5, (1, 4, 0, 0)),  # one attentive token has no partner
        (DPCMerge(1.0), 50, (50, 0, 0, 0)),
        (DPCMerge(0.5), 0, (0, 0, 0, 0)),
        (DPCMerge(0.5, clusters=7), 20, (10, 10, 7, 5)),
        (DPCMerge(0.5, clusters=70, pairs=0), 20, (10, 10, 10, 0)),
        (DPCMerge(0.5, clusters=[1, 2, 3], pairs=[3, 2, 1]), 20, (10, 10, 2, 2)),
        (DPCMerge(0.7, strategy="preserve"), 196, (138, 58, 0, 0)),
        (DPCMerge(0.7, strategy="pack"), 196, (138, 58, 1, 0)),
        (DPCMerge(1.0, strategy="pack"), 196, (196, 0, 0, 0)),
        (DPCMerge(0.7, strategy="cluster"), 196, (138, 58, 14, 0)),
    ],
    ids=str,
)
def test_plans_by_hand(policy: DPCMerge, tokens: int, plan: tuple[int, ...]) -> None:
    assert policy.plan(tokens, observation(step=1)) == Plan(*plan)


def test_preserving_is_evit_without_fusion(golden_backbone: Backbone, golden_images: Tensor) -> None:
    policy, other = DPCMerge(0.6, strategy="preserve"), EViT(0.6, fuse=False)
    first = play(TokenGame.for_policy(golden_backbone, policy, sites="published"), policy, golden_images)
    second = play(TokenGame.for_policy(golden_backbone, other, sites="published"), other, golden_images)
    assert torch.equal(first.keep, second.keep)
    assert torch.equal(first.outcome.logits, second.outcome.logits)
    assert torch.equal(first.outcome.macs, second.outcome.macs)


def test_packing_is_the_attention_weighted_mean_of_the_rest(golden_backbone: Backbone, golden_images: Tensor) -> None:
    policy = DPCMerge(0.6, strategy="pack")
    game = TokenGame(golden_backbone, ["4.attn"], needs=policy.needs)
    obs = game.reset(golden_images)
    decision = policy.decide(obs)
    attention, tokens = obs.scatter(obs.evidence["cls_attention"]), obs.dense()
    game.step(decision)
    for image in range(8):
        rest = attention[image].argsort(descending=True)[39:]  # ceil(0.6 * 64) = 39 are attentive
        share = attention[image, rest] / attention[image, rest].sum()
        packed = (share[:, None] * tokens[image, rest]).sum(dim=0)
        place = decision.keep[image].nonzero()[:, 0].tolist().index(int(rest[0]))
        torch.testing.assert_close(game.state.tokens.view(8, 40, -1)[image, place], packed)
        assert game.state.source[image, rest].eq(rest[0]).all()


def test_less_attentive_partner_moves_in(golden_backbone: Backbone, golden_images: Tensor) -> None:
    policy = DPCMerge(1.0, clusters=0, pairs=5)
    obs = TokenGame(golden_backbone, ["4.attn"], needs=policy.needs).reset(golden_images)
    decision = policy.decide(obs)
    attention = obs.scatter(obs.evidence["cls_attention"])
    target, weight = decision.merge_into, decision.weight
    assert target is not None
    assert weight is not None
    moved = target != torch.arange(64)
    assert moved.sum(dim=1).tolist() == [5] * 8
    assert (attention.gather(1, target) >= attention).all()
    total = attention + attention.gather(1, target)
    torch.testing.assert_close(weight[moved], (attention / total)[moved])
    together = torch.zeros(8, 64).scatter_add(1, target, weight)
    torch.testing.assert_close(together[decision.keep], torch.ones(8 * 59))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("keep_rate", {"keep_rate": 0.0}),
        ("keep_rate", {"keep_rate": 1.01}),
        ("clusters", {"clusters": -1}),
        ("clusters", {"clusters": 2.5}),
        ("clusters", {"clusters": []}),
        ("clusters", {"clusters": "3"}),
        ("pairs", {"pairs": [1, -1, 2]}),
        ("pairs", {"pairs": True}),
        ("strategy", {"strategy": "everything"}),
        ("neighbours", {"neighbours": 0}),
    ],
    ids=str,
)
def test_bad_parameters_are_refused_by_name(name: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        DPCMerge(**{"keep_rate": 0.7, **arguments})


def test_numbers_for_other_sites_are_refused(golden_backbone: Backbone, golden_images: Tensor) -> None:
    policy = DPCMerge(0.7, clusters=[4, 3])
    with pytest.raises(ValueError, match=r"clusters: expected one number or one per site \(3\), got 2"):
        play(TokenGame.for_policy(golden_backbone, policy, sites="published"), policy, golden_images)
