"""First-order credit against finite differences of masked execution, and the rewards built on it by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import Fixed, keeps_to_decisions, random_images, random_keeps, random_merge, toy
from vitprune_env.errors import DecisionError
from vitprune_env.game.credit import attribution
from vitprune_env.game.rewards import Attribution, SharedOutcome, margin, unclamped_log_probability
from vitprune_env.game.rollout import play
from vitprune_env.game.token_game import TokenGame
from vitprune_env.types import Decision, Episode, Site, Step

NAME = "deit_tiny_patch16_224"
SITES = ("1.attn", 2, "3.attn")
STEP = 1e-5


def played(seed: int, reward: object = None, batch: int = 3) -> tuple[TokenGame, Episode, torch.Tensor, torch.Tensor]:
    backbone = toy(NAME)
    game = TokenGame(backbone, SITES, reward=reward)  # type: ignore[arg-type]
    keeps = random_keeps(3, batch, backbone.num_patches, seed)
    images = random_images(backbone, batch, seed)
    labels = torch.randint(backbone.num_classes, (batch,), generator=torch.Generator().manual_seed(seed))
    return game, play(game, Fixed(keeps_to_decisions(keeps)), images, labels), images, labels


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 999))
def test_credit_is_the_derivative_of_the_masked_forward(seed: int) -> None:
    """Sites in blocks 1, 2 and 3: what is decided there is seen by blocks 2; 3; and 4 on."""
    game, _, images, labels = played(seed)
    backbone = toy(NAME).double()
    try:
        weights = torch.ones(backbone.depth, 3, backbone.num_patches, dtype=torch.float64)
        blocks = {0: [1], 1: [2], 2: list(range(3, backbone.depth))}
        for step, seen_by in blocks.items():
            for block in seen_by:
                weights[block] = game.steps[step].kept.double()
        start = game.prepare(images.double())
        credit = attribution(backbone, start, game.steps, labels, unclamped_log_probability)
        generator = torch.Generator().manual_seed(seed)
        for step, seen_by in blocks.items():
            direction = torch.randn(3, backbone.num_patches, generator=generator, dtype=torch.float64)
            values = []
            for sign in (1, -1):
                moved = weights.clone()
                for block in seen_by:
                    moved[block] += sign * STEP * direction
                logits, _ = backbone.forward_soft(images.double(), moved)
                values.append(unclamped_log_probability(logits, labels))
            expected = (values[0] - values[1]) / (2 * STEP)
            torch.testing.assert_close((credit[step] * direction).sum(dim=1), expected, atol=1e-5, rtol=1e-4)
    finally:
        backbone.float()


def paid(credit: torch.Tensor, episode: Episode, scale: float = 1.0) -> torch.Tensor:
    """Plus the credit for staying, minus it for leaving, in units of 1 / N, at most 1; nothing for the dead."""
    gain = (credit * credit.shape[2] * scale).clamp(-1, 1)
    return episode.alive * gain * (2.0 * episode.keep - 1)


def test_the_game_pays_choices_their_credit_and_charges_the_blocks() -> None:
    game, episode, images, labels = played(4, Attribution(price=0.3))
    credit = attribution(toy(NAME), game.prepare(images), game.steps, labels, unclamped_log_probability)
    assert (credit * credit.shape[2]).abs().max() > 1 > (credit * credit.shape[2]).abs().min() > 0
    shares = torch.tensor([step.share for step in game.steps])[:, None, None]
    torch.testing.assert_close(episode.reward, paid(credit, episode) - 0.3 * shares * episode.keep)


def test_credits_of_those_who_stayed_cancel_but_for_the_class_token() -> None:
    """Why the kept alone cannot be paid: only the class token's weight keeps their sum from being zero."""
    game, episode, images, labels = played(4)
    credit = attribution(toy(NAME), game.prepare(images), game.steps, labels, unclamped_log_probability)
    kept = credit * episode.keep
    assert kept.sum(dim=2).abs().mean() < 0.5 * kept.abs().sum(dim=2).mean()


def test_the_potential_and_the_scale_can_be_chosen_and_parameters_get_no_gradient() -> None:
    reward = Attribution(price=0.0, scale=0.1, potential=lambda logits, labels: margin(logits, labels, width=50.0))
    toy(NAME).zero_grad(set_to_none=True)  # other tests share this network and may have left gradients
    game, episode, images, labels = played(5, reward)
    credit = attribution(toy(NAME), game.prepare(images), game.steps, labels, reward.potential)
    torch.testing.assert_close(episode.reward, paid(credit, episode, scale=0.1))
    assert all(parameter.grad is None for parameter in toy(NAME).parameters())


def test_an_image_earns_the_same_credit_alone() -> None:
    game, episode, images, labels = played(6, Attribution())
    for image in range(3):
        alone = TokenGame(toy(NAME), SITES, reward=Attribution())
        decisions = keeps_to_decisions([keep[image : image + 1] for keep in episode.keep])
        again = play(alone, Fixed(decisions), images[image : image + 1], labels[image : image + 1])
        torch.testing.assert_close(again.reward, episode.reward[:, image : image + 1], atol=1e-5, rtol=1e-3)
    assert game.num_steps == 3


def test_merged_tokens_have_no_credit() -> None:
    backbone = toy(NAME)
    game = TokenGame(backbone, (2,), reward=Attribution())
    obs = game.reset(random_images(backbone, 4), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(DecisionError, match="merged"):
        game.step(random_merge(obs.alive, torch.Generator().manual_seed(0)))


def test_waiting_tokens_have_no_credit() -> None:
    backbone = toy(NAME)
    game = TokenGame(backbone, (2,), reward=Attribution())
    obs = game.reset(random_images(backbone, 2), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(DecisionError, match="waiting"):
        game.step(Decision(keep=obs.alive, park=random_keeps(1, 2, backbone.num_patches, 0)[0]))


def test_prices_per_image_go_where_the_tokens_are() -> None:
    """The meta device stands for a GPU."""
    everybody = torch.ones(2, 4, dtype=torch.bool, device="meta")
    step = Step(Site.parse(1), everybody, everybody, 0.5)
    for reward in (SharedOutcome(price=torch.tensor([0.1, 0.2])), Attribution(price=torch.tensor([0.1, 0.2]))):
        assert reward.immediate(step).device.type == "meta"


def test_merging_and_deciding_can_be_charged_by_hand() -> None:
    flags = torch.tensor
    step = Step(
        Site.parse(1),
        acted=flags([[True, True, True, False]]),
        kept=flags([[True, False, False, False]]),
        share=0.5,
        merged=flags([[False, True, False, False]]),
        overhead=flags([0.06]),
    )
    plain = torch.tensor([[-0.2, 0, 0, 0]])
    torch.testing.assert_close(SharedOutcome(price=0.4).immediate(step), plain)
    merging = SharedOutcome(price=0.4, merge_cost=0.05).immediate(step)
    torch.testing.assert_close(merging, plain - torch.tensor([[0, 0.05, 0, 0]]))
    deciding = SharedOutcome(price=0.4, charge_overhead=True).immediate(step)
    each = 0.4 * 0.06 * 4 / 3  # 6 % of what 4 tokens cost, shared by the three who decided
    torch.testing.assert_close(deciding, plain - torch.tensor([[each, each, each, 0]]))


def test_the_game_knows_what_merged_and_what_deciding_cost() -> None:
    backbone = toy(NAME)
    game = TokenGame(backbone, (1, "3.attn"), needs=frozenset({"keys"}))
    obs = game.reset(random_images(backbone, 2), torch.zeros(2, dtype=torch.int64))
    target = torch.arange(backbone.num_patches).repeat(2, 1)
    target[:, 3], target[:, 5] = 1, -1
    keep = obs.alive.clone()
    keep[:, [3, 5]] = False
    game.step(Decision(keep=keep, merge_into=target, macs=torch.tensor([5e4, 7e4], dtype=torch.float64)))
    obs = game.observation()
    game.step(Decision(keep=obs.alive))
    first, second = game.steps
    assert first.merged is not None
    assert first.merged.nonzero().tolist() == [[0, 3], [1, 3]]
    assert second.merged is None
    total = game.outcome().policy_macs / game.cost.dense()
    assert first.overhead is not None
    assert second.overhead is not None
    torch.testing.assert_close(first.overhead + second.overhead, total.float())
    gap = float(first.overhead[1] - first.overhead[0]) * game.cost.dense()
    assert gap == pytest.approx(2e4, rel=1e-3)
