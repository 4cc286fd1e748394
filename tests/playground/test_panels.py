"""Answers as pictures and HTML."""

from __future__ import annotations

import numpy as np
import torch

from vitprune_env.playground import panels
from vitprune_env.playground.pictures import Picture
from vitprune_env.playground.session import Answer, Question, Times

PICTURE = Picture(torch.zeros(3, 6, 6), np.full((6, 6, 3), 0.5), label=1)
QUESTION = Question(0, "evit", 0.5, frozenset({3}))
ANSWER = Answer(
    sites=("1", "2.attn"),
    keep=np.array([[True, True, True, False], [True, False, False, False]]),
    source=np.array([0, 0, -1, -1]),
    dense_logits=np.array([0.0, 2.0, 1.0]),
    logits=np.array([3.0, 2.0, 1.0]),
    dense_macs=2e9,
    macs=1.5e9,
    policy_macs=2e7,
)
NAMES = ("a_cat", "<dog>", "cow")


def test_the_board_covers_the_patch_that_was_clicked_away() -> None:
    whole, board = (panels.board(PICTURE, gone, (2, 2)) for gone in ((), {1}))
    assert board.shape == (panels.BOARD_PIXELS, panels.BOARD_PIXELS, 3)
    half = panels.BOARD_PIXELS // 2
    different = (whole != board).any(axis=2)
    assert different[: half - 1, half + 3 :].all()
    assert not different[half + 3 :].any()
    assert not different[:, :half].any()


def test_every_site_has_a_panel_and_merged_tokens_one_more() -> None:
    html = panels.sites(PICTURE, ANSWER, (2, 2))
    assert html.count("<figure>") == 3
    assert "after block 1" in html
    assert "in block 2" in html
    assert "3 of 4" in html
    alone = Answer(**{**vars(ANSWER), "source": np.array([0, -1, -1, -1])})
    assert panels.sites(PICTURE, alone, (2, 2)).count("<figure>") == 2


def test_classes_are_sorted_by_their_chance_and_names_are_escaped() -> None:
    html = panels.classes(ANSWER, label=1, names=NAMES)
    assert html.index("a cat") < html.index("&lt;dog&gt;") < html.index("cow")
    assert "<dog>" not in html
    assert html.index("&lt;dog&gt;") < html.index("true</em>") < html.index("cow")
    assert "66.5 %" in html  # exp(2) / (1 + exp(1) + exp(2))
    np.testing.assert_allclose(panels.softmax(np.array([1000.0, 1000.0])), 0.5)


def test_numbers_say_what_is_read_what_it_costs_and_how_long_it_takes() -> None:
    waiting = panels.numbers(QUESTION, ANSWER, None, NAMES)
    assert "being measured" in waiting
    html = panels.numbers(QUESTION, ANSWER, Times(4.0, 2.0, 9, 16), NAMES)
    for text in ("a cat", "the dense network reads &lt;dog&gt;", "75.0 % of dense", "1.5 of 2 GMACs", "1.0 % for the"):
        assert text in html
    for text in ("<b>1 token</b>", "1 clicked away", "2 ms", "dense 4 ms: 2.00x", "9 runs, batch of 16"):
        assert text in html
