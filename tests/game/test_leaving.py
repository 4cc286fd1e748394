"""Ways out of the game: where tokens end up that merge or are fused, with which weights, at what cost."""

from __future__ import annotations

import torch
from torch import Tensor

from helpers import random_images, random_keeps, toy
from vitprune_env.game.leaving import fuse_leavers, merge_leavers
from vitprune_env.game.token_game import TokenGame
from vitprune_env.types import Observation, Site

KEYS = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 2.0], [-1.0, 0.0]])


def seen(alive: list[bool], size: list[float]) -> Observation:
    """One image of five tokens with the keys above, of which some are alive."""
    flags = torch.tensor([alive])
    token = flags[0].nonzero().squeeze(1)
    return Observation(
        tokens=torch.zeros(len(token), 3),
        image=torch.zeros_like(token),
        token=token,
        offsets=torch.tensor([0, len(token)]),
        cls=torch.zeros(1, 3),
        alive=flags,
        size=torch.tensor([size], dtype=torch.float32) * flags,
        order=(flags.long().cumsum(dim=1) - 1).masked_fill(~flags, -1),
        position=torch.zeros(5, 2),
        site=Site(2),
        step=0,
        num_steps=1,
        depth=1,
        evidence={"keys": KEYS[token]},
    )


def flags(*tokens: int) -> Tensor:
    """`[1, 5]` bool, true for these tokens."""
    return torch.zeros(1, 5, dtype=torch.bool).index_fill(1, torch.tensor(tokens, dtype=torch.int64), True)


def test_leavers_merge_into_the_most_similar_kept_token_by_size() -> None:
    decision = merge_leavers(seen([True] * 5, [1, 3, 1, 1, 1]), flags(0, 2))
    assert decision.merge_into is not None
    assert decision.weight is not None
    assert decision.macs is not None
    # 1 is most like 0, 3 most like 2; the last has a similarity of -1 to 0 and 0 to 2
    assert decision.merge_into.tolist() == [[0, 0, 2, 2, 2]]
    assert torch.allclose(decision.weight, torch.tensor([[1 / 4, 3 / 4, 1 / 3, 1 / 3, 1 / 3]]))
    assert decision.keep.tolist() == flags(0, 2).tolist()
    assert decision.macs.tolist() == [3 * 2 * 2], "three leave, two stay, keys of width two"


def test_some_leavers_are_dropped_and_the_dead_stay_dead() -> None:
    decision = merge_leavers(seen([True, True, True, True, False], [1] * 5), flags(0, 2, 4), merges=flags(1, 4))
    assert decision.merge_into is not None
    assert decision.macs is not None
    assert decision.merge_into.tolist() == [[0, 0, 2, -1, -1]]
    assert decision.keep.tolist() == flags(0, 2).tolist()
    assert decision.macs.tolist() == [1 * 2 * 2]


def test_where_none_is_kept_all_are_dropped() -> None:
    decision = merge_leavers(seen([True] * 5, [1] * 5), flags())
    assert decision.merge_into is not None
    assert decision.merge_into.tolist() == [[-1] * 5]
    assert not decision.keep.any()


def test_leavers_are_fused_in_the_place_of_the_first() -> None:
    decision = fuse_leavers(seen([True, True, True, True, False], [1, 2, 1, 6, 1]), flags(0, 2))
    assert decision.merge_into is not None
    assert decision.weight is not None
    assert decision.merge_into.tolist() == [[0, 1, 2, 1, -1]]
    assert decision.keep.tolist() == flags(0, 1, 2).tolist(), "the fused token stays in the game"
    assert torch.allclose(decision.weight[0, :4], torch.tensor([1, 2 / 8, 1, 6 / 8]))


def test_fusing_nothing_changes_nothing() -> None:
    decision = fuse_leavers(seen([True] * 5, [1] * 5), flags(0, 1, 2, 3, 4))
    assert decision.merge_into is not None
    assert decision.merge_into.tolist() == [[0, 1, 2, 3, 4]]


def test_no_patch_is_lost_in_a_game_of_merging_and_fusing() -> None:
    backbone = toy("deit_tiny_patch16_224")
    game = TokenGame(backbone, (1, 2, 3), needs=frozenset({"keys"}), attention_bias="log_size")
    keeps = random_keeps(3, 4, game.num_agents, seed=1, least=1)
    obs = game.reset(random_images(backbone, 4))
    for step, keep in enumerate(keeps):
        assert obs is not None
        kept = keep & obs.alive
        kept[:, 0] |= obs.alive[:, 0]  # so that there is always one to merge into
        kept |= obs.alive & ~kept.any(dim=1, keepdim=True)
        obs = game.step(fuse_leavers(obs, kept) if step == 1 else merge_leavers(obs, kept))[0]
    outcome = game.outcome()
    assert (outcome.source >= 0).all()
    assert outcome.size.sum(dim=1).tolist() == [game.num_agents] * 4
