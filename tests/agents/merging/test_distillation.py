"""A merging policy read off a network: reproducible, without labels, at its budget, better than the mean."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from games import NAME, OwnLabels
from helpers import toy
from merging import FEW, random_merging
from vitprune_env import load_backbone
from vitprune_env.agents import MergePolicy, distilled_policy
from vitprune_env.agents.merging import distillation
from vitprune_env.agents.merging.distillation import Scheduled
from vitprune_env.data import Digits
from vitprune_env.errors import BudgetError
from vitprune_env.game.rollout import play
from vitprune_env.game.token_game import TokenGame
from vitprune_env.types import Decision, Observation

DATA = OwnLabels(40)
HEADLESS = "vit_medium_patch16_gap_240"


@pytest.fixture(autouse=True)
def one_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """One schedule instead of three, less finely searched, to save time."""
    monkeypatch.setattr(distillation, "SHAPES", (1.0,))
    monkeypatch.setattr(distillation, "HALVINGS", 9)


def share_of(policy: MergePolicy, name: str, data: OwnLabels) -> float:
    """What a policy costs on the images that its schedule was chosen on, as a share of dense."""
    chosen = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[-FEW.schedule_images :]
    game = TokenGame.for_policy(toy(name), policy)
    return float(play(game, policy, data.images[chosen]).outcome.macs.mean()) / game.cost.dense()


class Unlabelled(OwnLabels):
    """Labels that nobody may read."""

    def batch(self, indices: Tensor) -> tuple[Tensor, Any]:
        return self.images[indices], NotImplemented


def test_the_same_seed_gives_the_same_policy_at_its_budget_and_no_label_is_read() -> None:
    one = distilled_policy(toy(NAME), DATA, 0.6, settings=FEW)
    torch.manual_seed(7)  # a global stream that nobody asks
    two = distilled_policy(toy(NAME), Unlabelled(40), 0.6, settings=FEW)
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name]), name
    assert [site.label for site in one.sites or ()] == ["1.attn", "2.attn", "3.attn", "4.attn"]
    assert one.info == {
        "backbone": NAME,
        "target_macs": 0.6 * TokenGame(toy(NAME)).cost.dense(),
        "seed": 0,
        "algorithm": "distillation",
    }
    assert share_of(one, NAME, DATA) == pytest.approx(0.6, rel=0.03)
    assert bool((one.actor.weight[:, :2] > 0).all())
    assert bool((one.actor.weight[:, 2:] == 0).all())


@pytest.mark.parametrize(("name", "share"), [(NAME, 0.85), (HEADLESS, 0.8)])
def test_after_blocks_and_without_a_class_token(name: str, share: float) -> None:
    data = OwnLabels(40, name)
    policy = distilled_policy(toy(name), data, share, sites=(1, 3), settings=FEW, seed=0)
    assert policy.actor.num_features == (6 if toy(name).has_class_token else 5)
    assert [site.label for site in policy.sites or ()] == ["1", "3"]
    assert share_of(policy, name, data) == pytest.approx(share, rel=0.03)


class LateAttention:
    """Standardised tokens after block 3, and what the class token attends to in the last third of the blocks."""

    def __init__(self, images: Tensor) -> None:
        backbone = load_backbone("vit_digits")
        game = TokenGame(backbone, (3, "7.attn", "8.attn"), needs=frozenset({"cls_attention"}))
        obs: Observation | None = game.reset(images)
        seen = []
        while obs is not None:
            seen.append(obs)
            obs = game.step(Decision(keep=obs.alive, count=obs.count))[0]
        attention = sum(each.evidence["cls_attention"].view(len(images), -1) for each in seen[1:])
        assert isinstance(attention, Tensor)
        self.target = (attention / attention.mean(dim=1, keepdim=True) + 1e-3).log().flatten()
        self.tokens = F.layer_norm(seen[0].tokens, seen[0].tokens.shape[1:])


def test_the_look_predicts_late_attention_of_other_images() -> None:
    backbone, data = load_backbone("vit_digits"), Digits("train", size=40)
    rows = iter([data.batch(range(32))[0]])
    look = distillation._fitted_look(backbone, rows, TokenGame(backbone, (3,)).sites)[0]
    held_out = LateAttention(data.batch(range(32, 40))[0])
    error = held_out.tokens @ look[:-1] + look[-1] - held_out.target
    spread = held_out.target - held_out.target.mean()
    assert 1 - float(error.square().mean() / spread.square().mean()) > 0.3


def test_a_schedule_is_played_and_then_deployed_alike() -> None:
    """4 images of 25 tokens: 20, 16, 16 and 2.5 to be left of each, on average; the last cannot be reached."""
    backbone = toy(NAME)
    policy, images = random_merging(backbone), DATA.images[:4]
    game = TokenGame.for_policy(backbone, policy)
    played = play(game, Scheduled(policy, (20.0, 16.0, 17.0, 2.5), FEW), images).outcome
    totals = played.n_kept.sum(dim=0).tolist()
    assert totals[:3] == [80, 64, 64]
    assert totals[3] == int((played.n_kept[:, 2] - played.n_kept[:, 2] // 2).sum()), "all pairs"
    assert torch.equal(play(game, policy, images).outcome.n_kept, played.n_kept)
    assert float(policy.actor.deviation[0, 4]) == 1.0, "all tokens are alive at the first site"


def test_what_merging_cannot_meet_is_refused_by_name() -> None:
    expected = r"share: expected 0\.[67]\d* \(every pair merges at 2 sites.* to 1, got 0\.5"
    with pytest.raises(BudgetError, match=expected):
        distilled_policy(toy(NAME), DATA, 0.5, sites=(2, 3), settings=FEW)
    with pytest.raises(BudgetError, match=r"to 1, got 1\.2"):
        distilled_policy(toy(NAME), DATA, 1.2, settings=FEW)
    with pytest.raises(ValueError, match=re.escape("sites: expected blocks 1 to 4, got '9'")):
        distilled_policy(toy(NAME), DATA, 0.5, sites=(9,), settings=FEW)
    with pytest.raises(ValueError, match="data: expected at least one image"):
        distilled_policy(toy(NAME), OwnLabels(0), 0.5, settings=FEW)
    with pytest.raises(TypeError, match="data: expected images with a length"):
        distilled_policy(toy(NAME), iter([]), 0.5, settings=FEW)  # pyright: ignore[reportArgumentType]
