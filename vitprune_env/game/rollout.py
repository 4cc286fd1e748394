"""Play whole games: training, evaluation and baselines all come through here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vitprune_env.engine.tokens import TokenState
from vitprune_env.errors import EvidenceError
from vitprune_env.game.token_game import TokenGame
from vitprune_env.policy import Policy
from vitprune_env.types import Episode, Observation, Step


def play(
    game: TokenGame,
    policy: Policy,
    images: Tensor | TokenState,
    labels: Tensor | None = None,
    record: bool = False,
) -> Episode:
    """Let a policy play a batch of images to the end.

    Args:
        game: the game; it must compute the evidence that the policy needs (`TokenGame.for_policy` does).
        policy: decides.
        images: `[B, C, H, W]`, or what `game.prepare` made of them.
        labels: `[B]` int64; None: no reward.
        record: whether to keep the observations in the episode.

    Raises:
        EvidenceError: if the game does not compute what the policy needs.
    """
    check_fit(game, policy)
    state = images if isinstance(images, TokenState) else game.prepare(images)
    policy.reset(state.batch_size, game.num_agents)
    obs: Observation | None = game.start(state, labels)
    observations = []
    while obs is not None:
        if record:
            observations.append(replace(obs))  # reads every field, so that none keeps the whole state alive
        obs, _, _, _, _ = game.step(policy.decide(obs))
    outcome = game.outcome()
    return Episode(
        alive=torch.stack([step.acted for step in game.steps]),
        keep=torch.stack([step.kept for step in game.steps]),
        reward=outcome.reward,
        outcome=outcome,
        observations=tuple(observations),
        parked=_parked(game.steps),
    )


def _parked(steps: Sequence[Step]) -> Tensor | None:
    """Which tokens wait after each decision, `[T, B, N]`; None: none ever do."""
    if all(step.parked is None for step in steps):
        return None
    return torch.stack([step.kept & ~step.carried for step in steps])


def check_fit(game: TokenGame, policy: Policy) -> None:
    """Refuse to let a policy play a game that lacks what it needs.

    Raises:
        EvidenceError: naming what is missing.
    """
    missing = sorted(policy.needs - game.needs)
    if missing:
        raise EvidenceError(
            f"{type(policy).__name__} needs evidence {missing}, which this game does not compute; "
            "make it with TokenGame.for_policy(backbone, policy) or pass needs=policy.needs"
        )
    if policy.attention_bias != game.attention_bias:
        raise EvidenceError(
            f"{type(policy).__name__} wants attention_bias={policy.attention_bias!r}, "
            f"this game has {game.attention_bias!r}; make it with TokenGame.for_policy(backbone, policy)"
        )


@dataclass(frozen=True)
class Evaluation:
    """What a policy achieves on a set of labelled images."""

    accuracy: float  # 0 to 1
    macs: float  # mean MACs per image, policy and evidence included
    policy_macs: float  # the part of `macs` spent on policy and evidence
    keep_per_site: tuple[float, ...]  # mean fraction of the N tokens that go on after each site
    images: int  # how many were played
    top5: float  # share of images whose class is among the five with the largest logits, 0 to 1

    @property
    def gmacs(self) -> float:
        """Mean GMACs per image."""
        return self.macs / 1e9

    @property
    def stderr(self) -> float:
        """Standard error of the accuracy."""
        return (self.accuracy * (1 - self.accuracy) / self.images) ** 0.5


def evaluate(game: TokenGame, policy: Policy, batches: Iterable[tuple[Tensor | TokenState, Tensor]]) -> Evaluation:
    """Accuracy and mean cost of a policy over batches of `(images, labels)`.

    Raises:
        ValueError: if there are no batches.
    """
    correct = among_five = images = 0
    macs = policy_macs = 0.0
    kept = torch.zeros(game.num_steps, dtype=torch.float64)
    for batch, labels in batches:
        outcome = play(game, policy, batch, labels).outcome
        assert outcome.correct is not None
        correct += int(outcome.correct.sum())
        best = outcome.logits.topk(min(5, outcome.logits.shape[1]), dim=1).indices
        among_five += int((best == labels[:, None]).sum())
        images += len(labels)
        macs += float(outcome.macs.sum())
        policy_macs += float(outcome.policy_macs.sum())
        kept += outcome.n_kept.double().sum(dim=0).cpu()
    if not images:
        raise ValueError("batches: expected at least one batch of labelled images, got an empty dataset")
    rates = tuple((kept / images / game.num_agents).tolist())
    return Evaluation(correct / images, macs / images, policy_macs / images, rates, images, among_five / images)
