"""Merging by action: where simultaneous arrows end, and that actions and decisions are equivalent."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from envs import AVERAGE, CLASS_TOKEN, draw_arrows, images_for, make_env, merge_env
from helpers import random_merge, toy
from vitprune_env.baselines import EViT, RandomDrop, TopK
from vitprune_env.engine.reduction import check_decision
from vitprune_env.envs.actions import MergeActions, resolve
from vitprune_env.envs.parallel import PRUNE_MODES
from vitprune_env.envs.vector import TokenVectorEnv
from vitprune_env.errors import EvidenceError
from vitprune_env.game.rollout import play
from vitprune_env.game.token_game import TokenGame
from vitprune_env.policy import BasePolicy, mean_weights
from vitprune_env.types import Decision, Observation

seeds = st.integers(0, 2**31)


# Where arrows end


@pytest.mark.parametrize(
    ("arrows", "dead", "target"),
    [
        ([0, 1, 2, 3], (), [0, 1, 2, 3]),  # all stay
        ([-1, 1, -1, 3], (), [-1, 1, -1, 3]),  # two are dropped
        ([1, 1, 1, 3], (), [1, 1, 1, 3]),  # two go into the third
        ([1, 2, 3, 3], (), [3, 3, 3, 3]),  # a chain ends in the token that stays
        ([1, 2, -1, 3], (), [-1, -1, -1, 3]),  # into a token that leaves: all leave
        ([2, 1, 2, 3], (2,), [-1, 1, -1, 3]),  # into a dead token; actions of dead tokens are ignored
        ([0, 3, 2, 1], (), [0, 1, 2, 1]),  # into each other: the lower number stays
        ([1, 2, 3, 1], (), [1, 1, 1, 1]),  # a circle of three, and one that goes into it
        ([3, 3, 0, 2], (), [0, 0, 0, 0]),  # 3 -> 2 -> 0 -> 3: the lowest is not the one that was aimed at
    ],
)
def test_arrows_by_hand(arrows: list[int], dead: tuple[int, ...], target: list[int]) -> None:
    alive = torch.ones(1, 4, dtype=torch.bool)
    alive[0, list(dead)] = False
    assert resolve(torch.tensor([arrows]), alive)[0].tolist() == target


def followed(arrows: list[int], alive: list[bool], token: int) -> int:
    """Where a token ends up, by walking."""
    way: list[int] = []
    while token >= 0 and alive[token]:
        if token in way:
            return min(way[way.index(token) :])
        way.append(token)
        token = arrows[token]
    return -1


@given(
    agents=st.integers(1, 17),
    batch=st.integers(1, 4),
    stay=st.sampled_from([0.0, 0.3]),
    living=st.sampled_from([0.7, 1.0]),
    seed=seeds,
)
def test_arrows_end_where_walking_ends(agents: int, batch: int, stay: float, living: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    alive = torch.rand(batch, agents, generator=generator) < living
    arrows = draw_arrows(agents, seed, batch, stay) - 1
    target = resolve(arrows, alive)
    for image in range(batch):
        walked = [followed(arrows[image].tolist(), alive[image].tolist(), token) for token in range(agents)]
        assert target[image].tolist() == walked


def test_the_longest_chain_is_followed_to_its_end() -> None:
    for agents in (1, 2, 3, 64, 65, 196):
        chain = torch.arange(1, agents + 1).clamp(max=agents - 1)[None]
        assert (resolve(chain, torch.ones(1, agents, dtype=torch.bool)) == agents - 1).all()
        circle = (torch.arange(agents)[None] - 1) % agents
        assert (resolve(circle, torch.ones(1, agents, dtype=torch.bool)) == 0).all()


def test_weights_by_hand() -> None:
    target, size = torch.tensor([[1, 1, -1, 3, 1]]), torch.tensor([[1.0, 3.0, 2.0, 5.0, 4.0]])
    torch.testing.assert_close(mean_weights(target, size), torch.tensor([[1 / 8, 3 / 8, 1.0, 1.0, 4 / 8]]))


# Actions and decisions are equivalent


def observed(alive: Tensor, seed: int) -> Observation:
    """As much of an observation as actions look at."""
    size = torch.randint(1, 5, alive.shape, generator=torch.Generator().manual_seed(seed)) * alive.float()
    return cast(Any, type("Seen", (), {"alive": alive, "present": alive, "size": size}))


@given(agents=st.integers(1, 17), living=st.sampled_from([0.6, 1.0]), seed=seeds)
def test_from_actions_to_a_decision_and_back(agents: int, living: float, seed: int) -> None:
    alive = torch.rand(3, agents, generator=torch.Generator().manual_seed(seed)) < living
    space, obs = MergeActions(), observed(alive, seed)
    decision = space.decision(draw_arrows(agents, seed, batch=3, stay=0.3), obs)
    check_decision(decision, alive)
    assert decision.merge_into is not None
    straight = space.encode(decision, obs)
    again = space.decision(straight, obs)
    for name in ("keep", "merge_into", "weight"):
        assert torch.equal(getattr(again, name), getattr(decision, name))
    assert torch.equal(space.encode(again, obs), straight)
    mask = space.mask(alive)
    assert mask.gather(2, straight[:, :, None]).all(), "what comes out is allowed"


class Playing(BasePolicy):
    """Random drops and merges, into means as ToMe's; groups may leave whole; it cares about the order it sees."""

    def __init__(self, seed: int, mean: bool = True, ordered: bool = False, least: int = 0) -> None:
        self.seed, self.mean, self.ordered, self.least = seed, mean, ordered, least
        self.seen: list[Observation] = []

    def reset(self, batch_size: int, num_agents: int) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)

    def decide(self, obs: Observation) -> Decision:
        self.seen.append(obs)
        decision = random_merge(obs.alive, self.generator, self.least)
        if self.mean:
            into = cast(Tensor, decision.merge_into)
            stands = decision.keep.gather(1, into.clamp(min=0)) & (into >= 0)
            weight = mean_weights(into.masked_fill(~stands, -1), obs.size)
            decision = replace(decision, weight=weight * (1 + 1e-6))
        if self.ordered:  # reversed whenever it looks
            decision = replace(decision, order=-obs.order)
        return decision


@pytest.mark.parametrize("on_prune", PRUNE_MODES)
@pytest.mark.parametrize("name", [CLASS_TOKEN, AVERAGE])
@given(seed=seeds)
def test_a_policy_that_merges_plays_the_same_through_actions(name: str, on_prune: str, seed: int) -> None:
    least = int(toy(name).needs_patches)
    policies = [Playing(seed, ordered=True, least=least) for _ in range(3)]
    environment = merge_env(name, on_prune=on_prune)
    environment.reset(options={"index": 3})
    while environment.agents:
        environment.step(environment.actions_from(policies[0]))
    venv = TokenVectorEnv(TokenGame(toy(name)), cast(Any, images_for(name)), 1, action_space="merge")
    venv.reset(options={"indices": [3]})
    for _ in range(venv.num_steps):
        venv.step(venv.actions_from(policies[1]))
    outcome = play(TokenGame(toy(name)), policies[2], *images_for(name)[3:4]).outcome
    for ours, theirs in ((environment.outcome(), policies[0]), (venv.outcome(), policies[1])):
        assert torch.equal(ours.source, outcome.source)
        assert torch.equal(ours.size, outcome.size)
        assert torch.equal(ours.macs, outcome.macs)
        torch.testing.assert_close(ours.logits, outcome.logits, atol=1e-4, rtol=0)
        for mine, other in zip(theirs.seen, policies[2].seen, strict=False):
            assert torch.equal(mine.order, other.order)


@pytest.mark.parametrize(
    "policy", [RandomDrop(0.6, seed=3), TopK(0.6), EViT(0.6, fuse=False)], ids=["random", "topk", "evit"]
)
def test_policies_that_only_prune_play_here_too(policy: Any) -> None:
    environment = merge_env(needs=policy.needs)
    environment.reset(options={"index": 3})
    theirs = copy.deepcopy(policy)
    while environment.agents:
        environment.step(environment.actions_from(policy))
    outcome = play(TokenGame(toy(CLASS_TOKEN), needs=policy.needs), theirs, *images_for(CLASS_TOKEN)[3:4]).outcome
    assert torch.equal(environment.outcome().alive, outcome.alive)
    torch.testing.assert_close(environment.outcome().logits, outcome.logits, atol=1e-5, rtol=0)


def test_what_actions_cannot_say_is_refused() -> None:
    environment = merge_env(needs=frozenset({"cls_attention"}))
    environment.reset(seed=0)
    with pytest.raises(ValueError, match=r"EViT cannot play .* mean of their patches, but its weights are others"):
        environment.actions_from(EViT(0.6))
    with pytest.raises(ValueError, match=r"Playing cannot play .* weights are others; use vitprune_env\.play"):
        environment.actions_from(Playing(0, mean=False))
    with pytest.raises(EvidenceError, match="attention_bias"):
        environment.actions_from(type("Proportional", (Playing,), {"attention_bias": "log_size"})(0))
    keep_only = make_env()
    keep_only.reset(seed=0)
    with pytest.raises(ValueError, match=r"0 and 1 can only say prune or keep, but it merges \d+ tokens"):
        keep_only.actions_from(Playing(0))


def test_proportional_attention_reaches_the_game() -> None:
    one, other = (merge_env(attention_bias=bias) for bias in (None, "log_size"))
    for environment in (one, other):
        environment.reset(options={"index": 1})
        while environment.agents:
            environment.step({agent: 1 + i // 2 * 2 for i, agent in enumerate(environment.possible_agents)})
    assert not torch.allclose(one.outcome().logits, other.outcome().logits, atol=1e-4)
