"""What is it worth that every image has a schedule of its own? A policy, and its scores with the same counts for all.

    python tests/benchmarks/per_image_schedule.py --checkpoints runs/mappo
    python tests/benchmarks/per_image_schedule.py --checkpoints runs/mappo-0 runs/mappo-1 --split test     # seeds
    python tests/benchmarks/per_image_schedule.py --checkpoints runs/merge --data-dir DIR --model NAME --weights FILE

A trained policy compares the score of each token (of each pair, where it merges) with a threshold, so that images
differ in how many tokens they keep, and where. Here the same scores decide which tokens leave; how many do at a site
is the policy's mean over all images, rounded up in as many of them as keeps the mean. Cost and accuracy of both on the
same images, and the difference with its 95 % interval.

Not a test: nothing is asserted.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitprune_env import BasePolicy, Decision, Observation
from vitprune_env.agents import MergePolicy, TokenPolicy
from vitprune_env.agents.merging.pairs import Pairs
from vitprune_env.agents.merging.policy import merged
from vitprune_env.agents.senses import see
from vitprune_env.benchmarking import difference, measure
from vitprune_env.benchmarking.images import as_batches
from vitprune_env.benchmarking.tables import markdown
from vitprune_env.cli import explained
from vitprune_env.cli.flags import TEST_SEED, CommonFlags, ImageFlags, read_flags
from vitprune_env.deploy.policy_files import load_policy


@dataclass(frozen=True)
class Args(CommonFlags):
    """What to compare."""

    checkpoints: tuple[Path, ...] = (Path("runs/mappo"),)
    """Policies, run folders or files: seeds of one training."""
    split: str = "validation"
    """Held-out images."""
    images: int | None = None
    """How many of them; None: 2000 scenes, or all files."""
    batch_size: int = 100
    """Images at once."""
    source: ImageFlags = field(default_factory=ImageFlags)


class EqualCounts(BasePolicy):
    """The scores of a policy, and at each site as many tokens that leave as given, in all images alike."""

    def __init__(self, policy: TokenPolicy | MergePolicy) -> None:
        self.policy, self.needs, self.attention_bias = policy, policy.needs, policy.attention_bias
        self.seen: dict[int, list[Tensor]] = {}  # by site, how many tokens left the images
        self.means: dict[int, float] = {}

    def default_sites(self, depth: int) -> Any:
        """Those of the policy."""
        return self.policy.default_sites(depth)

    def settle(self) -> None:
        """From here on use the means of what was seen."""
        self.means = {step: float(torch.cat(counts).double().mean()) for step, counts in self.seen.items()}

    @torch.no_grad()
    def decide(self, obs: Observation) -> Decision:
        """As the policy does, until the means are settled."""
        if not self.means:
            decision = self.policy.decide(obs)
            self.seen.setdefault(obs.step, []).append((obs.alive & ~decision.keep).sum(dim=1))
            return decision
        places = (torch.arange(len(obs.alive), device=obs.alive.device) + 0.5) / len(obs.alive)
        count = (self.means[obs.step] + places).floor().long()
        if isinstance(self.policy, MergePolicy):
            pairs = self.policy.actor.pairs(obs)
            leaves = lowest(obs, self.policy.actor(pairs.features, obs.step), pairs, count)
            return merged(obs, pairs, ~leaves, self.policy.actor)
        scores = obs.scatter(self.policy.actor.keep_logit(see(obs, self.policy.senses).tokens), fill=float("inf"))
        ranks = scores.argsort(dim=1, stable=True).argsort(dim=1)
        return Decision(keep=obs.alive & (ranks >= count[:, None]), macs=self.policy.decide(obs).macs)


def lowest(obs: Observation, scores: Tensor, pairs: Pairs, count: Tensor) -> Tensor:
    """The `count` lowest scores of each image, `[P]` bool."""
    table = torch.full(obs.alive.shape, float("inf"), device=scores.device)
    table[pairs.image, pairs.token] = scores
    ranks = table.argsort(dim=1, stable=True).argsort(dim=1)
    return ranks[pairs.image, pairs.token] < count[pairs.image]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    args = read_flags(Args, argv, __doc__)
    torch.set_num_threads(args.threads or 1)
    backbone = args.source.network(args.seed, args.device)
    images = args.images or (None if args.source.reads_files else 2000)
    test = as_batches(
        args.source.open(backbone, args.split, images, TEST_SEED), args.batch_size, torch.device(args.device)
    )
    files = [path / "policy.safetensors" if path.is_dir() else path for path in args.checkpoints]
    policies = [load_policy(file, args.device) for file in files]
    alike = [EqualCounts(policy) for policy in policies]
    own = measure("a schedule for every image", backbone, alike, test)
    for policy in alike:
        policy.settle()
    equal = measure("the same schedule for all", backbone, alike, test)
    gap = difference(own.marks, equal.marks, groups=own.groups)
    rows = []
    for row in (own, equal):
        low, high = row.interval
        rows.append({
            "policy": row.name,
            "accuracy % (95 %)": f"{100 * row.accuracy:.1f} ({100 * low:.1f} to {100 * high:.1f})",
            "GMACs": f"{row.gmacs:.5g}",
        })  # fmt: skip
    print(markdown(rows))
    print(f"\nDifference: {100 * gap[0]:+.1f} points ({100 * gap[1]:+.1f} to {100 * gap[2]:+.1f})")


if __name__ == "__main__":
    with explained(Args):
        main(sys.argv[1:])
