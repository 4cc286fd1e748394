"""The TorchRL environment plays the game of `TokenGame`; TorchRL's own check, collector and masks accept it."""

# pyright: reportMissingImports=false

from __future__ import annotations

import copy
from typing import Any, cast

import pytest
import torch
from torch import Tensor

pytest.importorskip("torchrl")

from tensordict import TensorDict
from torchrl.collectors import Collector
from torchrl.envs import EnvBase, SerialEnv
from torchrl.envs.utils import check_env_specs

from envs import images_for
from helpers import toy
from stay_drop_wait import StayDropWait
from vitprune_env.envs.actions import ActionKind, action_kind
from vitprune_env.envs.vector import TokenVectorEnv
from vitprune_env.game.rewards import SharedOutcome, log_probability
from vitprune_env.game.token_game import TokenGame
from vitprune_env.integrations.torchrl import TokenEnv

NAME = "vit_tiny_patch16_224"
KINDS = (*map(action_kind, ("keep", "keep_or_fuse", "drop_merge_keep", "merge")), StayDropWait())
IMAGES, STEPS = 4, 3


def new_game(kind: ActionKind) -> TokenGame:
    reward = SharedOutcome(price=0.1, outcome=log_probability)
    return TokenGame(toy(NAME), (1, 2, 3), reward, needs=kind.needs, attention_bias=kind.attention_bias)


def make(kind: ActionKind = KINDS[0], state: bool = False) -> TokenEnv:
    data = cast(Any, images_for(NAME))
    return TokenEnv(TokenVectorEnv(new_game(kind), data, IMAGES, action_space=kind), state)


def seeded(seed: int, env: EnvBase | None = None) -> EnvBase:
    env = make() if env is None else env
    env.set_seed(seed)
    return env


def rollout(env: EnvBase, steps: int = STEPS, seed: int = 0) -> TensorDict:
    """Random actions, which TorchRL draws from the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return cast(TensorDict, env.rollout(steps, break_when_any_done=False))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("state", [False, True], ids=["", "state"])
def test_torchrls_own_check_passes(kind: ActionKind, state: bool) -> None:
    check_env_specs(make(kind, state), seed=0)
    check_env_specs(make(kind, state), break_when_any_done="both")


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_it_is_the_game_of_token_game(kind: ActionKind) -> None:
    env = make(kind, state=True)
    indices = [5, 1, 8, 2]
    start = env.reset(options={"indices": indices})
    played = cast(TensorDict, env.rollout(STEPS, auto_reset=False, tensordict=start))
    game, (images, labels) = new_game(kind), images_for(NAME)[indices]
    obs: Any = game.reset(images, labels)
    info: dict[str, Any] = {}
    for step in range(STEPS):
        seen = played[:, step]
        torch.testing.assert_close(obs.gather(seen["tokens", "observation"]), obs.tokens)
        assert torch.equal(seen["tokens", "mask"], obs.present)
        assert torch.equal(seen["state"].unflatten(1, (-1, obs.tokens.shape[1] + 1))[:, 1:, -1] == 1, obs.present)
        obs, reward, _, _, info = game.step(kind.decision(seen["tokens", "action"], obs))
        torch.testing.assert_close(seen["next", "tokens", "reward"].squeeze(-1), reward)
    alive = info["alive"] | info.get("parked", False)
    assert torch.equal(played["next", "tokens", "mask"][:, -1], alive)
    assert not played["next", "tokens", "observation"][:, -1].any()
    outcome, found = game.outcome(), played["next", "outcome"]
    assert torch.equal(found["correct"][:, -1, 0], cast(Tensor, outcome.correct))
    assert torch.equal(found["macs"][:, -1, 0], outcome.macs)
    assert torch.equal(found["n_kept"][:, -1], outcome.n_kept)
    assert not any(found[name][:, :-1].any() for name in ("correct", "macs", "n_kept"))


def test_all_agents_and_games_end_together_and_other_images_follow() -> None:
    played = rollout(seeded(0), 2 * STEPS)
    ends = torch.tensor([False, False, True] * 2)
    for name in ("done", "terminated"):
        assert torch.equal(played["next", name].squeeze(-1), ends.expand(IMAGES, -1))
        assert torch.equal(played["next", "tokens", name].all(dim=2).squeeze(-1), ends.expand(IMAGES, -1))
        assert torch.equal(played["next", "tokens", name].any(dim=2).squeeze(-1), ends.expand(IMAGES, -1))
    assert played["tokens", "mask"][:, STEPS].all()
    assert not torch.equal(played["tokens", "observation"][:, 0], played["tokens", "observation"][:, STEPS])


def test_the_seed_decides_which_images_are_played() -> None:
    first, again, other = (rollout(seeded(seed), 2 * STEPS) for seed in (3, 3, 4))
    assert (first == again).all()
    assert not torch.equal(first["tokens", "observation"], other["tokens", "observation"])
    env = seeded(3)
    rollout(env)
    later = rollout(env)
    assert not torch.equal(later["tokens", "observation"][:, 0], first["tokens", "observation"][:, 0])
    assert (rollout(seeded(3, env), 2 * STEPS) == first).all()
    before = torch.get_rng_state()
    seeded(0).reset()
    assert torch.equal(torch.get_rng_state(), before)


def test_environments_side_by_side_play_different_images() -> None:
    env = SerialEnv(2, [make, make])
    env.set_seed(0)
    first, second = rollout(env)["tokens", "observation"][:, :, 0]
    assert not torch.equal(first, second)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_masks_leave_pruned_tokens_one_action_and_random_actions_obey_them(kind: ActionKind) -> None:
    tokens = rollout(make(kind), 2 * STEPS)["tokens"]
    alive, allowed, chosen = tokens["mask"], tokens["action_mask"], tokens["action"]
    assert not alive.all()
    assert allowed.gather(-1, chosen[..., None]).all()
    assert allowed[..., 0].all()
    assert not allowed[~alive][:, 1:].any()
    own = kind.mask(alive.flatten(0, 1))
    assert torch.equal(allowed[alive], torch.ones_like(allowed[alive]) if own is None else own[alive.flatten(0, 1)])


def test_what_was_given_out_does_not_change_later() -> None:
    env = seeded(0)
    first = env.rand_action(env.reset())
    kept = copy.deepcopy(first)
    env.step(first)
    assert (first.select(*kept.keys(True, True)) == kept).all()


def test_some_of_the_games_cannot_begin_anew() -> None:
    env = make()
    started = env.reset()
    asked = torch.zeros(IMAGES, 1, dtype=torch.bool)
    asked[0] = True
    with pytest.raises(ValueError, match="expected all 4 games, which end together, got 1"):
        env.reset(started.set("_reset", asked))


def test_a_collector_goes_on_across_the_end_of_games() -> None:
    collector = Collector(make, None, frames_per_batch=4 * IMAGES, total_frames=8 * IMAGES)
    ends = torch.cat([batch["next", "done"][0, :, 0] for batch in collector])
    assert ends.tolist() == [False, False, True, False, False, True, False, False]


def test_the_example_trains() -> None:
    from vitprune_env.examples.frameworks import torchrl_mappo

    network = torchrl_mappo.train(iterations=2, images=8)
    assert network(torch.zeros(5, 48)).shape == (5, 2)
