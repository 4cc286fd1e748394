"""What each token contributed to an outcome: the first-order effect of its presence, by one backward pass.

The pass that was played is run again masked, every token in place, with a weight of 1 for those that were there and 0
for the others; the derivative of the outcome by these weights says, for all agents at once, how much the outcome would
change if a token came or went. A difference reward (Wolpert and Tumer, 2001) would need a pass per agent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vitprune_env.engine.backbone import Backbone
from vitprune_env.engine.masked import MaskedState, classify_masked
from vitprune_env.engine.tokens import TokenState
from vitprune_env.engine.walk import Masked, Walk
from vitprune_env.errors import DecisionError
from vitprune_env.types import Step


def attribution(
    backbone: Backbone,
    start: TokenState,
    steps: Sequence[Step],
    labels: Tensor,
    outcome: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """First-order credit of every token for its presence after every site.

    Args:
        backbone: the network; its parameters get no gradient.
        start: the tokens at or before the first site, all alive.
        steps: what was played, to the end; tokens were dropped, never merged or parked.
        labels: `[B]` int64.
        outcome: differentiable score `[B]` of logits `[B, C]` and labels, such as `reward.log_probability`.

    Returns:
        `[T, B, N]`, derivative of the outcome by the weight of a token as a key between that site and the next one (or
        the end). For a kept token about what the outcome would lose without it, for a pruned one about what it would
        gain with it.

    Raises:
        DecisionError: if tokens were merged, or had to wait.
    """
    if any(step.merged is not None and bool(step.merged.any()) for step in steps):
        raise DecisionError("credit: expected tokens to be kept or dropped, got merged ones; they have no weight of 0")
    if any(step.parked is not None and bool(step.parked.any()) for step in steps):
        raise DecisionError(
            "credit: expected tokens to be kept or dropped, got waiting ones; they are not seen meanwhile"
        )
    batch = start.batch_size
    x = start.x.detach().view(batch, -1, start.x.shape[1])
    walk = Walk(Masked(backbone), [step.site for step in steps])
    with torch.enable_grad():
        weights = [step.kept.to(x.dtype).requires_grad_() for step in steps]
        first = MaskedState(x, start.num_prefix, start.half)
        last = walk.through(first, lambda arrival: arrival.state.with_weights(weights[arrival.step]))
        logits = classify_masked(backbone, last, last.weights)
        return torch.stack(torch.autograd.grad(outcome(logits, labels).sum(), weights, materialize_grads=True))
