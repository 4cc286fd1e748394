"""Ways to credit agents with an outcome, as advantages `[T, B, N]`, to be compared on the same games.

All of them but `by_attribution` estimate the same gradient, that of the expected outcome: sum over agent-steps of
`advantage * grad log pi(action)`. Why `without_others` does: call h_s what was known before the decisions at site s.
Agent i at site t may be paid the outcome minus any sum of terms `c_sj (a_sj - p_sj)` over the *other* agent-steps
(s, j), if `c_sj` and the probability `p_sj` follow from h_s alone. Such a term has the mean 0 given h_s. For s > t the
gradient of agent i's log-probability is known in h_s, so that the product has the mean 0. For s = t, agents draw
independently given h_t, and both factors have the mean 0. For s < t the term is known in h_t, and the gradient has the
mean 0. Derivatives taken where the game was played (`attribution`) are no such coefficients: they know all actions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vitprune_env.agents.networks import TokenActor
from vitprune_env.engine.backbone import Backbone
from vitprune_env.engine.masked import MaskedState, classify_masked
from vitprune_env.engine.tokens import TokenState
from vitprune_env.engine.walk import Arrival, Masked, Walk
from vitprune_env.policy import BasePolicy
from vitprune_env.types import Decision, Observation, Site

Outcome = Callable[[Tensor, Tensor], Tensor]


class Coins(BasePolicy):
    """Keeps a token where a number of its own, 0 to 1, lies below its probability; remembers all of it.

    Args:
        actor: gives the probabilities.
        noise: `[T, B, N]`, uniform; equal noise means common random numbers.
        flipped: `[T, B, N]` bool, agent-steps that do the opposite.
    """

    def __init__(self, actor: TokenActor, noise: Tensor, flipped: Tensor | None = None) -> None:
        self.actor, self.noise, self.flipped = actor, noise, flipped
        self.chance: list[Tensor] = []  # per step [B, N], 0 for the dead

    @torch.no_grad()
    def decide(self, obs: Observation) -> Decision:
        """Draw for every alive token."""
        chance = obs.scatter(self.actor.keep_logit(obs.tokens).sigmoid())
        self.chance.append(chance)
        keep = self.noise[obs.step] < chance
        if self.flipped is not None:
            keep = keep ^ self.flipped[obs.step]
        return Decision(keep=keep & obs.alive)


def mean_field(
    backbone: Backbone,
    start: TokenState,
    sites: Sequence[Site],
    actor: TokenActor,
    labels: Tensor,
    outcome: Outcome,
    kept: Sequence[Tensor] = (),
) -> Tensor:
    """Derivatives of the outcome by each token's presence, on average play in place of one that was drawn.

    Every token is present with the weight of its probability to be there. The result depends on the image and the first
    decisions that are given, on no other ones.

    Args:
        backbone: the network.
        start: the tokens at or before the first site.
        sites: of the game.
        actor: gives the probabilities.
        labels: `[B]`.
        outcome: differentiable score of logits and labels.
        kept: `[B, N]` bool for each of the first sites, what was decided there.

    Returns:
        `[T, B, N]`, derivative by the presence from each site on, later probabilities of staying included.
    """
    x = start.x.detach().view(start.batch_size, -1, start.x.shape[1])
    moves: list[Tensor] = []

    def decide(arrival: Arrival[MaskedState]) -> MaskedState:
        tokens = arrival.state.tokens
        if arrival.step < len(kept):
            stays = kept[arrival.step].to(x)
        else:
            stays = actor.keep_logit(tokens.detach().flatten(0, 1)).detach().sigmoid().view(tokens.shape[:2])
        before = 1.0 if arrival.state.weights is None else arrival.state.weights
        moves.append(torch.zeros_like(stays).requires_grad_())
        return arrival.state.with_weights(before * stays + moves[-1])

    with torch.enable_grad():
        last = Walk(Masked(backbone), sites).through(MaskedState(x, start.num_prefix, start.half), decide)
        logits = classify_masked(backbone, last, last.weights)
        return torch.stack(torch.autograd.grad(outcome(logits, labels).sum(), moves, materialize_grads=True))


def without_others(score: Tensor, coefficient: Tensor, surprise: Tensor) -> Tensor:
    """The outcome without what the other agents' draws did to it, to first order.

    Args:
        score: `[B]`, outcome.
        coefficient: `[T, B, N]`, each following from what was known before the decisions at its site.
        surprise: `[T, B, N]`, action minus its probability; 0 where no agent acted.

    Returns:
        `[T, B, N]`.
    """
    own = coefficient * surprise
    return (score - own.sum(dim=(0, 2)))[None, :, None] + own


def without_mean(score: Tensor) -> Tensor:
    """The outcome of each image minus the mean of the others, `[B]`."""
    return score - (score.sum() - score) / (len(score) - 1)


def without_group(scores: Tensor) -> Tensor:
    """The outcomes of G games per image `[G, B]`, each minus the mean of the image's other games."""
    return scores - (scores.sum(dim=0) - scores) / (len(scores) - 1)


def by_flip(score: Tensor, other: Tensor, flipped: Tensor, surprise: Tensor, weight: Tensor) -> Tensor:
    """One agent-step of every image is paid the difference that its own choice made.

    Args:
        score: `[B]`, outcome as played.
        other: `[B]`, outcome when that agent-step does the opposite, all else drawn from the same random numbers.
        flipped: `[T, B, N]` bool, the agent-step.
        surprise: `[T, B, N]`, action minus its probability: what it did was less probable the larger this is.
        weight: `[B]`, one over the probability that this agent-step was chosen.

    Returns:
        `[T, B, N]`, 0 for all others.
    """
    return flipped * surprise.abs() * ((score - other) * weight)[None, :, None]


def by_attribution(credit: Tensor, surprise: Tensor) -> Tensor:
    """Derivatives where the game was played `[T, B, N]`, times what each agent did more than on average.

    Another objective: first order, and coefficients that know the actions they judge.
    """
    return credit * surprise
