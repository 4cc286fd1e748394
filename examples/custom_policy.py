"""Bring your own policy, with a piece of evidence of its own, and compare it with the field in one call.

    python examples/custom_policy.py

A policy may ask to see more than the tokens: attention, keys, values of the block that it acts in. A piece of evidence
that is not there yet is a record: how it is computed from packed rows, how in masked execution, and its MACs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from vitprune_env import BasePolicy, Decision, Observation, benchmark, check_policy, load_backbone, register_policy
from vitprune_env.benchmarking import Timing
from vitprune_env.cli import explained
from vitprune_env.cli.flags import TEST_SEED, TUNE_SEED, ResumableFlags, read_flags
from vitprune_env.data import Digits
from vitprune_env.engine.evidence import Evidence, MaskedAttention, PackedAttention, register_evidence
from vitprune_env.policy import check_keep_rate, keep_top


def packed_key_norms(attention: PackedAttention) -> Tensor:
    """Euclidean norm of each row's key over all heads, `[rows]`."""
    return attention.k.flatten(1).norm(dim=1)


def masked_key_norms(attention: MaskedAttention) -> Tensor:
    """The same where all tokens of all images are present, `[B, n]`."""
    return attention.k.transpose(1, 2).flatten(2).norm(dim=2)


register_evidence(Evidence("key_norms", packed=packed_key_norms, masked=masked_key_norms))


@register_policy("key_norms")  # the name in saved files
@dataclass(frozen=True)
class KeyNorms(BasePolicy):
    """Keeps the tokens with the smallest keys: where a ViT looks for content, keys of background grow large."""

    keep_rate: float
    needs = frozenset({"key_norms"})

    def __post_init__(self) -> None:
        check_keep_rate(self.keep_rate)

    def decide(self, obs: Observation) -> Decision:
        """Rank by the evidence, one value per alive token."""
        count = (obs.num_alive.double() * self.keep_rate).ceil()
        return Decision(keep=keep_top(obs, -obs.evidence["key_norms"], count))


def main(argv: Sequence[str] | None = None) -> None:
    """Check the policy, then compare it with others at the same sites and the same cost."""
    args = read_flags(ResumableFlags, argv, __doc__)
    args.prepare(results=("table.md", "results.json"))
    backbone = load_backbone("vit_digits").to(args.device)
    images = 24 if args.quick else 2000
    test, tune = Digits("validation", images, TEST_SEED), Digits("train", min(images, 256), TUNE_SEED)

    check_policy(KeyNorms(0.7), backbone, tune.batch(range(4))[0].to(args.device))  # shapes, determinism, independence
    policies = {"key norms": KeyNorms, "EViT": "evit", "TopK": "topk"}
    options = {"timing": Timing(pairs=2, images=8), "seeds": 1} if args.quick else {"timing": Timing(), "seeds": 2}
    place = {"output": args.output, "resume": args.resume}
    result = benchmark(policies, backbone, test, tune=tune, budgets=(0.5,), **options, **place)
    print(result.table())
    print(f"table, CSV, LaTeX and figures are in {args.output}/")


if __name__ == "__main__":
    with explained(ResumableFlags):
        main(sys.argv[1:])
