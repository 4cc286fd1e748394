"""The rules: steps, rewards, the counterfactual, and what the game refuses."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.models.vision_transformer import Attention
from torch import Tensor

from helpers import (
    TIMM_MODELS,
    Fixed,
    keeps_to_decisions,
    make_model,
    naive_pass,
    random_images,
    random_keeps,
    random_merge,
    toy,
)
from vitprune_env.engine.backbone import Backbone
from vitprune_env.errors import DecisionError, EvidenceError, NumericalError, SiteError
from vitprune_env.game.rewards import PaperReward, RewardFn, SharedOutcome, log_probability
from vitprune_env.game.rollout import play
from vitprune_env.game.token_game import TokenGame
from vitprune_env.policy import KeepAll
from vitprune_env.types import Decision

ALL_EVIDENCE = frozenset({"cls_attention", "mean_attention", "keys", "value_norms"})


def deit() -> Backbone:
    """The plainest backbone."""
    return toy("deit_tiny_patch16_224")


def labels_for(backbone: Backbone, images: Tensor) -> Tensor:
    """Labels of which every other one is what the dense model says."""
    with torch.no_grad():
        predicted = backbone.model(images).argmax(dim=1)
    return (predicted + torch.arange(len(images)) % 2) % backbone.num_classes


@pytest.mark.parametrize("reward", [PaperReward(0.7, 0.4), SharedOutcome(0.2), SharedOutcome(0.2, log_probability)])
@given(seed=st.integers(0, 999), merges=st.booleans())
def test_steps_pay_what_the_table_says(reward: RewardFn, seed: int, merges: bool) -> None:
    """What `step` hands out adds up to the full table, agent by agent; only the last step knows the outcome."""
    backbone, batch = deit(), 8
    images = random_images(backbone, batch, seed)
    labels, generator = labels_for(backbone, images), torch.Generator().manual_seed(seed)
    game = TokenGame(backbone, (1, "2.attn", 3), reward=reward)
    obs, paid, alive = game.reset(images, labels), torch.zeros(batch, 16), torch.ones(batch, 16, dtype=torch.bool)
    for number in range(3):
        assert obs is not None
        keep = random_keeps(1, batch, 16, seed + number)[0] & alive
        obs, pay, terminated, truncated, info = game.step(
            random_merge(alive, generator) if merges else Decision(keep=keep)
        )
        assert pay is not None
        paid += pay
        assert not truncated.any()
        assert torch.equal(info["n_alive"], info["alive"].sum(dim=1))
        assert info["site"] == game.sites[number].label
        assert torch.equal(terminated, alive if number == 2 else alive & ~info["alive"])
        if number < 2:
            torch.testing.assert_close(pay, reward.immediate(game.steps[-1]))
        alive = info["alive"]
    assert obs is None
    outcome = game.outcome()
    assert outcome.reward is not None
    assert outcome.correct is not None
    torch.testing.assert_close(paid, outcome.reward.sum(dim=0))
    assert torch.equal(outcome.correct, outcome.logits.argmax(dim=1) == labels)
    score = reward.score(outcome.logits, labels)
    expected = torch.stack([reward.immediate(step) for step in game.steps]) + reward.deferred(game.steps, score)
    torch.testing.assert_close(outcome.reward, expected)


def test_without_labels_nobody_is_paid() -> None:
    game = TokenGame(deit())
    obs = game.reset(random_images(deit(), 2))
    rewards = [game.step(Decision(keep=obs.alive))[1] for _ in range(3)]
    assert rewards == [None, None, None]
    assert game.outcome().reward is None
    assert game.outcome().correct is None


@pytest.mark.parametrize("name", ["golden", *TIMM_MODELS])
@given(seed=st.integers(0, 999))
def test_score_if_kept_is_keeping_everybody_from_here(name: str, seed: int) -> None:
    backbone = toy(name)
    images, labels = random_images(backbone, 8, seed), torch.arange(8) % backbone.num_classes
    keeps = random_keeps(3, 8, backbone.num_patches, seed, least=int(backbone.needs_patches))
    reward = SharedOutcome(outcome=log_probability)
    game = TokenGame(backbone, (1, "2.attn", 3), reward=reward)
    game.reset(images, labels)
    counterfactual = torch.zeros(8)
    for played in range(4):
        counterfactual = game.score_if_kept()
        rest = [*keeps[:played], *[keeps[played - 1] if played else torch.ones_like(keeps[0])] * (3 - played)]
        other = TokenGame(backbone, game.sites, reward=reward)
        logits = play(other, Fixed(keeps_to_decisions(rest)), images).outcome.logits
        torch.testing.assert_close(counterfactual, log_probability(logits, labels), atol=1e-5, rtol=1e-5)
        if played < 3:
            game.step(Decision(keep=keeps[played]))
    torch.testing.assert_close(counterfactual, log_probability(game.outcome().logits, labels), atol=1e-5, rtol=1e-5)


def test_two_sites_in_one_block_share_its_attention() -> None:
    """After "3.attn" comes 3: the evidence is that of the block's attention, of the tokens still there."""
    backbone = deit()
    images, keeps = random_images(backbone, 8), random_keeps(3, 8, 16, seed=3)
    game = TokenGame(backbone, ("3.attn", 3, 4), needs=ALL_EVIDENCE)
    policy = Fixed(keeps_to_decisions(keeps), game.needs)
    outcome = play(game, policy, images).outcome
    first, second, third = policy.seen
    for name in ALL_EVIDENCE:
        before = first.scatter(first.evidence[name])
        torch.testing.assert_close(second.scatter(second.evidence[name])[keeps[0]], before[keeps[0]])
        assert len(third.evidence[name]) == len(third.image)
    assert not torch.allclose(second.tokens, first.gather(first.dense())[keeps[0][first.image, first.token]])
    width, rows = 48, 17.0
    third_rows = 1 + keeps[1].sum(dim=1).double()
    torch.testing.assert_close(outcome.policy_macs, width * (rows + rows**2 + third_rows + third_rows**2))


def test_evidence_of_the_first_site_is_that_of_its_block() -> None:
    backbone = deit()
    images = random_images(backbone, 2)
    for sites in (("1.attn",), (1,), ("3.attn",), (3,), (4,)):
        game = TokenGame(backbone, sites, needs=frozenset({"cls_attention"}))
        obs = game.start(game.prepare(images))
        block = obs.site.block
        state = backbone.run(backbone.embed(images), 2 * (block - 1))[0]
        attention = cast(Attention, backbone.block(block).attn)
        x = backbone.block(block).norm1(state.x).view(2, 17, -1)
        q, k, _ = attention.qkv(x).view(2, 17, 3, 3, 16).permute(2, 0, 3, 1, 4)
        weights = (q[:, :, :1] @ k.mT / 4).softmax(dim=-1).mean(dim=1)[:, 0, 1:]
        torch.testing.assert_close(obs.scatter(obs.evidence["cls_attention"]), weights.detach(), atol=1e-5, rtol=1e-5)


def test_a_prepared_state_can_be_played_again() -> None:
    backbone, images = deit(), random_images(deit(), 8)
    decisions = keeps_to_decisions(random_keeps(3, 8, 16, seed=0))
    game = TokenGame(backbone)
    state = game.prepare(images)
    first = play(game, Fixed(decisions), state).outcome.logits
    play(game, KeepAll(), state)
    assert torch.equal(play(game, Fixed(decisions), state).outcome.logits, first)
    assert torch.equal(play(game, Fixed(decisions), images).outcome.logits, first)


@pytest.mark.parametrize("name", ["vit_small_patch14_reg4_dinov2", "deit_tiny_patch16_224"])
@pytest.mark.parametrize("batch", [1, 3])
def test_everybody_may_leave_where_there_is_a_class_token(name: str, batch: int) -> None:
    backbone = toy(name)
    nobody = torch.zeros(batch, 16, dtype=torch.bool)
    game = TokenGame(backbone, (1, "3.attn", 3), needs=ALL_EVIDENCE, attention_bias="log_size")
    policy = Fixed(keeps_to_decisions([nobody] * 3), game.needs, "log_size")
    images = random_images(backbone, batch)
    outcome = play(game, policy, images, torch.zeros(batch, dtype=torch.int64)).outcome
    assert [obs.tokens.shape for obs in policy.seen[1:]] == [(0, 48)] * 2
    expected = naive_pass(backbone, images[0], game.sites, policy.decisions, 0).logits
    torch.testing.assert_close(outcome.logits[0], expected, atol=1e-5, rtol=1e-5)
    assert (outcome.source == -1).all()
    assert (outcome.macs - outcome.policy_macs).tolist() == [game.cost.floor(game.sites)] * batch


@pytest.mark.parametrize("name", ["vit_medium_patch16_gap_240", "vit_base_patch16_224"])
@pytest.mark.parametrize("batch", [1, 3])
def test_one_token_stays_where_the_class_is_read_from_patches(name: str, batch: int) -> None:
    backbone = toy(name)
    nobody = torch.zeros(batch, 16, dtype=torch.bool)
    game = TokenGame(backbone, (1, "3.attn", 3))
    obs = game.reset(random_images(backbone, batch), torch.zeros(batch, dtype=torch.int64))
    strongest = obs.scatter(obs.tokens.norm(dim=1)).argmax(dim=1)
    for _ in range(3):
        *_, info = game.step(Decision(keep=nobody))
        assert torch.equal(info["alive"].nonzero()[:, 1], strongest)
    assert game.outcome().n_kept.tolist() == [[1, 1, 1]] * batch
    assert torch.isfinite(game.outcome().logits).all()


def test_policy_macs_are_charged() -> None:
    backbone = deit()

    class Expensive(KeepAll):
        def decide(self, obs: Any) -> Decision:
            return Decision(keep=obs.alive, macs=torch.arange(2.0))

    images = random_images(backbone, 2)
    outcome = play(TokenGame(backbone), Expensive(), images).outcome
    assert outcome.policy_macs.tolist() == [0.0, 3.0]
    assert (outcome.macs - outcome.policy_macs).tolist() == [TokenGame(backbone).cost.dense()] * 2


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        ([0, 1], TypeError, r"labels: expected an int64 tensor of shape \[2\], got list"),
        (torch.zeros(3, dtype=torch.int64), ValueError, r"int64 of shape \[2\], got torch.int64 of \[3\]"),
        (torch.zeros(2), ValueError, r"int64 of shape \[2\], got torch.float32 of \[2\]"),
        (torch.tensor([0, 7]), ValueError, "labels: expected 0 to 6, got 0 to 7"),
        (torch.tensor([-1, 2]), ValueError, "labels: expected 0 to 6, got -1 to 2"),
    ],
)
def test_wrong_labels_are_refused(labels: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TokenGame(deit()).reset(random_images(deit(), 2), labels)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sites": (5,)}, SiteError, "expected blocks 1 to 4, got '5'"),
        ({"needs": frozenset({"nonsense"})}, EvidenceError, "unknown evidence 'nonsense'"),
        ({"needs": "keys"}, TypeError, "needs: expected a set of names of evidence, got 'keys'"),
        ({"attention_bias": "size"}, ValueError, "attention_bias: expected None or 'log_size', got 'size'"),
    ],
)
def test_wrong_games_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TokenGame(deit(), **options)


def test_turns_out_of_order_are_refused() -> None:
    game = TokenGame(deit(), (2,))
    everybody = Decision(keep=torch.ones(2, 16, dtype=torch.bool))
    with pytest.raises(RuntimeError, match="step: no game is being played; call reset"):
        game.step(everybody)
    with pytest.raises(RuntimeError, match="outcome: the game ends after 1 steps"):
        game.outcome()
    with pytest.raises(RuntimeError, match="observation: no game is being played"):
        game.observation()
    with pytest.raises(RuntimeError, match="score_if_kept: no game with labels"):
        game.score_if_kept()
    assert game.steps == ()
    game.reset(random_images(deit(), 2))
    with pytest.raises(RuntimeError, match="score_if_kept: no game with labels"):
        game.score_if_kept()
    game.step(everybody)
    with pytest.raises(RuntimeError, match="step: no game is being played"):
        game.step(everybody)
    game.reset(random_images(deit(), 2))
    with pytest.raises(RuntimeError, match="it has not ended yet"):
        game.outcome()


def test_a_refused_decision_leaves_the_game_as_it_was() -> None:
    backbone, images = deit(), random_images(deit(), 8)
    keeps = random_keeps(3, 8, 16, seed=2)
    game = TokenGame(backbone)
    obs = game.reset(images)
    for keep in keeps:
        wrong = keep.clone()
        wrong[~obs.alive] = True
        if not obs.alive.all():
            with pytest.raises(DecisionError, match="is dead and cannot be kept"):
                game.step(Decision(keep=wrong))
        with pytest.raises(DecisionError, match="keep: expected shape"):
            game.step(Decision(keep=keep[:, :-1]))
        obs = game.step(Decision(keep=keep))[0] or obs
    expected = play(TokenGame(backbone), Fixed(keeps_to_decisions(keeps)), images).outcome
    assert torch.equal(game.outcome().logits, expected.logits)


def test_logits_that_are_not_finite_are_reported() -> None:
    model = make_model("vit_tiny_patch16_224")
    backbone = Backbone(model)
    images = random_images(backbone, 3)
    images[1, 0, 0, 0] = float("nan")
    everybody = torch.ones(3, 25, dtype=torch.bool)
    with pytest.raises(NumericalError, match="logits: expected finite numbers, got NaN or infinity in 1 of 3 images"):
        play(TokenGame(backbone), KeepAll(), images)
    game = TokenGame(backbone, (1,))
    game.reset(images)
    with pytest.raises(NumericalError):
        game.step(Decision(keep=everybody))
    with pytest.raises(RuntimeError, match="call reset"):
        game.step(Decision(keep=everybody))
    unchecked = play(TokenGame(backbone, check=False), KeepAll(), images).outcome.logits
    assert torch.isfinite(unchecked[[0, 2]]).all()
