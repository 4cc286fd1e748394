"""A new actor imitates another policy: it keeps what that keeps, at the budget, whatever the way out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from games import NAME, OwnLabels
from helpers import toy
from vitprune_env.agents import Cloning, LightNetworks, MAPPOConfig, RunConfig, Share, cloned_policy, train
from vitprune_env.baselines import EViT, TopK
from vitprune_env.engine.backbone import Backbone
from vitprune_env.errors import BudgetError
from vitprune_env.game.rollout import play
from vitprune_env.game.token_game import TokenGame
from vitprune_env.policy import BasePolicy, keep_top
from vitprune_env.types import Decision, Observation

SHORT = Cloning(images=16, steps=100, batch_size=256, lr=1e-2)


@dataclass(frozen=True)
class FirstFeature(BasePolicy):
    """Keeps the half of the tokens whose first feature is the largest, which an actor can see."""

    def decide(self, obs: Observation) -> Decision:
        return Decision(keep=keep_top(obs, obs.tokens[:, 0], (obs.num_alive / 2).ceil()))


def share_kept_alike(backbone: Backbone, one: Any, other: Any) -> float:
    """How often two policies agree on a token at the first site."""
    images = OwnLabels(16).images
    keeps = [play(TokenGame.for_policy(backbone, each, sites=(2,)), each, images).keep[0] for each in (one, other)]
    return float((keeps[0] == keeps[1]).double().mean())


def cost(backbone: Backbone, policy: Any, images: torch.Tensor) -> float:
    """As a share of dense."""
    game = TokenGame.for_policy(backbone, policy)
    return float(play(game, policy, images).outcome.macs.mean()) / game.cost.dense()


def test_it_keeps_what_the_teacher_keeps_at_the_budget() -> None:
    backbone, data, teacher = toy(NAME), OwnLabels(16), FirstFeature()
    game = TokenGame.for_policy(backbone, teacher, sites=(2,))
    share = float(play(game, teacher, data.images).outcome.macs.mean()) / game.cost.dense()
    policy = cloned_policy(backbone, data, teacher, share, sites=(2,), settings=SHORT)
    assert share_kept_alike(backbone, policy, teacher) > 0.85
    untaught = cloned_policy(backbone, data, teacher, share, sites=(2,), settings=Cloning(16, steps=1, lr=1e-9))
    assert share_kept_alike(backbone, untaught, teacher) < 0.7
    assert 0.9 * share < cost(backbone, policy, data.images) <= share
    again = cloned_policy(backbone, data, teacher, share, sites=(2,), settings=SHORT)
    assert torch.equal(again.actor.last.weight, policy.actor.last.weight)
    assert again.threshold == policy.threshold
    assert policy.info["algorithm"] == "cloning"


@pytest.mark.parametrize("actions", ["keep_or_merge", "drop_merge_keep"])
def test_it_learns_the_way_out_as_well(actions: str) -> None:
    """A teacher that merges everything it does not keep: an agent that may choose takes merging, never dropping."""
    backbone, data = toy(NAME), OwnLabels(16)
    networks = LightNetworks(actor_hidden=(8,), senses=("size",))
    given: dict[str, Any] = {"sites": (1, 2), "actions": actions, "networks": networks, "settings": SHORT}
    policy = cloned_policy(backbone, data, TopK(0.6, leave="merge"), 0.8, **given)
    assert (policy.actions.name, policy.senses, policy.actor.hidden) == (actions, ("size",), (8,))
    assert policy.attention_bias == "log_size"
    outcome = play(TokenGame.for_policy(backbone, policy), policy, data.images).outcome
    if actions == "keep_or_merge":
        assert outcome.size.sum(dim=1).tolist() == [backbone.num_patches] * 16


def test_training_goes_on_from_it() -> None:
    backbone, data = toy(NAME), OwnLabels(16)
    start = cloned_policy(backbone, data, FirstFeature(), 0.7, sites=(1, 2), settings=SHORT)
    learner = MAPPOConfig(lr=1e-9)
    result = train(
        backbone, data, Share(0.7), learner, run=RunConfig(1, images=16, calibration_images=16), start=start,
        progress=False,
    )  # fmt: skip
    assert share_kept_alike(backbone, result.policy, start) > 0.95


def test_mistakes_are_named() -> None:
    backbone, data = toy(NAME), OwnLabels(4)
    with pytest.raises(BudgetError, match="budget: expected above"):
        cloned_policy(backbone, data, FirstFeature(), 0.01, sites=(2,))
    with pytest.raises(ValueError, match="0 and 1 can only say prune or keep"):
        cloned_policy(backbone, data, EViT(0.5), 0.7, sites=(2,), settings=SHORT)
    with pytest.raises(ValueError, match="steps: expected at least 1"):
        Cloning(steps=0)
