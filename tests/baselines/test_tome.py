"""ToMe: the original's decisions, its schedules, and what it does at the edges."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from helpers import TIMM_MODELS, random_images, toy
from matching import check_against_the_original, groups_after_each_step, naive_match, observe, random_observation
from vitprune_env.baselines.tome import ToMe, ToMeShare
from vitprune_env.deploy.export import export_program
from vitprune_env.deploy.pruned_vit import PrunedViT
from vitprune_env.engine.backbone import Backbone
from vitprune_env.game.policy_contract import check_policy
from vitprune_env.game.rollout import play
from vitprune_env.game.token_game import TokenGame
from vitprune_env.types import Decision


def test_the_originals_decisions(golden_backbone: Backbone, golden_images: Tensor) -> None:
    check_against_the_original("tome_r4", ToMe(4), golden_backbone, golden_images)
    check_against_the_original("tome_r4", ToMe([4] * 12), golden_backbone, golden_images)


@pytest.mark.parametrize(
    ("r", "inflect", "schedule"),
    [
        (4, 0.0, [4] * 12),
        (4, -1.0, [8, 7, 6, 5, 5, 4, 3, 2, 2, 1, 0, 0]),  # int(8 - 8/11 * i)
        (4, 1.0, [0, 0, 1, 2, 2, 3, 4, 5, 5, 6, 7, 8]),
        (4, 0.25, [3, 3, 3, 3, 3, 3, 4, 4, 4, 4, 4, 5]),
        ([3, 0, 0, 0, 0, 9, 0, 0, 0, 0, 0, 1], 0.0, [3, 0, 0, 0, 0, 9, 0, 0, 0, 0, 0, 1]),
        (0, 0.0, [0] * 12),
        (99, 0.0, [32, 16, 8, 4, 2, 1, 0, 0, 0, 0, 0, 0]),  # half of what there is
    ],
)  # fmt: skip
def test_schedules(r: Any, inflect: float, schedule: list[int], golden_backbone: Backbone) -> None:
    policy = ToMe(r, inflect=inflect)
    outcome = play(TokenGame.for_policy(golden_backbone, policy), policy, random_images(golden_backbone, 2)).outcome
    expected = 64 - torch.tensor(schedule).cumsum(0)
    assert torch.equal(outcome.n_kept, expected.expand(2, 12))
    assert (outcome.size.sum(dim=1) == 64).all(), "nothing is lost"


def test_a_share_of_the_tokens_that_are_left(golden_backbone: Backbone) -> None:
    policy = ToMeShare(0.8)
    outcome = play(TokenGame.for_policy(golden_backbone, policy), policy, random_images(golden_backbone, 2)).outcome
    expected = [51, 41, 33, 26, 21, 17, 14, 11, 9, 7, 6, 5]  # the nearest whole numbers to four fifths
    assert outcome.n_kept.tolist() == [expected] * 2
    assert (outcome.size.sum(dim=1) == 64).all(), "nothing is lost"
    least = ToMeShare(0.1)
    outcome = play(TokenGame.for_policy(golden_backbone, least), least, random_images(golden_backbone, 2)).outcome
    assert outcome.n_kept[0, :7].tolist() == [32, 16, 8, 4, 2, 1, 1], "half of the tokens at most"
    with pytest.raises(ValueError, match="keep_rate"):
        ToMeShare(0.0)


def test_counts_of_deit_small() -> None:
    """From 197: r = 8 ends with 101, r = 13 with 41; with r = 16 the limit binds in the last block (21, then 11)."""
    keys = torch.randn(1, 196, 5, generator=torch.Generator().manual_seed(0))
    for r, last in ((8, [109, 101]), (13, [54, 41]), (16, [21, 11])):
        alive, counts = torch.ones(1, 196, dtype=torch.bool), []
        for _ in range(12):
            decision = ToMe(r).decide(observe(alive, keys))
            alive = decision.keep
            counts.append(int(alive.sum()) + 1)
            assert decision.count == counts[-1] - 1
        assert counts[-2:] == last


@given(seed=st.integers(0, 2**31), tokens=st.integers(1, 14), num_prefix=st.integers(0, 3), r=st.integers(1, 8))
def test_the_best_pairs_merge(seed: int, tokens: int, num_prefix: int, r: int) -> None:
    obs = random_observation(seed, 3, tokens, num_prefix, ragged=False)
    decision = ToMe(r).decide(obs)
    assert decision.merge_into is not None
    for image in range(3):
        pairs = naive_match(obs, image)
        best = sorted(pairs, key=lambda sender: -pairs[sender][1])[: min(r, tokens // 2)]
        expected = [pairs[token][0] if token in best else token for token in range(tokens)]
        assert decision.merge_into[image].tolist() == expected
        assert decision.keep[image].tolist() == [token not in best for token in range(tokens)]


PREFIXES: dict[str, tuple[type[VisionTransformer], dict[str, Any]]] = {
    "no class token": (VisionTransformer, {"class_token": False, "global_pool": "avg"}),
    "class token": (VisionTransformer, {}),
    "class and distillation token": (VisionTransformerDistilled, {}),
}
SIDES = {16: 32, 25: 40}  # tokens -> pixels, for patches of 8


def small_vit(prefix: str, tokens: int) -> Backbone:
    """A ViT of 6 blocks whose weights are large enough for keys to differ."""
    build, options = PREFIXES[prefix]
    sizes = {"img_size": SIDES[tokens], "patch_size": 8, "embed_dim": 24, "depth": 6, "num_heads": 3, "num_classes": 5}
    model = build(**{**sizes, **options}).eval()
    generator = torch.Generator().manual_seed(tokens)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator) + (parameter.dim() == 1))
    return Backbone(model, name=prefix)


@dataclass
class Token:
    """One token of the sequence; a prefix token has no patches."""

    row: Tensor  # [D]
    patches: set[int]

    @property
    def size(self) -> int:
        return max(1, len(self.patches))


def one_by_one(model: Any, image: Tensor, r: int, proportional: bool) -> tuple[Tensor, list[list[set[int]]]]:
    """ToMe as described in Bolya et al., 2023, and the order of the authors' code, one token at a time.

    Returns:
        The logits, and for each block the patches in each token, in the order of the sequence.
    """
    rows, prefix, heads = model._pos_embed(model.patch_embed(image[None]))[0], model.num_prefix_tokens, 3
    tokens = [Token(row, set() if place < prefix else {place - prefix}) for place, row in enumerate(rows)]
    sequences = []
    for block in model.blocks:
        x = torch.stack([token.row for token in tokens])
        q, k, v = block.attn.qkv(block.norm1(x)).view(len(x), 3, heads, -1).permute(1, 2, 0, 3)
        sizes = torch.tensor([float(token.size) for token in tokens])
        logits = q @ k.mT * block.attn.scale + (sizes.log() if proportional else 0)
        x = x + block.attn.proj((logits.softmax(dim=-1) @ v).transpose(0, 1).flatten(1))
        for token, row in zip(tokens, x, strict=True):
            token.row = row
        key = k.mean(dim=0)
        senders = [place for place in range(len(tokens)) if place % 2 == 0 and place >= prefix]
        receivers = [place for place in range(len(tokens)) if place % 2 == 1 and place >= prefix]
        if receivers and r:
            best = {}  # sender -> similarity, receiver
            for sender in senders:
                found = [(float(torch.cosine_similarity(key[sender], key[other], dim=0)), other) for other in receivers]
                best[sender] = max(found)
            by_similarity = sorted(best, key=lambda sender: -best[sender][0])
            most = min(r, (len(tokens) - prefix) // 2)
            merging, left = by_similarity[:most], by_similarity[most:]
            for sender in merging:
                gives, takes = tokens[sender], tokens[best[sender][1]]
                total = gives.size + takes.size
                takes.row = (gives.size * gives.row + takes.size * takes.row) / total
                takes.patches = gives.patches | takes.patches
            if prefix:
                left.sort()
            tokens = [tokens[place] for place in (*range(prefix), *left, *receivers)]
        x = torch.stack([token.row for token in tokens])
        x = x + block.mlp(block.norm2(x))
        for token, row in zip(tokens, x, strict=True):
            token.row = row
        sequences.append([token.patches for token in tokens[prefix:]])
    return model.forward_head(model.norm(torch.stack([token.row for token in tokens]))[None])[0], sequences


@torch.no_grad()
@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("tokens", SIDES)
@pytest.mark.parametrize(("r", "proportional"), [(1, True), (2, True), (3, True), (3, False), (99, True)])
def test_it_is_what_happens_one_token_at_a_time(prefix: str, tokens: int, r: int, proportional: bool) -> None:
    """The same tokens in the same order after every block, the same sizes, the same logits."""
    backbone, policy = small_vit(prefix, tokens), ToMe(r, proportional)
    images = random_images(backbone, 3)
    places, outcome = groups_after_each_step(backbone, policy, images)
    for image in range(3):
        logits, sequences = one_by_one(backbone.model, images[image], r, proportional)
        for block, sequence in enumerate(sequences):
            place = [place for patch in range(tokens) for place, group in enumerate(sequence, 1) if patch in group]
            assert places[block, image].tolist() == place
        left = outcome.size[image, outcome.source[image]]
        assert left.tolist() == [len(group) for patch in range(tokens) for group in sequences[-1] if patch in group]
        torch.testing.assert_close(outcome.logits[image], logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", sorted(TIMM_MODELS))
def test_every_kind_of_vit(name: str) -> None:
    backbone, policy = toy(name), ToMe(2)
    images = random_images(backbone, 3)
    check_policy(policy, backbone, images)
    game = TokenGame.for_policy(backbone, policy)
    with FlopCounterMode(display=False) as counter:
        outcome = play(game, policy, images).outcome
    assert counter.get_total_flops() == 2 * int(outcome.macs.sum())
    assert (outcome.policy_macs > 0).all()
    tokens = backbone.num_patches
    left = [tokens := tokens - min(2, tokens // 2) for _ in range(backbone.depth)]
    assert outcome.n_kept[0].tolist() == left


def test_proportional_attention_matters_and_can_be_off(golden_backbone: Backbone, golden_images: Tensor) -> None:
    with_it, without = (
        play(TokenGame.for_policy(golden_backbone, policy), policy, golden_images).outcome
        for policy in (ToMe(4), ToMe(4, proportional_attention=False))
    )
    assert with_it.n_kept.equal(without.n_kept)
    assert (with_it.logits - without.logits).abs().max() > 0.01
    assert torch.equal(with_it.source >= 0, torch.ones(8, 64, dtype=torch.bool))


def test_it_can_be_exported() -> None:
    backbone = toy("deit_tiny_patch16_224")
    model, images = PrunedViT(backbone, ToMe(3), sites=("1.attn", "2.attn")).eval(), random_images(backbone, 3)
    graph = export_program(model).module()
    for batch in (1, 3):
        torch.testing.assert_close(graph(images[:batch]), model(images[:batch]), atol=1e-5, rtol=0)


def test_after_whole_blocks_too(golden_backbone: Backbone, golden_images: Tensor) -> None:
    policy = ToMe((20, 10, 5))
    game = TokenGame.for_policy(golden_backbone, policy, sites=(3, 6, 9))
    assert play(game, policy, golden_images).outcome.n_kept[0].tolist() == [44, 34, 29]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"r": -1}, "r: expected whole numbers of at least 0, one or one per site, got -1"),
        ({"r": True}, "r: expected whole numbers"),
        ({"r": []}, "r: expected whole numbers"),
        ({"r": 2.5}, "r: expected whole numbers"),
        ({"r": [1, 0.5]}, "r: expected whole numbers"),
        ({"r": "12"}, "r: expected whole numbers"),
        ({"r": 4, "inflect": 1.5}, "inflect: expected a number from -1 to 1, got 1.5"),
        ({"r": [4, 4], "inflect": 1.0}, "inflect: expected 0 with one r per site, got 1.0"),
    ],
)
def test_senseless_parameters_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ToMe(**arguments)


def test_as_many_numbers_as_sites(golden_backbone: Backbone, golden_images: Tensor) -> None:
    policy = ToMe([4, 4])
    with pytest.raises(ValueError, match=r"r: expected one number or one per site \(12\), got 2"):
        play(TokenGame.for_policy(golden_backbone, policy), policy, golden_images)


def test_nothing_to_merge_is_nothing_to_do() -> None:
    obs = random_observation(0, 2, 6, 1, ragged=False)
    decision = ToMe(0).decide(obs)
    assert isinstance(decision, Decision)
    assert decision.merge_into is None, "the sequence stays as it was, as in the original"
    assert decision.order is None
    assert decision.macs is None
