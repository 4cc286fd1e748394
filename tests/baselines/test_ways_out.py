"""Ways out as a parameter of methods that choose tokens: where tokens end up, what it costs, files, names, budgets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from helpers import random_images, toy
from vitprune_env import PrunedViT, TokenGame, baselines, check_policy, load_policy, play, save_policy
from vitprune_env.baselines import Brightness, EViT, RandomDrop, TokenScores, TopK, TriLevel, calibrate, parsed
from vitprune_env.benchmarking.contestants import Task, of_method
from vitprune_env.benchmarking.prepared import PreparedImages
from vitprune_env.errors import ParameterError
from vitprune_env.types import Observation, Site

NAME = "deit_tiny_patch16_224"
KEYS = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 2.0]])
WAYS = pytest.mark.parametrize("leave", ["merge", "fuse"])
CHOOSING: dict[str, Any] = {
    "random": lambda **more: RandomDrop(0.5, **more),
    "topk": lambda **more: TopK(0.5, **more),
    "evit": lambda **more: EViT(0.5, **more),
    "tri_level": lambda **more: TriLevel(0.5, **more),
    "brightness": lambda **more: Brightness(0.5, **more),
    "distilled_attention": lambda **more: TokenScores(0.0, embed_dim=48, **more),
}
every = pytest.mark.parametrize("name", CHOOSING)


def seen() -> Observation:
    """One image of four tokens with the keys above; class attention and brightness prefer tokens 0 and 2."""
    scores = torch.tensor([0.4, 0.1, 0.3, 0.2])
    return Observation(
        tokens=torch.zeros(4, 3),
        image=torch.zeros(4, dtype=torch.int64),
        token=torch.arange(4),
        offsets=torch.tensor([0, 4]),
        cls=torch.zeros(1, 3),
        alive=torch.ones(1, 4, dtype=torch.bool),
        size=torch.tensor([[1.0, 3.0, 1.0, 1.0]]),
        order=torch.arange(4)[None],
        position=torch.zeros(4, 2),
        site=Site(2),
        step=0,
        num_steps=1,
        depth=1,
        evidence={"keys": KEYS, "cls_attention": scores, "brightness": scores},
        count=4,
    )


@pytest.mark.parametrize("policy", [TopK(0.5), EViT(0.5), Brightness(0.5)], ids=["topk", "evit", "brightness"])
def test_the_others_merge_or_are_fused(policy: Any) -> None:
    merged = policy.leaving("merge").decide(seen())
    assert merged.keep.tolist() == [[True, False, True, False]]
    assert merged.merge_into.tolist() == [[0, 0, 2, 2]], "1 is most like 0, and 3 most like 2"
    assert torch.allclose(merged.weight, torch.tensor([[1 / 4, 3 / 4, 1 / 2, 1 / 2]]))
    assert merged.macs.tolist() == [2 * 2 * 2], "two leave, two stay, keys of width two"
    assert merged.count == 2
    fused = policy.leaving("fuse").decide(seen())
    assert fused.merge_into.tolist() == [[0, 1, 2, 1]]
    assert torch.allclose(fused.weight, torch.tensor([[1, 3 / 4, 1, 1 / 4]]))
    assert (fused.macs, fused.count) == (None, 3)
    biases = [policy.leaving(leave).attention_bias for leave in ("drop", "merge", "fuse")]
    assert biases == [None, "log_size", "log_size"], "a token counts as often as its patches"


def test_the_macs_of_choice_and_way_out_add_up() -> None:
    """A network of width 3 and one hidden unit costs 3 * 1 + 1 per token; merging two of four 2 * 2 * 2."""
    policy = TokenScores(0.0, embed_dim=3, leave="merge")
    decision = policy.decide(seen())
    stays = int(decision.keep.sum())
    assert decision.macs is not None
    assert decision.macs.tolist() == [4 * 4 + (4 - stays) * stays * 2]


@every
@WAYS
def test_it_keeps_the_contract_counts_its_macs_and_survives_a_file(name: str, leave: Any, tmp_path: Path) -> None:
    backbone = toy(NAME)
    policy, images = CHOOSING[name](leave=leave), random_images(backbone, 3)
    check_policy(policy, backbone, images, deterministic=name != "random")
    game = TokenGame.for_policy(backbone, policy, sites=(1, 2))
    with FlopCounterMode(display=False) as counter:
        outcome = play(game, policy, images).outcome
    executed, width = counter.get_total_flops() // 2, backbone.embed_dim // backbone.num_heads
    if leave == "merge":  # similarities of all pairs are computed at once; counted are those of leaving to kept tokens
        starts = torch.cat([torch.full((3, 1), backbone.num_patches), outcome.n_kept[:, :-1]], dim=1)
        needed = ((starts - outcome.n_kept) * outcome.n_kept * width).sum()
        executed += int(needed) - 2 * 3 * backbone.num_patches**2 * width
    assert executed == int(outcome.macs.sum())
    plain = play(TokenGame.for_policy(backbone, CHOOSING[name](), sites=(1, 2)), CHOOSING[name](), images).outcome
    assert not torch.equal(outcome.logits, plain.logits)
    again = load_policy(save_policy(CHOOSING[name](leave=leave), tmp_path / "policy.safetensors"))
    assert again.leave == leave
    assert again.needs == policy.needs
    fresh = CHOOSING[name](leave=leave)
    with torch.no_grad():
        assert torch.equal(PrunedViT(backbone, again)(images), PrunedViT(backbone, fresh)(images))


def test_none_is_lost_where_tokens_merge() -> None:
    backbone, policy = toy(NAME), RandomDrop(0.5, leave="merge")
    outcome = play(TokenGame.for_policy(backbone, policy, sites=(1, 2)), policy, random_images(backbone, 2)).outcome
    assert outcome.size.sum(dim=1).tolist() == [backbone.num_patches] * 2


@WAYS
def test_by_name_at_a_budget(leave: str) -> None:
    backbone = toy(NAME)
    images = random_images(backbone, 8)
    batches = [(images, torch.zeros(8, dtype=torch.int64))]
    target = 0.7 * TokenGame(backbone).cost.dense() / 1e9
    method, parameters = parsed(f"topk:leave={leave}")
    policy = calibrate(method.name, target, backbone, batches, sites=(1, 2), **parameters)
    assert isinstance(policy, TopK)
    assert policy.leave == leave
    outcome = play(TokenGame.for_policy(backbone, policy, sites=(1, 2)), policy, images).outcome
    assert float(outcome.macs.mean()) / 1e9 == pytest.approx(target, rel=0.1)
    prepared = PreparedImages(backbone, batches)
    task = Task(backbone, prepared, prepared, sites=(1, 2), seeds=2)
    first, second = of_method("mine", f"random:leave={leave}")[0].at(task, target)
    assert isinstance(first, RandomDrop)
    assert isinstance(second, RandomDrop)
    assert (first.leave, first.seed, second.seed) == (leave, 0, 1)


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="leave: expected one of drop, merge, fuse, got 'melt'"):
        RandomDrop(0.5, leave="melt")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="leave: expected one of drop, merge, fuse, got 'melt'"):
        parsed("topk:leave=melt")
    with pytest.raises(ParameterError, match="leave: no parameter of 'tome'"):
        baselines.make("tome", r=2, leave="merge")
