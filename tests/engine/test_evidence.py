"""Evidence is one record each: a new piece is seen, charged and refused everywhere without another line of code."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from helpers import random_images, toy
from vitprune_env import BasePolicy, Decision, Observation, PrunedViT, TokenGame, play
from vitprune_env.engine.backbone import Backbone
from vitprune_env.engine.evidence import (
    EVIDENCE,
    Evidence,
    MaskedAttention,
    PackedAttention,
    image_evidence,
    register_evidence,
)
from vitprune_env.engine.masked import run_masked, start_masked
from vitprune_env.engine.tokens import start_state
from vitprune_env.engine.walk import Masked, Walk
from vitprune_env.errors import EvidenceError
from vitprune_env.policy import keep_top
from vitprune_env.types import parse_sites

NAME = "vit_tiny_patch16_224"


def _packed(attention: PackedAttention) -> Tensor:
    return attention.q.flatten(1).norm(dim=1)


def _masked(attention: MaskedAttention) -> Tensor:
    return attention.q.transpose(1, 2).flatten(2).norm(dim=2)


QUERY_NORMS = Evidence(
    "query_norms",
    packed=_packed,
    masked=_masked,
    macs=lambda rows, width: 3 * rows * width,
    refusal=lambda network: "asks for a prefix token" if not network.num_prefix else None,
)


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    register_evidence(QUERY_NORMS)
    yield
    del EVIDENCE[QUERY_NORMS.name]


class Questions(BasePolicy):
    """Keeps the tokens that ask loudest."""

    needs = frozenset({"query_norms"})

    def decide(self, obs: Observation) -> Decision:
        return Decision(keep=keep_top(obs, obs.evidence["query_norms"], obs.num_alive // 2))


@torch.no_grad()
def test_a_policy_sees_it_and_is_charged_for_it() -> None:
    backbone = toy(NAME)
    images = random_images(backbone, 3)
    game = TokenGame.for_policy(backbone, Questions(), sites=(1, 2))
    episode = play(game, Questions(), images)
    tokens, width = backbone.num_patches, backbone.num_heads * backbone.block(1).attn.head_dim
    rows = [tokens + backbone.num_prefix, tokens // 2 + backbone.num_prefix]
    assert episode.outcome.policy_macs.tolist() == [float(3 * width * sum(rows))] * 3
    deployed = PrunedViT(backbone, Questions(), sites=(1, 2))(images)
    torch.testing.assert_close(deployed, episode.outcome.logits)
    half = backbone.run(backbone.embed(images), 1)[0]
    block = backbone.block(1)
    q = block.attn.q_norm(block.attn.qkv(block.norm1(backbone.embed(images).x)).unflatten(1, (3, -1))[:, 0])
    norms = q.view(3, -1, width)[:, backbone.num_prefix :].norm(dim=2)
    best = norms.argsort(dim=1, descending=True)[:, : tokens // 2]
    assert torch.equal(episode.keep[0].nonzero()[:, 1].view(3, -1), best.sort(dim=1).values)
    assert half.alive.all()


@torch.no_grad()
def test_masked_execution_gives_the_same() -> None:
    backbone = toy(NAME)
    images = random_images(backbone, 2)
    _, packed = backbone.run(backbone.embed(images), 3, {"query_norms"})
    _, masked = run_masked(backbone, start_masked(backbone, images), 3, needs={"query_norms"})
    torch.testing.assert_close(masked["query_norms"].flatten(), packed["query_norms"])


def test_what_is_unknown_or_not_there_is_refused_by_name() -> None:
    backbone = toy(NAME)
    with pytest.raises(EvidenceError, match=r"needs: unknown evidence 'qury_norms'; known: .*query_norms"):
        TokenGame(backbone, needs=frozenset({"qury_norms"}))
    with pytest.raises(EvidenceError, match="needs: unknown evidence 'qury_norms'"):
        run_masked(backbone, start_masked(backbone, random_images(backbone, 1)), 1, needs={"qury_norms"})
    without = toy("vit_medium_patch16_gap_240")
    with pytest.raises(EvidenceError, match="needs: 'query_norms' asks for a prefix token"):
        TokenGame(without, needs=frozenset({"query_norms"}))


def test_a_name_stands_for_one_thing() -> None:
    assert register_evidence(QUERY_NORMS) is QUERY_NORMS  # again is fine
    with pytest.raises(EvidenceError, match="name: expected one that is not taken, got 'keys'"):
        register_evidence(Evidence("keys", packed=_packed, masked=_masked))


@torch.no_grad()
def test_a_masked_walk_observes_what_the_packed_game_does() -> None:
    """Same decisions, same observations at every site, evidence of a shared attention included."""
    backbone = toy(NAME)
    images, sites = random_images(backbone, 3), parse_sites((1, "3.attn", 3), backbone.depth)
    needs = frozenset({"query_norms", "mean_attention"})
    seen: list[Observation] = []

    class Halving(Questions):
        def decide(self, obs: Observation) -> Decision:
            seen.append(obs)
            return super().decide(obs)

    game = TokenGame(backbone, sites, needs=needs)
    play(game, Halving(), images)
    walk = Walk(Masked(backbone), sites, needs)

    def decide(arrival):  # noqa: ANN001, ANN202
        obs, expected = walk.medium.observe(arrival, len(sites)), seen[arrival.step]
        assert (obs.site, obs.step, arrival.is_fresh) == (expected.site, expected.step, arrival.step != 2)
        assert torch.equal(obs.alive, expected.alive)
        assert torch.equal(obs.order, expected.order)
        torch.testing.assert_close(obs.tokens, expected.tokens, atol=1e-5, rtol=1e-5)
        for name in needs:
            torch.testing.assert_close(obs.evidence[name], expected.evidence[name], atol=1e-5, rtol=1e-5)
        return arrival.state.with_weights(game.steps[arrival.step].kept.float())

    walk.through(start_masked(backbone, images), decide)


def checkered(backbone: Backbone, batch: int = 2) -> tuple[Tensor, Tensor]:
    """Images whose patches have one brightness each, and these brightnesses `[B, N]`; channels lie 1 apart."""
    rows, columns = backbone.grid_size
    values = torch.arange(float(batch * rows * columns)).view(batch, rows, columns)
    side = backbone.image_size[0] // rows
    area = values.repeat_interleave(side, dim=1).repeat_interleave(side, dim=2)
    return torch.stack([area - 1, area, area + 1], dim=1), values.flatten(1)


class Sees(BasePolicy):
    """Takes given decisions, and remembers what it was shown."""

    needs = frozenset({"brightness"})

    def __init__(self, *decisions: Callable[[Observation], Decision]) -> None:
        self.decisions, self.seen = decisions, []

    def decide(self, obs: Observation) -> Decision:
        self.seen.append(obs.scatter(obs.evidence["brightness"], float("nan")))
        return self.decisions[obs.step](obs)


@torch.no_grad()
def test_brightness_is_the_mean_of_a_patch_and_costs_nothing() -> None:
    backbone = toy(NAME)
    images, values = checkered(backbone)
    policy = Sees(lambda obs: Decision(obs.alive))
    outcome = play(TokenGame.for_policy(backbone, policy, sites=(2,)), policy, images).outcome
    torch.testing.assert_close(policy.seen[0], values)
    assert outcome.policy_macs.tolist() == [0, 0]
    by_hand = torch.tensor([[1.0, 3.0], [5.0, 7.0]]).expand(1, 3, 2, 2) * torch.tensor([1.0, 2, 3]).view(1, 3, 1, 1)
    assert image_evidence({"brightness", "keys"}, by_hand, (1, 2))["brightness"].tolist() == [[6.0, 10.0]]


@torch.no_grad()
def test_brightness_follows_tokens_that_are_dropped_merged_and_parked() -> None:
    backbone = toy(NAME)
    images, values = checkered(backbone)
    tokens = values.shape[1]

    def drop(obs: Observation) -> Decision:  # of each image other tokens, so that the rows are ragged
        keep = obs.alive.clone()
        keep[0, 0] = keep[1, 1] = keep[1, 5] = False
        return Decision(keep)

    def merge(into: int, *others: int) -> Callable[[Observation], Decision]:
        def decide(obs: Observation) -> Decision:
            target = torch.arange(tokens).expand(obs.alive.shape).clone()
            target[:, list(others)] = into
            return Decision(obs.alive, target.masked_fill(~obs.alive, -1))

        return decide

    def park(obs: Observation) -> Decision:
        return Decision(obs.alive, park=obs.alive & (torch.arange(tokens) >= 8))

    policy = Sees(
        drop, merge(3, 4), merge(2, 3, 6), park, lambda obs: Decision(obs.present), lambda obs: Decision(obs.alive)
    )
    game = TokenGame.for_policy(backbone, policy, sites=(1, "2.attn", 2, "3.attn", 3, 4))
    state = game.prepare(images)
    assert state.half == 2, "no attention is needed at the first site"
    play(game, policy, state)
    left = values.clone()
    left[0, 0] = left[1, 1] = left[1, 5] = float("nan")
    torch.testing.assert_close(policy.seen[1], left, equal_nan=True)
    pair = left.clone()
    pair[:, 3], pair[:, 4] = values[:, 3:5].mean(dim=1), float("nan")
    torch.testing.assert_close(policy.seen[2], pair, equal_nan=True)
    four = pair.clone()  # of a pair and two single tokens: each patch counts once
    four[:, 2], four[:, [3, 6]] = values[:, [2, 3, 4, 6]].mean(dim=1), float("nan")
    torch.testing.assert_close(policy.seen[3], four, equal_nan=True)
    torch.testing.assert_close(policy.seen[4], four.where(torch.arange(tokens) < 8, float("nan")), equal_nan=True)
    torch.testing.assert_close(policy.seen[5], four, equal_nan=True)


@torch.no_grad()
def test_brightness_in_masked_execution_and_beside_attention() -> None:
    backbone = toy(NAME)
    images, values = checkered(backbone)
    needs = frozenset({"brightness", "keys"})
    _, masked = run_masked(backbone, start_masked(backbone, images), 3, needs=needs)
    _, packed = backbone.run(backbone.embed(images), 3, needs)
    torch.testing.assert_close(masked["brightness"], values)
    torch.testing.assert_close(packed["brightness"], values.flatten())
    assert packed["keys"].shape == (values.numel(), backbone.embed_dim // backbone.num_heads)


def test_tokens_without_images_have_no_brightness() -> None:
    backbone = toy(NAME)
    policy = Sees(lambda obs: Decision(obs.alive))
    game = TokenGame.for_policy(backbone, policy, sites=(2,))
    state = game.prepare(checkered(backbone)[0])
    with pytest.raises(EvidenceError, match="needs: 'brightness' is computed from pixels, and these tokens were made"):
        game.start(start_state(state.x.view(2, -1, backbone.embed_dim), backbone.num_prefix, state.half))
    with pytest.raises(EvidenceError, match="name: expected one that is not taken, got 'brightness'"):
        register_evidence(Evidence("brightness", packed=_packed, masked=_masked))
