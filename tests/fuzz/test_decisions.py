"""Decisions of all kinds: refused, or applied as a token-by-token computation applies them."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fuzzing import TIMES, attempt, inputs, odd
from tiny import tiny_backbone, tiny_data
from vitprune_env import Decision, TokenGame

BACKBONE = tiny_backbone()
IMAGES, LABELS = tiny_data(2).tensors
GAME = TokenGame(BACKBONE, (1,))  # one step: its state afterwards is what the decision left
B, N = 2, BACKBONE.num_patches
ROWS = st.lists(st.integers(-2, N), min_size=B * N, max_size=B * N)


@st.composite
def tensors(draw: Any, kind: str) -> Any:
    """A field of a decision: mostly of the right shape and type, with any content."""
    if not draw(st.integers(0, 9)):
        return draw(odd)
    values = torch.tensor(draw(ROWS)).view(B, N)
    if kind == "bool":
        values = values > 0
    elif kind == "float":
        values = values.float() / draw(st.sampled_from([1.0, 3.0, 0.0, float("nan")]))
    elif kind == "targets" and draw(st.booleans()):  # usually ones that fit
        values = torch.arange(N).expand(B, N).where(values > 0, values.clamp(min=-1, max=N - 1)[:, :1])
    twists = {"half": Tensor.half, "long": Tensor.long, "flat": torch.flatten, "sparse": Tensor.to_sparse}
    twist = draw(st.sampled_from(["none"] * 20 + list(twists)))
    return twists.get(twist, Tensor.clone)(values)


@st.composite
def decisions(draw: Any) -> Decision:
    """Any decision at the first site."""
    kinds = {"merge_into": "targets", "weight": "float", "order": "float", "park": "bool"}
    given_fields = draw(st.sets(st.sampled_from(sorted(kinds)), max_size=3))
    fields = {name: draw(tensors(kinds[name])) for name in sorted(given_fields)}
    fields |= {name: draw(odd) for name in ("count", "park_count", "macs", "features") if not draw(st.integers(0, 14))}
    return Decision(keep=draw(tensors("bool")), **fields)


def by_hand(decision: Decision, tokens: Tensor) -> dict[tuple[int, int], Tensor]:
    """Tokens that stay, by image and patch, one after another."""
    found = {}
    for image in range(B):
        for token in range(N):
            target = token if decision.merge_into is None else int(decision.merge_into[image, token])
            if not decision.keep[image, token] or target != token:
                continue
            merged = torch.zeros_like(tokens[0, 0])
            for other in range(N):
                goes = other if decision.merge_into is None else int(decision.merge_into[image, other])
                if goes == token:
                    weight = 1.0 if decision.weight is None else float(decision.weight[image, other])
                    merged = merged + weight * tokens[image, other]
            found[image, token] = merged
    return found


@TIMES
def test_a_decision_is_refused_or_applied_as_by_hand(times: int) -> None:
    @inputs(400 * times)
    @given(decisions())
    def check(decision: Decision) -> None:
        before = GAME.reset(IMAGES, LABELS).dense()

        def apply() -> Any:
            GAME.step(decision)
            return GAME.state

        state = attempt(apply)
        if state is None:
            return
        expected = by_hand(decision, before)
        assert {tuple(pair) for pair in state.present.nonzero().tolist()} == set(expected)
        waits = torch.zeros(B, N, dtype=torch.bool) if decision.park is None else decision.park
        assert torch.equal(state.alive, state.present & ~waits)
        parts = [state] if state.parked is None else [state, state.parked]
        for part in parts:
            for image, token, row in zip(part.image.tolist(), part.token.tolist(), part.tokens, strict=True):
                torch.testing.assert_close(row, expected[image, token], equal_nan=True)  # weights may be NaN
        if decision.count is not None:
            assert (state.alive.sum(dim=1) == decision.count).all()

    check()
