"""RL4EViT, Eq. 1 and 2, and the shared outcome, against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from helpers import Fixed, keeps_to_decisions, random_images, random_keeps, toy
from vitprune_env.game.rewards import (
    PaperCodeReward,
    PaperReward,
    RewardFn,
    SharedOutcome,
    correct,
    log_probability,
    margin,
    probability,
)
from vitprune_env.game.rollout import play
from vitprune_env.game.token_game import TokenGame
from vitprune_env.policy import KeepAll
from vitprune_env.types import Site, Step

# Two images of four tokens, two steps. Image 0 is classified correctly, image 1 is not.
ACTED = [[[1, 1, 1, 1], [1, 1, 1, 1]], [[1, 1, 0, 0], [1, 1, 1, 0]]]
KEPT = [[[1, 1, 0, 0], [1, 1, 1, 0]], [[1, 0, 0, 0], [0, 0, 0, 0]]]
GAMMA = torch.tensor([1.0, 0.0])


def steps(shares: tuple[float, float] = (0.25, 0.5)) -> list[Step]:
    """The two steps above."""
    return [
        Step(Site.parse(number), torch.tensor(ACTED[i]).bool(), torch.tensor(KEPT[i]).bool(), shares[i])
        for i, number in enumerate((1, 2))
    ]


def total(reward: RewardFn, score: Tensor = GAMMA) -> Tensor:
    """Everything paid, `[T, B, N]`."""
    played = steps()
    return torch.stack([reward.immediate(step) for step in played]) + reward.deferred(played, score)


def test_paper_reward_by_hand() -> None:
    """R = -keep_cost + outcome_bonus gamma N / n for the kept, 0 for the pruned."""
    expected = [
        [[-0.3 + 0.2 * 4 / 2, -0.3 + 0.2 * 4 / 2, 0, 0], [-0.3, -0.3, -0.3, 0]],
        [[-0.3 + 0.2 * 4 / 1, 0, 0, 0], [0, 0, 0, 0]],
    ]
    found = total(PaperReward(keep_cost=0.3, outcome_bonus=0.2))
    torch.testing.assert_close(found, torch.tensor(expected))


def test_printed_form_is_the_scaled_one_over_n() -> None:
    """As printed: alpha r1 + beta r2, r1 = -1 if kept, r2 = gamma / n for the kept; so beta = outcome_bonus N."""
    alpha, beta, agents = 0.3, 0.8, 4
    found = total(PaperReward(keep_cost=alpha, outcome_bonus=beta / agents))
    torch.testing.assert_close(total(PaperReward(keep_cost=alpha, outcome_bonus=beta, scaled=False)), found)
    for step, played in enumerate(steps()):
        for image in range(2):
            kept = played.kept[image]
            n = int(kept.sum())
            for agent in range(agents):
                r1 = -1.0 if kept[agent] else 0.0
                r2 = float(GAMMA[image]) / n if kept[agent] else 0.0
                assert float(found[step, image, agent]) == pytest.approx(alpha * r1 + beta * r2)


def test_as_printed_every_agent_that_decides_is_paid() -> None:
    """Eq. 1: R = -alpha for the kept, plus beta gamma / n for all who decide, n being 2 and then 1."""
    alpha, beta = 0.3, 0.8
    expected = [
        [[-0.3 + 0.4, -0.3 + 0.4, 0.4, 0.4], [-0.3, -0.3, -0.3, 0]],
        [[-0.3 + 0.8, 0.8, 0, 0], [0, 0, 0, 0]],
    ]
    reward = PaperReward(keep_cost=alpha, outcome_bonus=beta, scaled=False, pay="all")
    torch.testing.assert_close(total(reward), torch.tensor(expected))
    torch.testing.assert_close(total(reward, torch.ones(2))[1, 1], torch.zeros(4))  # nobody is kept: nobody is paid


def test_paid_to_all_pruning_always_pays_more() -> None:
    """An agent alone among n kept ones: staying costs alpha, and shares the same outcome with one token more."""
    agents, reward = 20, PaperReward(keep_cost=0.2, outcome_bonus=1.0, pay="all")
    acted = torch.ones(1, agents, dtype=torch.bool)
    for kept in range(2, agents + 1):
        pay = []
        for n in (kept, kept - 1):  # the agent `kept - 1` stays, or leaves
            step = Step(Site.parse(1), acted, torch.arange(agents)[None] < n, 1.0)
            pay.append(float((reward.immediate(step) + reward.deferred([step], torch.ones(1))[0])[0, kept - 1]))
        assert pay[0] < pay[1]
    assert reward.equilibrium(1.0, agents) == 0.0
    assert reward.settled(0.5, 1.0, agents) is reward
    with pytest.raises(ValueError, match="pay: expected 'kept' or 'all', got 'some'"):
        PaperReward(pay="some")  # type: ignore[arg-type]


def test_the_reward_of_the_authors_code_by_hand() -> None:
    """r8 = 24 gamma / n for the kept; r9 = -e^d for the kept above the target, -e^-d for those who leave below it."""
    e = 2.718281828459045
    below, above = -(e**0.2), -(e**0.05)  # two and three of four kept, target 0.7
    later, none = -(e**0.24), -(e**0.49)  # one and none of four, target 0.49
    expected = [
        [[12, 12, below, below], [above, above, above, 0]],
        [[24, later, 0, 0], [none, none, none, 0]],
    ]
    torch.testing.assert_close(total(PaperCodeReward()), torch.tensor(expected))
    with pytest.raises(ValueError, match="keep: expected a target for each of 2 sites"):
        total(PaperCodeReward(keep=(0.5,)))


@given(cost=st.floats(0.2, 2.0), bonus=st.floats(0.02, 0.18), gamma=st.floats(0.3, 1.0))
def test_paper_equilibrium(cost: float, bonus: float, gamma: float) -> None:
    """Staying pays exactly as long as the kept fraction is at most gamma outcome_bonus / keep_cost."""
    agents, reward = 1000, PaperReward(keep_cost=cost, outcome_bonus=bonus)
    target = bonus * gamma / cost
    acted = torch.ones(1, agents, dtype=torch.bool)
    for kept in (max(1, int(0.9 * target * agents)), int(1.1 * target * agents) + 1):
        step = Step(Site.parse(1), acted, torch.arange(agents)[None] < kept, 1.0)
        pay = reward.immediate(step) + reward.deferred([step], torch.tensor([gamma]))[0]
        assert float(pay[0, 0]) == pytest.approx(-cost + bonus * gamma * agents / kept, rel=1e-4)
        if int(0.9 * target * agents) >= 1:
            assert (float(pay[0, 0]) > 0) == (kept / agents < target)
        assert (pay[0, kept:] == 0).all()


def test_best_response_dynamics_settle_at_the_equilibrium() -> None:
    """Agents that leave when staying does not pay, and come back when it would, end at N gamma bonus / cost of them."""
    agents, reward = 200, PaperReward(keep_cost=1.0, outcome_bonus=0.6)
    acted, kept = torch.ones(1, agents, dtype=torch.bool), agents
    for _ in range(3 * agents):
        after = [Step(Site.parse(1), acted, torch.arange(agents)[None] < n, 1.0) for n in (kept, kept + 1)]
        staying, joining = (
            float((reward.immediate(step) + reward.deferred([step], torch.ones(1))[0])[0, 0]) for step in after
        )
        kept += int(joining > 0) - int(staying < 0)
    assert kept == pytest.approx(0.6 * agents, abs=1)


def test_shared_outcome_by_hand() -> None:
    """Price times share for the kept; the outcome once to everybody, at the last step in which the agent acted."""
    price = 0.4
    expected = [
        [[-0.1, -0.1, 1, 1], [-0.1, -0.1, -0.1, 0]],
        [[-0.2 + 1, 1, 0, 0], [0, 0, 0, 0]],
    ]
    found = total(SharedOutcome(price=price))
    torch.testing.assert_close(found, torch.tensor(expected))


@given(seed=st.integers(0, 9999), score=st.floats(-2, 2))
def test_shared_outcome_pays_everybody_exactly_once(seed: int, score: float) -> None:
    backbone = toy("deit_tiny_patch16_224")
    keeps = random_keeps(3, 8, 16, seed)
    alive = [torch.ones(8, 16, dtype=torch.bool), *keeps[:-1]]
    played = [Step(Site.parse(i + 1), alive[i], keeps[i], 0.25) for i in range(3)]
    table = SharedOutcome().deferred(played, torch.full((8,), score))
    torch.testing.assert_close(table.sum(dim=0), torch.full((8, 16), score))
    assert not (table.bool() & ~torch.stack(alive)).any(), "nobody is paid after leaving"
    assert backbone.num_patches == 16


def test_price_is_what_one_token_pays_for_the_whole_network() -> None:
    backbone = toy("deit_tiny_patch16_224")
    game = TokenGame(backbone, ("1.attn", 2, "3.attn"), reward=SharedOutcome(price=0.8))
    keeps = [torch.ones(2, 16, dtype=torch.bool)] * 3
    labels = torch.tensor([0, 1])
    episode = play(game, Fixed(keeps_to_decisions(keeps)), random_images(backbone, 2), labels)
    assert [step.share for step in game.steps] == pytest.approx([3 / 8, 1 / 8, 3 / 8])
    assert episode.reward is not None
    paid = episode.reward.sum(dim=0) - episode.outcome.correct[:, None].float()
    torch.testing.assert_close(paid, torch.full((2, 16), -0.8 * 7 / 8))


def test_outcomes() -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 0.0], [-9.0, 9.0]])
    labels = torch.tensor([0, 1, 0])
    assert correct(logits, labels).tolist() == [1.0, 0.0, 0.0]
    expected = [1 - torch.log1p(torch.tensor(-2.0).exp()).item(), 1 - torch.tensor(2.0).log().item(), -1.0]
    assert log_probability(logits, labels).tolist() == pytest.approx(expected)
    assert SharedOutcome(outcome=log_probability).score(logits, labels).tolist() == pytest.approx(expected)
    assert PaperReward().score(logits, labels).tolist() == [1.0, 0.0, 0.0]


def test_margin_and_probability_by_hand() -> None:
    logits = torch.tensor([[2.0, 0.5, 1.7], [0.0, 0.4, 5.0], [1.0, 1.0, 0.0]])
    labels = torch.tensor([0, 1, 1])
    assert margin(logits, labels).tolist() == pytest.approx([0.3, -1.0, 0.0])
    assert margin(logits, labels, width=10.0).tolist() == pytest.approx([0.03, -0.46, 0.0])
    e = 2.718281828459045
    assert probability(logits, labels)[2].item() == pytest.approx(e / (2 * e + 1))


def test_no_reward_is_infinite_when_everybody_leaves() -> None:
    step = Step(Site.parse(1), torch.ones(1, 3, dtype=torch.bool), torch.zeros(1, 3, dtype=torch.bool), 1.0)
    assert PaperReward().deferred([step], torch.ones(1)).tolist() == [[[0, 0, 0]]]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("score", r"score\(...\) to return a tensor \[2\], got 0\.0"),
        ("immediate", r"immediate\(...\) to return a tensor \[2, 16\], got 0\.0"),
        ("deferred", r"deferred\(...\) to return a tensor \[1, 2, 16\], got 0\.0"),
    ],
)
@pytest.mark.parametrize("paid", [0.0, torch.zeros(1)])  # what broadcasting would make something of
def test_what_a_reward_of_ones_own_returns_is_checked(
    monkeypatch: pytest.MonkeyPatch, paid: float | Tensor, name: str, said: str
) -> None:
    backbone = toy("deit_tiny_patch16_224")
    monkeypatch.setattr(SharedOutcome, name, lambda *_: paid)
    game = TokenGame(backbone, (1,), reward=SharedOutcome())
    got = said if isinstance(paid, float) else said.replace("0\\.0", r"\[1\]")
    with pytest.raises((TypeError, ValueError), match=f"reward: expected {got}"):
        play(game, KeepAll(), random_images(backbone, 2), torch.tensor([0, 1]))
