"""Learners with other actions than prune and keep: three actions, masks, waiting tokens, deployed policies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

import runs
from games import NAME, OwnLabels, Teacher, toy_game
from helpers import random_images, toy
from stay_drop_wait import StayDropWait
from teams import buffer_of, update
from vitprune_env import PrunedViT, SharedOutcome, check_policy
from vitprune_env.agents import (
    MAPPO,
    MAPPOConfig,
    PPOSingleConfig,
    TokenActor,
    TokenCritic,
    TokenPolicy,
    TrainResult,
    load_policy,
    train,
)
from vitprune_env.agents.learners.advantage import generalized_advantage
from vitprune_env.agents.learners.buffer import Trajectory
from vitprune_env.agents.learners.exploration import ExploringPolicy
from vitprune_env.envs.actions import ActionKind, KeepActions, MergeActions
from vitprune_env.examples.custom_learner import COMAConfig
from vitprune_env.game.rollout import play
from vitprune_env.game.token_game import TokenGame
from vitprune_env.types import Decision, Observation

KIND = StayDropWait()
DIM = 48
DATA = OwnLabels(48)
LEARNERS = {"mappo": MAPPOConfig, "ppo_single": PPOSingleConfig, "coma": COMAConfig}


def trained(learner: str, kind: ActionKind = KIND, **options: Any) -> TrainResult:
    settings = LEARNERS[learner](minibatch=256, networks=runs.TINY.learner.networks)
    config = runs.but(runs.TINY, learner=settings, updates=3, share=0.6)
    return train(toy(NAME), DATA, **{**config.arguments, **options}, actions=kind, progress=False)


@pytest.mark.parametrize("learner", LEARNERS)
def test_every_learner_trains_with_a_third_action_and_its_policy_plays(learner: str) -> None:
    result = trained(learner)
    policy = result.policy
    assert policy.actor.num_actions == 3
    assert 0.9 * result.target_macs < result.train_macs <= result.target_macs
    episode = play(TokenGame.for_policy(toy(NAME), policy), policy, DATA.images)
    assert 0 < episode.keep.float().mean() < 1
    check_policy(policy, toy(NAME), random_images(toy(NAME), 4))
    assert torch.isfinite(PrunedViT(toy(NAME), policy)(DATA.images[:4])).all()
    assert all(row["gradient_steps"] > 0 for row in result.history)


def test_interrupted_and_resumed_gives_the_same_bits(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, original, calls = trained("mappo"), MAPPO.update, []

    def dying(self: MAPPO, *args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("killed")
        return original(self, *args, **options)

    monkeypatch.setattr(MAPPO, "update", dying)
    with pytest.raises(RuntimeError, match="killed"):
        trained("mappo", output=tmp_path)
    monkeypatch.setattr(MAPPO, "update", original)
    resumed = trained("mappo", output=tmp_path, resume=True)
    loaded = load_policy(tmp_path / "policy.safetensors")
    game = TokenGame.for_policy(toy(NAME), loaded)
    assert torch.equal(play(game, loaded, DATA.images).keep, play(game, whole.policy, DATA.images).keep)
    assert whole.policy.threshold == resumed.policy.threshold
    for one, two in zip(whole.policy.actor.parameters(), resumed.policy.actor.parameters(), strict=True):
        assert torch.equal(one, two)


def test_it_learns_which_of_three_actions_pays() -> None:
    """Left half: stay. Right half: drop. Waiting is paid like dropping, and loses."""
    game, data = toy_game(), OwnLabels(12)
    quiet, left = 0.1 * data.images, torch.arange(25) % 5 < 2
    game.reward = Teacher(left)  # pyright: ignore[reportAttributeAccessIssue]
    actor = TokenActor(DIM, (32,), num_actions=3)
    mappo = MAPPO(actor=actor, critic=TokenCritic(DIM, (32,)), actions=KIND, value_norm=True, ent_coef=0.01)
    for seed in range(30):
        explorer = ExploringPolicy(actor, torch.Generator().manual_seed(seed), KIND)
        episode = play(game, explorer, quiet, data.labels, record=True)
        update(mappo, buffer_of(Trajectory.of(episode, explorer.actions, explorer.log_probs)), 128, 3)
    first = play(game, TokenPolicy(actor, actions=KIND), quiet).keep[0]
    assert first[:, left].float().mean() > first[:, ~left].float().mean() + 0.5


@dataclass(frozen=True)
class FirstStays(ActionKind):
    """Prune or keep, with a mask that forbids pruning the first token."""

    name = "first_stays"

    def meaning(self, num_agents: int) -> str:
        return "0 (prune) or 1 (keep)"

    def count(self, num_agents: int) -> int:
        return 2

    def decision(self, actions: torch.Tensor, obs: Observation) -> Decision:
        return Decision(keep=actions.bool() & obs.alive)

    def encode(self, decision: Decision, obs: Observation) -> torch.Tensor:
        return decision.keep.long()

    def mask(self, alive: torch.Tensor) -> torch.Tensor:
        allowed = torch.ones(*alive.shape, 2, dtype=torch.bool)
        allowed[:, 0, 0] = False
        return allowed


def test_a_mask_holds_in_play_and_in_the_update() -> None:
    actor, kind = TokenActor(DIM, (8,), keep_bias=-3.0), FirstStays()
    explorer = ExploringPolicy(actor, torch.Generator().manual_seed(0), kind)
    episode = play(toy_game(), explorer, DATA.images, DATA.labels, record=True)
    assert episode.keep[:, :, 0].all()
    assert episode.keep[0].float().mean() < 0.3
    rows = Trajectory.of(episode, explorer.actions, explorer.log_probs, explorer.masks)
    assert rows.mask is not None
    stats = update(MAPPO(actor=actor, critic=TokenCritic(DIM, (8,)), actions=kind), buffer_of(rows))
    assert stats.approx_kl == pytest.approx(0.0, abs=1e-6), "the update masks as play did"
    result = trained("mappo", kind)
    assert play(TokenGame.for_policy(toy(NAME), result.policy), result.policy, DATA.images).keep[:, :, 0].all()


def test_merging_is_an_action_that_can_be_learnt() -> None:
    result = trained("mappo", MergeActions(), reward=SharedOutcome(0.01, merge_cost=0.01))
    assert result.policy.actor.num_actions == 26
    outcome = play(TokenGame.for_policy(toy(NAME), result.policy), result.policy, DATA.images).outcome
    assert float(outcome.macs.mean()) <= 1.05 * result.target_macs


def test_an_agent_that_waits_is_paid_for_the_steps_between() -> None:
    """Two decisions, at steps 0 and 2: the reward of step 1 goes to the first of them."""
    table = lambda *values: torch.tensor(values)[:, None, None]  # noqa: E731
    alive, terminated = table(True, False, True), table(False, False, True)
    reward, value = table(1.0, 2.0, 4.0), table(0.5, 9.0, 3.0)
    advantage = generalized_advantage(reward, value, alive, terminated, discount=0.5, trace=0.8).flatten()
    last = 4.0 - 3.0
    assert advantage.tolist() == pytest.approx([1.0 + 2.0 + 0.5 * 3.0 - 0.5 + 0.4 * last, 0.0, last])


def test_waiting_tokens_have_no_row() -> None:
    actor = TokenActor(DIM, (8,), keep_bias=0.0, num_actions=3)
    explorer = ExploringPolicy(actor, torch.Generator().manual_seed(0), KIND)
    episode = play(toy_game(), explorer, DATA.images, DATA.labels, record=True)
    assert episode.parked is not None
    assert episode.parked.any()
    rows = Trajectory.of(episode, explorer.actions, explorer.log_probs)
    assert len(rows) == sum(len(obs.tokens) for obs in episode.observations) < int(episode.alive.sum())
    assert torch.equal(rows.dense(rows.action.float())[0], torch.stack([explorer.actions[0].view(48, 25)])[0].float())


def test_the_kind_must_fit_the_actor() -> None:
    with pytest.raises(ValueError, match="actions: expected the kind of the actor's 3 actions, got None"):
        TokenPolicy(TokenActor(DIM, num_actions=3))
    assert isinstance(TokenPolicy(TokenActor(DIM)).actions, KeepActions)
    with pytest.raises(ValueError, match="action_space: expected one of"):
        trained("mappo", "jump")  # pyright: ignore[reportArgumentType]
