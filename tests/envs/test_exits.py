"""Action kinds with ways out: what they decide, that policies play through them, and that learners learn with them."""

from __future__ import annotations

import warnings
from typing import Any, cast

import pytest
import torch
from pettingzoo.test import parallel_api_test

from envs import CLASS_TOKEN, images_for
from helpers import toy
from vitprune_env import DropMergeKeep, KeepOrFuse, KeepOrMerge, PrunedViT, TokenGame, parallel_env, play
from vitprune_env.agents import RunConfig, Share, load_policy, save_policy, train
from vitprune_env.baselines import EViT, TopK
from vitprune_env.envs.actions import ActionKind, action_kind
from vitprune_env.envs.vector import TokenVectorEnv
from vitprune_env.errors import EvidenceError
from vitprune_env.game.leaving import fuse_leavers, merge_leavers
from vitprune_env.types import Decision, Observation

KINDS: tuple[ActionKind, ...] = (KeepOrMerge(), KeepOrFuse(), DropMergeKeep())
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)


def game_with(kind: ActionKind) -> tuple[TokenGame, Observation]:
    """A game at its first site."""
    game = TokenGame(toy(CLASS_TOKEN), needs=kind.needs | {"cls_attention"}, attention_bias=kind.attention_bias)
    images, labels = images_for(CLASS_TOKEN)[:4]
    return game, game.reset(cast(Any, images), cast(Any, labels))


def same(one: Decision, other: Decision) -> bool:
    """Whether two decisions end every token in the same place."""
    assert one.merge_into is not None
    assert other.merge_into is not None
    return torch.equal(one.keep, other.keep) and torch.equal(one.merge_into, other.merge_into)


@every_kind
def test_kinds_are_known_by_name(kind: ActionKind) -> None:
    assert action_kind(kind.name) == kind
    assert str(kind.count(9) - 1) in kind.meaning(9)


def test_actions_are_ways_out() -> None:
    game, obs = game_with(KeepOrMerge())
    actions = torch.randint(2, obs.alive.shape, generator=torch.Generator().manual_seed(0))
    assert same(KeepOrMerge().decision(actions, obs), merge_leavers(obs, actions == 1))
    assert same(KeepOrFuse().decision(actions, obs), fuse_leavers(obs, actions == 1))
    three = torch.randint(3, obs.alive.shape, generator=torch.Generator().manual_seed(1))
    assert same(DropMergeKeep().decision(three, obs), merge_leavers(obs, three == 2, three == 1))
    game.step(DropMergeKeep().decision(three, obs))


@every_kind
def test_encoding_is_the_inverse_of_deciding(kind: ActionKind) -> None:
    _, obs = game_with(kind)
    generator = torch.Generator().manual_seed(2)
    actions = torch.randint(kind.count(obs.num_agents), obs.alive.shape, generator=generator)
    decision = kind.decision(actions, obs)
    assert same(kind.decision(kind.encode(decision, obs), obs), decision)


def test_what_a_kind_cannot_say_is_refused() -> None:
    _, obs = game_with(KeepOrMerge())
    dropped = TopK(keep_rate=0.5).decide(obs)
    with pytest.raises(ValueError, match="would end up elsewhere"):
        KeepOrMerge().encode(dropped, obs)
    assert DropMergeKeep().encode(dropped, obs).unique().tolist() == [0, 2]
    with pytest.raises(ValueError, match=r"would end up elsewhere|also decides"):
        KeepOrMerge().encode(EViT(keep_rate=0.5).decide(obs), obs)


@every_kind
def test_parallel_api(kind: ActionKind) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = parallel_env(toy(CLASS_TOKEN), cast(Any, images_for(CLASS_TOKEN)), action_space=kind.name)
        assert cast(Any, made).game.needs >= kind.needs
        parallel_api_test(made, num_cycles=12)


def test_a_game_without_the_evidence_is_refused() -> None:
    with pytest.raises(EvidenceError, match=r"keep_or_merge.*keys.*needs="):
        TokenVectorEnv(TokenGame(toy(CLASS_TOKEN)), cast(Any, images_for(CLASS_TOKEN)), 2, action_space="keep_or_merge")


@every_kind
def test_a_learnt_policy_is_deployed_with_its_way_out(kind: ActionKind, tmp_path: Any) -> None:
    backbone, data = toy(CLASS_TOKEN), cast(Any, images_for(CLASS_TOKEN))
    run = RunConfig(updates=2, images=8, cache_images=12, calibration_images=12)
    result = train(backbone, data, Share(0.7), run=run, actions=kind.name, sites=(1, 2), progress=False)
    policy = load_policy(save_policy(result.policy, tmp_path / "policy.safetensors"))
    assert policy.actions == kind
    assert policy.needs == kind.needs
    images, labels = data[:6]
    outcome = play(TokenGame.for_policy(backbone, policy), policy, images, labels).outcome
    assert torch.allclose(PrunedViT(backbone, policy)(images), outcome.logits, atol=1e-5)
    assert (outcome.policy_macs > 0).all()
    if kind.name != "drop_merge_keep":
        assert (outcome.source >= 0).all(), "nothing is dropped"
