"""What surrounds the PettingZoo environment: state, spaces, policies that play through it, errors, registration."""

from __future__ import annotations

import copy
import warnings
from typing import Any, cast

import gymnasium
import numpy as np
import pettingzoo
import pytest
import torch
from pettingzoo.test.state_test import state_test

from envs import BACKBONES, CLASS_TOKEN, images_for, make_env, rollout, total
from helpers import make_model, toy
from vitprune_env.baselines import EViT, RandomDrop, TopK
from vitprune_env.envs import parallel
from vitprune_env.envs.gym import SingleAgentEnv
from vitprune_env.envs.parallel import PRUNE_MODES, TokenPruningEnv, env, parallel_env
from vitprune_env.envs.registration import ENV_ID, register_envs
from vitprune_env.errors import DecisionError, EvidenceError
from vitprune_env.game.rollout import play
from vitprune_env.game.token_game import TokenGame
from vitprune_env.policy import BasePolicy
from vitprune_env.types import Decision, Observation


@pytest.mark.parametrize("on_prune", PRUNE_MODES)
@pytest.mark.parametrize("name", BACKBONES)
def test_state_holds_prefix_tokens_and_flags(name: str, on_prune: str) -> None:
    environment, backbone = make_env(name, on_prune=on_prune), toy(name)
    environment.reset(seed=0)
    state = environment.state()
    for _, _, (*_, infos) in rollout(environment, 1):
        state = environment.state()
        assert environment.state_space.contains(state)
        table = state.reshape(backbone.num_prefix + backbone.num_patches, backbone.embed_dim + 1)
        prefix, patches = np.split(table, [backbone.num_prefix])
        assert (prefix[:, -1] == 1).all()
        alive = {agent for agent, info in infos.items() if info["alive"]}
        assert {agent for agent, row in zip(environment.possible_agents, patches, strict=True) if row[-1]} == alive
        assert not patches[patches[:, -1] == 0].any()
        if environment.agents:
            np.testing.assert_array_equal(patches[:, :-1], environment.observation().dense()[0])
            if backbone.has_class_token:
                np.testing.assert_array_equal(prefix[0, :-1], environment.observation().cls[0])
    assert state.any() or not backbone.num_prefix


def test_pettingzoo_state_test() -> None:
    options: dict[str, Any] = {"backbone": toy(CLASS_TOKEN), "dataset": images_for(CLASS_TOKEN)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="Environment's (minimum|maximum) state space value is -?infinity")
        state_test(env(**options), parallel_env(**options))


def test_spaces_are_the_same_objects_and_observations_lie_in_them() -> None:
    environment = make_env()
    observations, infos = environment.reset(seed=0)
    assert list(observations) == list(infos) == environment.possible_agents
    assert environment.possible_agents[0] == "token_0"
    for agent, row in observations.items():
        assert environment.observation_space(agent) is environment.observation_space(agent)
        assert environment.action_space(agent) is environment.action_space(agent)
        assert environment.observation_space(agent).contains(row)
    seeds = [environment.action_space(agent).seed(0) for agent in ("token_0", "token_1")]
    assert len(seeds) == 2
    assert environment.action_space("token_0") is not environment.action_space("token_1")


def test_observations_are_read_only_views_of_one_array() -> None:
    environment = make_env()
    observations, _ = environment.reset(seed=0)
    assert observations["token_0"].base is observations["token_1"].base
    with pytest.raises(ValueError, match="read-only"):
        observations["token_0"][0] = 1


def test_numpy_and_bool_actions_count() -> None:
    def play_once(kind: Any) -> list[float]:
        environment = make_env()
        environment.reset(seed=0)
        return list(environment.step({agent: kind(i % 2) for i, agent in enumerate(environment.agents)})[1].values())

    assert play_once(np.int64) == play_once(bool) == play_once(int) == play_once(np.int32)


def test_the_end_and_the_beginning() -> None:
    environment = make_env()
    assert environment.agents == []
    assert environment.step({}) == ({}, {}, {}, {}, {})
    for call in (environment.state, environment.render, environment.observation, environment.outcome):
        with pytest.raises(RuntimeError, match=r"no game|not ended"):
            call()
    environment.reset(seed=0)
    with pytest.raises(RuntimeError, match="not ended yet"):
        environment.outcome()
    total(environment, 0)
    assert environment.outcome().logits.shape == (1, 7)
    assert environment.actions_from(RandomDrop(0.5)) == {}


@pytest.mark.parametrize("on_prune", PRUNE_MODES)
@pytest.mark.parametrize(
    "policy", [RandomDrop(0.6, seed=3), TopK(0.6), EViT(0.6, fuse=False)], ids=lambda p: type(p).__name__
)
def test_a_policy_plays_the_same_through_pettingzoo(policy: Any, on_prune: str) -> None:
    environment = make_env(needs=policy.needs, on_prune=on_prune)
    environment.reset(options={"index": 3})
    theirs = copy.deepcopy(policy)
    while environment.agents:
        environment.step(environment.actions_from(policy))
    game = TokenGame(toy(CLASS_TOKEN), needs=policy.needs)
    outcome = play(game, theirs, *images_for(CLASS_TOKEN)[3:4]).outcome
    assert torch.equal(environment.outcome().alive, outcome.alive)
    assert torch.equal(environment.outcome().n_kept, outcome.n_kept)
    assert torch.equal(environment.outcome().logits, outcome.logits)


def test_a_policy_is_reset_once_per_episode() -> None:
    calls = []

    class Counting(BasePolicy):
        def reset(self, batch_size: int, num_agents: int) -> None:
            calls.append((batch_size, num_agents))

        def decide(self, obs: Observation) -> Decision:
            return Decision(keep=obs.alive)

    environment = make_env()
    for episode in range(2):
        environment.reset(seed=episode)
        while environment.agents:
            environment.step(environment.actions_from(Counting()))
    assert calls == [(1, 16), (1, 16)]


def test_policies_that_do_not_fit_are_refused_readably() -> None:
    class Shapeless(BasePolicy):
        def decide(self, obs: Observation) -> Decision:
            return Decision(keep=obs.alive[0])

    environment = make_env(needs=frozenset({"cls_attention"}))
    environment.reset(seed=0)
    with pytest.raises(ValueError, match=r"EViT cannot play .* merges 5 tokens; use vitprune_env\.play"):
        environment.actions_from(EViT(0.6))
    with pytest.raises(DecisionError, match="keep: expected shape"):
        environment.actions_from(Shapeless())
    plain = make_env()
    plain.reset(seed=0)
    with pytest.raises(EvidenceError, match="cls_attention"):
        plain.actions_from(TopK(0.5))


def test_bad_actions_are_refused_by_name() -> None:
    environment = make_env()
    environment.reset(seed=0)
    good: dict[str, Any] = dict.fromkeys(environment.agents, 1)
    with pytest.raises(ValueError, match="token_5 is missing"):
        environment.step({agent: 1 for agent in good if agent != "token_5"})
    with pytest.raises(ValueError, match="patch_5 was never in the game"):
        environment.step(good | {"patch_5": 1})
    for bad in (2, -1, 0.5, None, "keep"):
        with pytest.raises(ValueError, match=r"expected 0 .* or 1 .* for token_7"):
            environment.step(good | {"token_7": bad})
    environment.step(good)  # nothing has happened so far
    assert len(environment.game.steps) == 1


@pytest.mark.parametrize("sent", [0, 1, -1, None])
def test_actions_of_agents_that_have_left_are_ignored(sent: Any) -> None:
    """TorchRL, BenchMARL and AgileRL send an action for every agent in every step."""

    def second_step(actions: dict[str, Any]) -> Any:
        environment = make_env(on_prune="terminate")
        environment.reset(seed=0)
        environment.step(dict.fromkeys(environment.agents, 1) | {"token_2": 0})
        return environment.step({**dict.fromkeys(environment.agents, 1), "token_3": 0, **actions})

    observations, rewards, *others = second_step({"token_2": sent})
    without_observations, without_rewards, *without = second_step({})
    assert "token_2" not in rewards
    assert (rewards, others) == (without_rewards, without)
    np.testing.assert_equal(observations, without_observations)
    with pytest.raises(ValueError, match="patch_2 was never in the game"):
        second_step({"patch_2": 1})


def test_torchrls_masked_mode() -> None:
    envs = pytest.importorskip("torchrl.envs")
    wrapped = envs.PettingZooWrapper(make_env(on_prune="terminate"), use_mask=True, done_on_any=False)
    envs.check_env_specs(wrapped)


def test_bad_arguments_are_refused() -> None:
    backbone = toy(CLASS_TOKEN)
    with pytest.raises(ValueError, match=r"on_prune: expected one of .*, got 'leave'"):
        make_env(on_prune="leave")
    with pytest.raises(ValueError, match=r"render_mode: expected None or one of .*, got 'video'"):
        make_env(render_mode="video")
    with pytest.raises(ValueError, match=r"dataset: .* empty dataset"):
        parallel_env(backbone, cast(Any, []))
    with pytest.raises(ValueError, match="index: expected 0 to 11, got 12"):
        make_env().reset(options={"index": 12})
    with pytest.raises(ValueError, match="index: expected 0 to 11, got -1"):
        make_env().reset(options={"index": -1})


@pytest.mark.parametrize(
    ("item", "error", "message"),
    [
        ((torch.zeros(3, 32, 32), 0), ValueError, r"images: expected shape \[B, 3, 64, 64\], got \[1, 3, 32, 32\]"),
        ((torch.zeros(1, 64, 64), 0), ValueError, r"images: expected shape"),
        ((torch.zeros(3, 64, 64, dtype=torch.uint8), 0), TypeError, "floating-point"),
        ((torch.zeros(3, 64, 64), 7), ValueError, "labels: expected 0 to 6, got 7"),
        ((np.zeros((3, 64, 64)), 0), TypeError, "dataset: expected items"),
        (torch.zeros(3, 64, 64), TypeError, "dataset: expected items"),
    ],
)
def test_images_that_do_not_fit_are_refused(item: Any, error: type[Exception], message: str) -> None:
    environment = parallel_env(toy(CLASS_TOKEN), cast(Any, [item]))
    with pytest.raises(error, match=message):
        environment.reset()
    assert environment.agents == []


def test_registered_with_pettingzoo_once() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        register_envs()
        register_envs()
        options: dict[str, Any] = {"backbone": toy(CLASS_TOKEN), "dataset": images_for(CLASS_TOKEN)}
        made = pettingzoo.make("parallel", ENV_ID, on_prune="terminate", **options)
        turns = pettingzoo.make("aec", ENV_ID, **options)
    assert isinstance(made, TokenPruningEnv)
    assert made.on_prune == "terminate"
    assert isinstance(turns, pettingzoo.AECEnv)
    assert str(made) == str(turns) == "token_pruning_v0"


def test_pettingzoo_without_a_registry_is_no_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before 1.27 it has none."""
    for name in ("register", "make", "aec_registry", "parallel_registry"):
        monkeypatch.delattr(pettingzoo, name, raising=False)
    monkeypatch.delitem(gymnasium.registry, ENV_ID)
    register_envs()
    assert ENV_ID in gymnasium.registry
    assert env(backbone=toy(CLASS_TOKEN), dataset=images_for(CLASS_TOKEN)).possible_agents


@pytest.mark.parametrize(
    ("sizes", "words"),
    [({}, r"images \[3, 64, 64\] of up to 7"), ({"img_size": 40, "patch_size": 8}, r"images \[3, 40, 40\] of up to 7")],
)
def test_a_network_that_the_built_in_task_does_not_fit_needs_a_dataset(sizes: dict[str, int], words: str) -> None:
    for make in (parallel_env, SingleAgentEnv):
        with pytest.raises(ValueError, match=f"dataset: expected {words} classes for VisionTransformer, got None"):
            make(make_model(CLASS_TOKEN, **sizes))


def test_device_moves_the_backbone_and_sites_are_passed_on() -> None:
    environment = make_env(sites=("2.attn", 3), device="cpu")
    assert [site.label for site in environment.game.sites] == ["2.attn", "3"]


def test_built_in_environment_as_in_its_docstring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "BUILT_IN_IMAGES", 8)
    example = (TokenPruningEnv.__doc__ or "").split("Example:")[1].split("Version")[0]
    lines = [line.strip()[4:] for line in example.splitlines() if line.strip()]
    assert len(lines) == 6
    scope = vars(parallel).copy()
    exec("\n".join(lines), scope)
    assert scope["macs"] > 0
    assert scope["env"].game.backbone.name == "vit_digits"
