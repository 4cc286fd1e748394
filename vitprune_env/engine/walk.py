"""The walk through a network: run to a site, gather evidence, decide, go on, up to the last block.

The loop is written once, for two media. `Packed` removes tokens physically: the game, the deployed model and the
benchmarks use it. `Masked` keeps every token and gives it a weight: the training forms of baselines and the credit of
tokens use it.

    walk = Walk(Packed(backbone), sites, policy.needs)
    state = walk.through(backbone.embed(images), lambda arrival: walk.medium.reduce(arrival, decide(arrival)))
    logits = backbone.classify(state)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from vitprune_env.engine.backbone import Backbone
from vitprune_env.engine.evidence import from_attention, from_pixels
from vitprune_env.engine.halves import PLAIN, Execution, Found
from vitprune_env.engine.masked import MaskedState, run_masked
from vitprune_env.engine.reduction import reduce_tokens
from vitprune_env.engine.tokens import TokenState, follow, segment_mean
from vitprune_env.types import Decision, Observation, Site


class State(Protocol):
    """Tokens somewhere in a network."""

    @property
    def half(self) -> int:
        """Half-blocks that have run."""
        ...


S = TypeVar("S", bound=State)


@dataclass(frozen=True)
class Arrival(Generic[S]):
    """The tokens at a site, before the decision."""

    state: S
    site: Site
    step: int  # from 0
    evidence: Mapping[str, Tensor]  # what was asked for, of the patch tokens that are there
    is_fresh: bool  # whether attention was asked on the way here; False: never, or at an earlier site of the same block


class Medium(Protocol[S]):
    """How tokens are carried through the network."""

    @property
    def backbone(self) -> Backbone:
        """The network."""
        ...

    def run(self, state: S, stop: int, needs: Collection[str] = frozenset()) -> tuple[S, Found]:
        """Run on until `stop` half-blocks have run; the evidence of the last attention half."""
        ...

    def follow(self, values: Tensor, before: S, after: S) -> Tensor:
        """Values of the tokens before a decision as values of those that are there after it."""
        ...

    def observe(self, arrival: Arrival[S], num_steps: int) -> Observation:
        """What a policy sees."""
        ...


@dataclass(frozen=True)
class Packed:
    """Tokens that leave are gone; the others are packed rows."""

    backbone: Backbone
    log_size: bool = False  # proportional attention
    execution: Execution = PLAIN

    def run(self, state: TokenState, stop: int, needs: Collection[str] = frozenset()) -> tuple[TokenState, Found]:
        """See `Backbone.run`; evidence is `[sum n_i, ...]`."""
        return self.backbone.run(state, stop, needs, self.log_size, self.execution)

    def follow(self, values: Tensor, before: TokenState, after: TokenState) -> Tensor:
        """Rows `[sum n_i, ...]` of the tokens that are still there; zero for tokens that were parked before."""
        return follow(values, before, after)

    def observe(self, arrival: Arrival[TokenState], num_steps: int) -> Observation:
        """See `Backbone.observe`."""
        return self.backbone.observe(arrival.state, arrival.site, arrival.step, num_steps, arrival.evidence)

    def reduce(self, arrival: Arrival[TokenState], decision: Decision) -> TokenState:
        """The tokens after a decision; where the class is read from patches, every image keeps one."""
        return reduce_tokens(arrival.state, decision, keep_one=self.backbone.needs_patches)


@dataclass(frozen=True)
class Masked:
    """Tokens stay where they are; the state's weights say how much each is seen."""

    backbone: Backbone
    log_size: bool = False  # proportional attention, by the state's sizes
    see_themselves: bool = False  # whether a token with a weight sees itself in full

    def run(self, state: MaskedState, stop: int, needs: Collection[str] = frozenset()) -> tuple[MaskedState, Found]:
        """See `run_masked`; evidence is `[B, N, ...]`."""
        bias = state.size.log() if self.log_size and state.size is not None else None
        themselves = self.see_themselves and state.weights is not None
        return run_masked(self.backbone, state, stop, state.weights, bias, needs, themselves)

    def follow(self, values: Tensor, before: MaskedState, after: MaskedState) -> Tensor:
        """The same: every token keeps its place."""
        return values

    def observe(self, arrival: Arrival[MaskedState], num_steps: int) -> Observation:
        """What a policy would see if the tokens of weight 0 were gone; sizes without gradients."""
        state, backbone = arrival.state, self.backbone
        ones = state.x.new_ones(state.tokens.shape[:2])
        alive = (ones if state.weights is None else state.weights.detach()) > 0
        image, token = alive.nonzero(as_tuple=True)
        counts = alive.sum(dim=1)
        ranks = (alive.cumsum(dim=1) - 1).masked_fill(~alive, -1)
        tokens = state.tokens[image, token]
        return Observation(
            tokens=tokens,
            image=image,
            token=token,
            offsets=torch.cat([counts.new_zeros(1), counts.cumsum(0)]),
            cls=state.prefix[:, 0] if backbone.has_class_token else segment_mean(tokens, image, len(alive)),
            alive=alive,
            size=(ones if state.size is None else state.size.detach()) * alive,
            order=ranks if state.order is None else state.order,
            position=backbone.position,
            site=arrival.site,
            step=arrival.step,
            num_steps=num_steps,
            depth=backbone.depth,
            evidence={name: values[image, token] for name, values in arrival.evidence.items()},
            num_prefix=state.num_prefix,
        )


@dataclass(frozen=True)
class Walk(Generic[S]):
    """A way through a network with stops at some sites.

    Args:
        medium: how tokens are carried: `Packed` or `Masked`.
        sites: where to stop.
        needs: evidence to gather on the way to every site.
    """

    medium: Medium[S]
    sites: Sequence[Site]
    needs: Collection[str] = frozenset()

    def arrive(self, state: S, previous: Arrival[S] | None = None) -> Arrival[S]:
        """Run to the next site.

        Two sites in one block share its attention: at the second one the evidence from the attention of the first
        still holds, for the tokens that are still there.

        Args:
            state: the tokens after the decision at the previous site.
            previous: that site; None: the walk begins.

        Raises:
            ValueError: if the walk begins behind the attention that gives the first site its evidence.
        """
        step = 0 if previous is None else previous.step + 1
        site = self.sites[step]
        attention = from_attention(self.needs)
        is_fresh = bool(attention) and state.half <= 2 * (site.block - 1)
        if attention and not is_fresh and previous is None:
            raise ValueError(
                f"state: expected at most {2 * (site.block - 1)} half-blocks run, so that the evidence at {site} can "
                f"be computed, got {state.half}"
            )
        after, evidence = self.medium.run(state, site.half, self.needs if is_fresh else from_pixels(self.needs))
        if previous is not None and not is_fresh:
            follow = self.medium.follow
            shared = {name: follow(previous.evidence[name], previous.state, after) for name in attention}
            evidence = {**shared, **evidence}
        return Arrival(after, site, step, evidence, is_fresh)

    def finish(self, state: S) -> S:
        """Run to the end of the network."""
        return self.medium.run(state, 2 * self.medium.backbone.depth)[0]

    def through(self, state: S, decide: Callable[[Arrival[S]], S]) -> S:
        """The whole walk.

        Args:
            state: the tokens at or before the first site.
            decide: called at every arrival, in order; returns the tokens to go on with.

        Returns:
            The tokens that leave the last block.
        """
        arrival = None
        for _ in self.sites:
            arrival = self.arrive(state, arrival)
            state = decide(arrival)
        return self.finish(state)
