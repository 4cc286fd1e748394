"""The Markov game of token pruning, batched: images in, T decisions, logits and rewards out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vitprune_env.engine.backbone import Backbone, as_backbone
from vitprune_env.engine.cost import CostModel
from vitprune_env.engine.evidence import check_needs, from_attention, names_of_evidence
from vitprune_env.engine.reduction import check_decision, recall
from vitprune_env.engine.tokens import TokenState
from vitprune_env.engine.walk import Arrival, Packed, Walk
from vitprune_env.game.credit import attribution
from vitprune_env.game.rewards import CreditRewardFn, RewardFn, SharedOutcome, check_paid, check_reward
from vitprune_env.policy import Policy, check_members
from vitprune_env.types import Decision, Observation, Outcome, Site, Step, parse_sites


class TokenGame:
    """B images played at once; every patch token is an agent, every site a step, 0 = prune, 1 = keep.

    - Observation: the alive tokens' features at the site, packed (`Observation`).
    - Action: a `Decision` for all alive tokens.
    - Transition: decided tokens leave (or merge, or wait), the rest runs through the blocks up to the next site.
    - Reward: a `RewardFn`; what depends on the class is paid when the game ends.
    - Termination: a token terminates when it is pruned, and at the last site.

    Raises:
        SiteError: for sites outside the network.
        EvidenceError: for evidence that is not known, or that the backbone cannot give.
        TypeError: for a backbone, reward or needs of a wrong type.
        ValueError: for an unknown attention bias.

    Args:
        backbone: the network to prune, a `Backbone` or a timm model.
        sites: where to take steps, such as `(3, 6, 9)` or `("4.attn", "7.attn")`; None: the backbone's own.
        reward: what the agents are paid; None: `SharedOutcome()`.
        needs: evidence to compute at every site (a policy's `needs`).
        attention_bias: `"log_size"` for proportional attention (a policy's `attention_bias`).
        grad: whether autograd records the pass (fine-tuning); the environment does without.
        check: whether to check decisions and logits; costs a device synchronisation per site.
    """

    def __init__(
        self,
        backbone: Backbone | nn.Module,
        sites: Sequence[int | str | Site] | None = None,
        reward: RewardFn | None = None,
        needs: frozenset[str] = frozenset(),
        attention_bias: str | None = None,
        grad: bool = False,
        check: bool = True,
    ) -> None:
        backbone = as_backbone(backbone)
        if attention_bias not in (None, "log_size"):
            raise ValueError(f"attention_bias: expected None or 'log_size', got {attention_bias!r}")
        needs = names_of_evidence(needs)
        check_needs(needs, backbone)
        self.backbone = backbone
        self.sites = parse_sites(backbone.default_sites if sites is None else sites, backbone.depth)
        self.reward: RewardFn = SharedOutcome() if reward is None else reward
        check_reward(self.reward)
        self.needs = needs
        self.attention_bias = attention_bias
        self.grad = grad
        self.check = check
        self.cost = CostModel.of(backbone)
        self._medium = Packed(backbone, attention_bias == "log_size")
        self._walk = Walk(self._medium, self.sites, self.needs)
        self._bounds = (0, *(site.half for site in self.sites), 2 * backbone.depth)
        self._state: TokenState | None = None
        self._steps: list[Step] = []
        self._finished: Outcome | None = None

    @classmethod
    def for_policy(cls, backbone: Backbone | nn.Module, policy: Policy, **kwargs: Any) -> TokenGame:
        """The game with a policy's own sites, evidence and attention bias.

        Args:
            backbone: the network to prune, a `Backbone` or a timm model.
            policy: the policy that will play.
            **kwargs: further arguments of `TokenGame`; they replace what the policy says. `sites="published"` stands
                for those of the policy's paper, and None for the policy's own, else the backbone's (see
                `Backbone.sites_for`).

        Raises:
            TypeError: for a policy that lacks a member of the protocol.
        """
        check_members(policy)
        backbone = as_backbone(backbone)
        own = {"needs": policy.needs, "attention_bias": policy.attention_bias}
        return cls(backbone, **{**own, **kwargs, "sites": backbone.sites_for(policy, kwargs.get("sites"))})

    @property
    def num_steps(self) -> int:
        """T."""
        return len(self.sites)

    @property
    def num_agents(self) -> int:
        """N."""
        return self.backbone.num_patches

    def prepare(self, images: Tensor) -> TokenState:
        """Run the part before the first site, which no decision changes: worth caching for images seen often."""
        self.backbone.check_images(images)
        with torch.set_grad_enabled(self.grad and torch.is_grad_enabled()):
            state = self.backbone.embed(images)
            # The last attention half stays for `start`, where the evidence of the first site is computed.
            return self._medium.run(state, self.prepared_halves)[0]

    def reset(self, images: Tensor, labels: Tensor | None = None) -> Observation:
        """Begin a batch of games.

        Args:
            images: `[B, C, H, W]` as the model wants them (normalised).
            labels: `[B]` int64 classes; None: no reward is paid.

        Returns:
            What the agents see at the first site.

        Raises:
            ValueError: for images or labels that do not fit the model.
        """
        return self.start(self.prepare(images), labels)

    def start(self, state: TokenState, labels: Tensor | None = None) -> Observation:
        """Begin a batch of games from a prepared state, see `reset`.

        Raises:
            ValueError: for a state that has run past the blocks whose evidence this game needs, or has lost tokens.
        """
        if state.half > self.prepared_halves or not state.alive.all():
            raise ValueError(
                f"state: expected all tokens, {self.prepared_halves} half-blocks into the network at most, got "
                f"{int(state.alive.sum())} of {state.alive.numel()} after {state.half}; prepare it with this game"
            )
        if labels is not None:
            self.backbone.check_labels(labels, state.batch_size)
        self._labels = labels
        self._steps = []
        self._immediate: list[Tensor] = []
        self._extra_macs = torch.zeros(state.batch_size, dtype=torch.float64, device=state.x.device)
        self._booked = self._extra_macs.clone()
        self._start = state if isinstance(self.reward, CreditRewardFn) else None
        self._finished = None
        with torch.set_grad_enabled(self.grad and torch.is_grad_enabled()):
            self._advance(state)
        return self.observation()

    def observation(self) -> Observation:
        """What the agents see at the current site.

        Raises:
            RuntimeError: before the first game.
        """
        if self._state is None:
            raise RuntimeError("observation: no game is being played; call reset first")
        return self._observation

    def step(self, decision: Decision) -> tuple[Observation | None, Tensor | None, Tensor, Tensor, dict[str, Any]]:
        """Apply a decision and run up to the next site, or to the end.

        Returns:
            The next observation (None when the game is over); the reward known now `[B, N]`, in the last step with
            everything deferred (None without labels); terminated and truncated `[B, N]` bool; and a dict with
            `site`, `alive` `[B, N]` and `n_alive` `[B]`, and where tokens wait `parked` `[B, N]`.

        Raises:
            DecisionError: if the decision does not fit the tokens.
            NumericalError: if the logits are not finite.
        """
        if self._state is None or len(self._steps) == self.num_steps:
            raise RuntimeError("step: no game is being played; call reset first")
        if self.check:
            check_decision(decision, self._state.alive, self._state.waiting, self.backbone.embed_dim)
        with torch.set_grad_enabled(self.grad and torch.is_grad_enabled()):
            step = self._apply(decision)
            is_last = len(self._steps) == self.num_steps
            reward = None if self._labels is None else self._immediate[-1]
            if is_last:
                reward = self._finish(reward)
            acted_last = step.acted if is_last else step.acted & ~step.kept
        info = {"site": step.site.label, "alive": step.carried, "n_alive": step.carried.sum(dim=1)}
        if step.parked is not None:
            info["parked"] = step.parked
        obs = None if is_last else self._observation
        return obs, reward, acted_last, torch.zeros_like(acted_last), info

    def outcome(self) -> Outcome:
        """How the games ended.

        Raises:
            RuntimeError: before the last step.
        """
        if self._finished is None:
            raise RuntimeError(f"outcome: the game ends after {self.num_steps} steps; it has not ended yet")
        return self._finished

    def score_if_kept(self) -> Tensor:
        """Outcome score `[B]` of finishing the pass from here without further pruning (a counterfactual)."""
        if self._state is None or self._labels is None:
            raise RuntimeError("score_if_kept: no game with labels is being played")
        with torch.no_grad():
            state = self._walk.finish(self._state)
            return self.reward.score(self.backbone.classify(state), self._labels)

    @property
    def state(self) -> TokenState:
        """The tokens at the current site; after the end, as the last decision left them.

        Raises:
            RuntimeError: before the first game.
        """
        if self._state is None:
            raise RuntimeError("state: no game is being played; call reset first")
        return self._state

    @property
    def steps(self) -> tuple[Step, ...]:
        """The steps played so far."""
        return tuple(self._steps)

    @property
    def prepared_halves(self) -> int:
        """Half-blocks that `prepare` runs: all before the attention that gives the first site its evidence."""
        first = self.sites[0]
        return 2 * (first.block - 1) if from_attention(self.needs) else first.half

    def _advance(self, state: TokenState, previous: Arrival[TokenState] | None = None) -> None:
        """Run to the next site, and book the evidence computed on the way."""
        arrival = self._walk.arrive(state, previous)
        if arrival.is_fresh:
            rows = arrival.state.alive.sum(dim=1).double() + self.backbone.num_prefix
            self._extra_macs += self.cost.evidence(arrival.site, rows, self.needs)
        self._state, self._arrival = arrival.state, arrival
        self._observation = self._medium.observe(arrival, self.num_steps)

    def _apply(self, decision: Decision) -> Step:
        """Reduce the tokens, keep the books, and run on unless this was the last site."""
        before, after = self._arrival.state, self._medium.reduce(self._arrival, decision)
        index = len(self._steps)
        share = (self._bounds[index + 2] - self._bounds[index + 1]) / self._bounds[-1]
        if decision.macs is not None:
            self._extra_macs += decision.macs
        step = Step(self.sites[index], before.present, after.present, share, after.waiting)
        if self._labels is not None:
            step = self._with_costs(step, decision, after)
            paid = check_paid("immediate", self.reward.immediate(step), step.kept.shape)
            self._immediate.append(paid)
        self._steps.append(step)
        if len(self._steps) < self.num_steps:
            self._advance(after, self._arrival)
        else:
            self._state = after
        return step

    def _with_costs(self, step: Step, decision: Decision, after: TokenState) -> Step:
        """Add what only rewards want to know."""
        overhead = (self._extra_macs - self._booked) / self.cost.dense()
        self._booked = self._extra_macs.clone()
        merged = None if decision.merge_into is None else step.acted & ~step.kept & (after.source >= 0)
        return replace(step, merged=merged, overhead=overhead.float())

    def _finish(self, reward: Tensor | None) -> Tensor | None:
        """Run to the logits, settle the outcome, and return the last step's reward with everything deferred."""
        state = recall(self._walk.finish(self.state))
        logits = self.backbone.classify(state)
        if self.check:
            self.backbone.check_logits(logits)
        table = None
        if self._labels is not None and reward is not None:
            deferred = self._deferred(logits.detach(), self._labels)
            table = torch.stack(self._immediate) + deferred
            reward = reward + deferred.sum(dim=0)
        n_kept = torch.stack([step.carried.sum(dim=1) for step in self._steps], dim=1)
        came_back = state.alive.sum(dim=1) - n_kept[:, -1]  # parked tokens, which are read in the end
        self._finished = Outcome(
            logits=logits,
            correct=None if self._labels is None else logits.argmax(dim=1) == self._labels,
            n_kept=n_kept,
            macs=self.cost.forward(n_kept, self.sites) + self.cost.pool * came_back + self._extra_macs,
            policy_macs=self._extra_macs,
            source=state.source,
            size=state.size,
            alive=state.alive,
            reward=table,
        )
        return reward

    def _deferred(self, logits: Tensor, labels: Tensor) -> Tensor:
        """What depends on the outcome, `[T, B, N]`."""
        score = check_paid("score", self.reward.score(logits, labels), labels.shape)
        shape = (len(self._steps), *self._steps[0].kept.shape)
        deferred = check_paid("deferred", self.reward.deferred(self._steps, score), shape)
        if isinstance(self.reward, CreditRewardFn):
            assert self._start is not None
            credit = attribution(self.backbone, self._start, self._steps, labels, self.reward.potential)
            deferred = deferred + self.reward.credited(self._steps, credit)
        return deferred
