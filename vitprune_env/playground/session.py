"""What the page computes: policies at budgets, answers about a picture, and measured time. It knows no page."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from threading import Lock, main_thread
from time import sleep

import numpy as np
import torch

from vitprune_env.benchmarking.contestants import DENSE, Contestant, Task
from vitprune_env.benchmarking.measurement import Sites
from vitprune_env.benchmarking.speed import Stopwatch
from vitprune_env.deploy.pruned_vit import PrunedViT
from vitprune_env.engine.backbone import Backbone
from vitprune_env.errors import BudgetError, SettingsError
from vitprune_env.game.rollout import play
from vitprune_env.game.token_game import TokenGame
from vitprune_env.playground.clicks import WithoutTokens
from vitprune_env.playground.pictures import Picture
from vitprune_env.policy import Policy

BY_HAND = "by hand"
REMEMBERED = 256  # answers and times that are kept
PAUSE = 0.02  # seconds in which whoever waits for a policy comes before the next one that nobody waits for
LIMIT = 3.0  # seconds that a measurement of time may take, or three runs
PERCENT = 100  # budgets are told apart in whole per cent of dense


@dataclass(frozen=True)
class Question:
    """What stands on the page."""

    picture: int  # number of the picture
    policy: str  # by its name
    share: float  # budget, mean MACs per image as a share of the dense network's
    gone: frozenset[int] = frozenset()  # tokens clicked away; they leave at the first site


@dataclass(frozen=True)
class Answer:
    """What becomes of one picture."""

    sites: tuple[str, ...]  # T of them
    keep: np.ndarray  # [T, N] bool, tokens that go on after each site
    source: np.ndarray  # [N] int64, the token that each patch ended up in; -1 where it was pruned
    dense_logits: np.ndarray  # [C]
    logits: np.ndarray  # [C]
    dense_macs: float
    macs: float  # policy and evidence included
    policy_macs: float

    @property
    def share(self) -> float:
        """Cost of this picture as a share of the dense network's."""
        return self.macs / self.dense_macs


@dataclass(frozen=True)
class Times:
    """Measured time of the dense and the pruned network, which ran in turn."""

    dense_ms: float  # per image, median
    pruned_ms: float
    pairs: int  # runs of each
    images: int  # that went through the network at once


class Session:
    """A network, pictures and policies, with everything computed once.

    Args:
        task: the network, the images to calibrate on, and how policies are compared.
        pictures: to choose from; more may be added.
        contestants: the policies, besides the one that decides nothing and leaves all to the clicks.
        timed_images: copies of a picture that go through the network at once when it is timed.
        pairs: runs of dense and pruned network that are timed.
        class_names: names of the classes by number; None: those of the network, if it knows any.

    Raises:
        SettingsError: for a policy that must be trained for each budget.
    """

    def __init__(
        self,
        task: Task,
        pictures: Sequence[Picture],
        contestants: Sequence[Contestant],
        timed_images: int = 16,
        pairs: int = 9,
        class_names: Sequence[str] | None = None,
    ) -> None:
        for one in contestants:
            if one.needs_fit:
                raise SettingsError(
                    f"policy: expected one that needs no training, got {one.name}; "
                    "`vitprune evaluate` trains it for a budget, and --checkpoint loads the policy that it writes"
                )
        self.task, self.pictures = task, list(pictures)
        self.contestants = {**{one.name: one for one in contestants}, BY_HAND: DENSE}
        self.timed_images, self.pairs = timed_images, pairs
        self.class_names = task.backbone.class_names or class_names
        self._lock = Lock()  # who calibrates or takes the time does so alone, for the same cores
        self._policies: dict[tuple[str, float], Policy] = {}
        self._answer = lru_cache(REMEMBERED)(self._find_answer)
        self._times = lru_cache(REMEMBERED)(self._measure)

    @property
    def backbone(self) -> Backbone:
        """The network."""
        return self.task.backbone

    @property
    def policies(self) -> tuple[str, ...]:
        """Names of the policies, `BY_HAND` last."""
        return tuple(self.contestants)

    def add(self, picture: Picture) -> int:
        """One more picture to choose from; returns its number."""
        self.pictures.append(picture)
        return self.pictures.index(picture)

    def policy(self, name: str, share: float) -> Policy:
        """A policy at a budget, calibrated when it is first asked for.

        Args:
            name: one of `policies`.
            share: mean MACs per image as a share of the dense network's.

        Raises:
            BudgetError: for a budget that no setting of the policy meets; the message gives the range.
        """
        share = round(share * PERCENT) / PERCENT
        if (name, share) not in self._policies:
            with self._lock:
                if (name, share) not in self._policies:  # nobody found it in the meantime
                    (self._policies[name, share],) = self.contestants[name].at(self.task, share * self.task.dense_gmacs)
        return self._policies[name, share]

    def calibrate_ahead(self, shares: Sequence[float]) -> None:
        """Find the policies at these budgets, so that nobody waits for them later; what is out of reach is skipped."""
        for share, name in product(shares, self.policies):
            if not main_thread().is_alive():  # the program is about to end
                return
            with suppress(BudgetError):
                self.policy(name, share)
            sleep(PAUSE)

    def answer(self, question: Question) -> Answer:
        """What becomes of a picture.

        Raises:
            BudgetError: for a budget that no setting of the policy meets; the message gives the range.
            SettingsError: if no token is left to play.
        """
        return self._answer(question)

    def times(self, question: Question) -> Times:
        """Time of the dense and of the pruned network, measured on this machine when it is first asked for.

        Raises:
            BudgetError: for a budget that no setting of the policy meets.
        """
        self.policy(question.policy, question.share)
        with self._lock:
            return self._times(question)

    def _sites(self, name: str) -> Sites | None:
        return self.contestants[name].sites(self.task)

    def _played(self, question: Question) -> WithoutTokens:
        """The policy of a question, without the tokens that were clicked away."""
        device = self.backbone.position.device
        gone = torch.zeros(self.backbone.num_patches, dtype=torch.bool, device=device)
        gone[sorted(question.gone)] = True
        if gone.all():
            raise SettingsError("clicks: expected at least one token that stays, got none")
        return WithoutTokens(self.policy(question.policy, question.share), gone)

    @torch.inference_mode()
    def _find_answer(self, question: Question) -> Answer:
        policy, sites = self._played(question), self._sites(question.policy)
        where = {} if sites is None else {"sites": sites}
        game = TokenGame.for_policy(self.backbone, policy, **where)
        pixels = self.pictures[question.picture].pixels[None]
        episode = play(game, policy, pixels)
        outcome = episode.outcome
        goes_on = episode.keep if episode.parked is None else episode.keep & ~episode.parked
        return Answer(
            sites=tuple(site.label for site in game.sites),
            keep=goes_on[:, 0].cpu().numpy(),
            source=outcome.source[0].cpu().numpy(),
            dense_logits=self.backbone(pixels)[0].float().cpu().numpy(),
            logits=outcome.logits[0].float().cpu().numpy(),
            dense_macs=game.cost.dense(),
            macs=float(outcome.macs),
            policy_macs=float(outcome.policy_macs),
        )

    @torch.inference_mode()
    def _measure(self, question: Question) -> Times:
        model = PrunedViT(self.backbone, self._played(question), self._sites(question.policy)).eval()
        pixels = self.pictures[question.picture].pixels
        images = pixels.expand(self.timed_images, *pixels.shape).contiguous()
        watch = Stopwatch(images.device)
        runs = watch.race(lambda: self.backbone(images), lambda: model(images), self.pairs, limit=LIMIT, warm_up=2)
        dense, pruned = (1e3 * statistics.median(part) / len(images) for part in (runs.first, runs.second))
        return Times(dense, pruned, len(runs.first), len(images))
