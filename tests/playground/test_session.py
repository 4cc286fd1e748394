"""What the page computes: policies at budgets, answers, clicks, measured time."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from PIL import Image

from vitprune_env import BasePolicy, Decision, Observation, TokenGame, load_backbone, play
from vitprune_env.benchmarking.contestants import Task, contestants_of
from vitprune_env.benchmarking.prepared import PreparedImages
from vitprune_env.data import Digits
from vitprune_env.engine.walk import Packed, Walk
from vitprune_env.errors import BudgetError, SettingsError
from vitprune_env.playground.clicks import WithoutTokens, token_at, without
from vitprune_env.playground.pictures import from_batches, from_image
from vitprune_env.playground.session import BY_HAND, Question, Session
from vitprune_env.types import parse_sites

GONE = frozenset({33, 34, 44})


@pytest.fixture(scope="module")
def session() -> Session:
    backbone = load_backbone("vit_digits")
    images = PreparedImages(backbone, [Digits("train", 8, seed=1).batch(range(8))])
    pictures = from_batches(backbone, [Digits("test", 20).batch(range(20))], 3)
    methods = contestants_of(["evit", "tome_share", "evo_vit"], controls=False)
    return Session(Task(backbone, images, images, seeds=1), pictures, methods, timed_images=2, pairs=3)


def test_an_answer_has_the_budget_and_the_logits_of_both_networks(session: Session) -> None:
    answer, picture = session.answer(Question(0, "evit", 0.5)), session.pictures[0]
    assert answer.share == pytest.approx(0.5, abs=0.02)
    assert 0 < answer.policy_macs < answer.macs < answer.dense_macs
    with torch.inference_mode():
        np.testing.assert_allclose(answer.dense_logits, session.backbone(picture.pixels[None])[0], rtol=1e-5, atol=1e-5)
    assert np.abs(answer.logits - answer.dense_logits).max() > 1e-3
    assert (np.diff(answer.keep.sum(axis=1)) < 0).all()


def test_without_policy_and_clicks_nothing_leaves(session: Session) -> None:
    answer = session.answer(Question(1, BY_HAND, 0.3))
    assert answer.keep.all()
    assert answer.share == 1
    np.testing.assert_allclose(answer.logits, answer.dense_logits, atol=1e-5)


@pytest.mark.parametrize("policy", ["evit", "tome_share", "evo_vit", BY_HAND])
def test_what_is_clicked_away_is_gone_and_merges_into_nothing(session: Session, policy: str) -> None:
    answer = session.answer(Question(0, policy, 0.6, GONE))
    assert not answer.keep[:, sorted(GONE)].any()
    assert (answer.source[sorted(GONE)] == -1).all()
    assert (answer.logits != session.answer(Question(0, policy, 0.6)).logits).any()
    if policy == BY_HAND:
        assert answer.keep.sum() == answer.keep.size - len(answer.keep) * len(GONE)


def test_a_policy_sees_what_it_would_if_the_clicked_tokens_had_left(session: Session) -> None:
    backbone = session.backbone
    gone = torch.zeros(backbone.num_patches, dtype=torch.bool)
    gone[sorted(GONE)] = True
    medium = Packed(backbone)
    walk = Walk(medium, parse_sites((2, 4), backbone.depth), frozenset({"cls_attention"}))
    with torch.no_grad():
        images = torch.stack([picture.pixels for picture in session.pictures])
        arrival = walk.arrive(backbone.embed(images), None)
        left = medium.reduce(arrival, Decision(keep=~gone.expand(len(images), -1)))
        whole = medium.observe(arrival, 2)
        wanted, seen = medium.observe(replace(arrival, state=left), 2), without(whole, gone)
    for name in (field.name for field in fields(seen) if field.name not in ("evidence", "count", "parked")):
        one, other = getattr(seen, name), getattr(wanted, name)
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other, name
    whole_table, table = (obs.scatter(obs.evidence["cls_attention"]) for obs in (whole, seen))
    assert torch.equal(table, whole_table * ~gone)


class AllIntoOne(BasePolicy):
    """Merges every token into the first one, whatever is dead, after doubling its features."""

    def decide(self, obs: Observation) -> Decision:
        keep = obs.alive & (torch.arange(obs.num_agents) == 0)
        return Decision(keep, merge_into=torch.zeros_like(obs.order), features=2 * obs.tokens)


def test_decisions_about_tokens_that_a_policy_does_not_see_count_for_nothing(session: Session) -> None:
    gone = torch.zeros(session.backbone.num_patches, dtype=torch.bool)
    gone[sorted(GONE)] = True
    game = TokenGame(session.backbone, sites=(2,))
    outcome = play(game, WithoutTokens(AllIntoOne(), gone), session.pictures[0].pixels[None]).outcome
    assert torch.equal(outcome.source[0], torch.where(gone, -1, 0))
    assert outcome.alive.sum() == 1


def test_policies_answers_and_times_are_computed_once(session: Session) -> None:
    question = Question(2, "evit", 0.5, frozenset({7}))
    assert session.policy("evit", 0.5) is session.policy("evit", 0.501)
    assert session.answer(question) is session.answer(Question(2, "evit", 0.5, frozenset({7})))
    times = session.times(question)
    assert times is session.times(question)
    assert times.pruned_ms > 0
    assert times.dense_ms > 0
    assert (times.pairs, times.images) == (3, 2)


def test_budgets_out_of_reach_are_named_and_skipped_ahead(session: Session) -> None:
    with pytest.raises(BudgetError, match="of dense"):
        session.answer(Question(0, "evit", 0.1))
    session.calibrate_ahead((0.1,))


def test_one_token_has_to_stay(session: Session) -> None:
    with pytest.raises(SettingsError, match="at least one token"):
        session.answer(Question(0, BY_HAND, 1.0, frozenset(range(session.backbone.num_patches))))


def test_methods_that_must_be_trained_are_refused(session: Session) -> None:
    with pytest.raises(SettingsError, match="dynamicvit"):
        Session(session.task, session.pictures, contestants_of(["dynamicvit"], controls=False))


def test_pictures_are_of_different_classes_and_may_be_brought_along(session: Session) -> None:
    assert len({picture.label for picture in session.pictures}) == 3
    grey = Image.new("L", (64, 80), 200)
    number = session.add(from_image(session.backbone, grey))
    picture = session.pictures[number]
    assert picture.pixels.shape == session.pictures[0].pixels.shape
    np.testing.assert_allclose(picture.rgb, 200 / 255, atol=1e-5)
    assert session.answer(Question(number, "evit", 0.5)).keep.any()


def test_a_click_hits_the_patch_under_it() -> None:
    assert token_at(0, 0, (40, 40), (10, 10)) == 0
    assert token_at(39.9, 3.9, (40, 40), (10, 10)) == 9
    assert token_at(4, 8, (40, 40), (10, 10)) == 21
    assert token_at(40, 40, (40, 40), (10, 10)) == 99  # on the edge
    assert token_at(30, 10, (20, 40), (2, 8)) == 14
