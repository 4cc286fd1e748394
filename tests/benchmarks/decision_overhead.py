"""What a policy's own decision costs in time, beside the half-block that it sits in.

    python tests/benchmarks/decision_overhead.py                                   # all baselines on vit_digits
    python tests/benchmarks/decision_overhead.py --model deit_small_patch16_224    # random weights
    python tests/benchmarks/decision_overhead.py --methods evit tome --budget 0.5
    python tests/benchmarks/decision_overhead.py --quick

Every method is calibrated to the same budget and plays the same images. At each of its sites are measured, in turn in
one process: the half-block just before the site, without anything extra; what the block's attention takes longer
because the policy asks for evidence or proportional attention; looking at the tokens and deciding; and applying the
decision (dropping, merging, packing). The table gives sums over the sites, medians over the rounds, and the last three
as a share of the first. Writes overhead.json and table.md.
"""

from __future__ import annotations

import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from vitprune_env import Backbone, Policy, load_backbone
from vitprune_env.baselines import available, calibrate, describe
from vitprune_env.benchmarking.result import sites_text
from vitprune_env.benchmarking.speed import Stopwatch
from vitprune_env.benchmarking.store import versions, write_json
from vitprune_env.benchmarking.tables import markdown
from vitprune_env.cli import explained
from vitprune_env.cli.flags import TUNE_SEED, CommonFlags, read_flags
from vitprune_env.data import Digits
from vitprune_env.engine.cost import CostModel
from vitprune_env.engine.reduction import reduce_tokens
from vitprune_env.engine.tokens import TokenState
from vitprune_env.errors import BudgetError
from vitprune_env.types import Decision, Site, parse_sites

T = TypeVar("T")
WARM_UP = 2  # rounds that do not count; an even number, so that either attention comes first equally often


@dataclass(frozen=True)
class Args(CommonFlags):
    """What to time."""

    output: Path = Path("runs/overhead")
    """Folder for results; made if it does not exist."""
    methods: tuple[str, ...] = ()
    """Baselines to time; none: all."""
    model: str = "vit_digits"
    """Network, by its name in timm, or vit_digits."""
    budget: float = 0.35
    """Mean GMACs per image as a share of the dense model's."""
    batch_size: int = 32
    """Images that are played at once."""
    rounds: int = 31
    """How often everything is measured."""
    cpu_time: bool = False
    """Count the process's CPU time instead of the clock's: on a shared machine, with one thread, the fairer measure."""


@dataclass(frozen=True)
class Overhead:
    """One method; milliseconds per batch, summed over its sites, median over the rounds."""

    method: str
    sites: tuple[str, ...] = ()
    half_ms: float = 0.0  # the half-blocks before the sites
    evidence_ms: float = 0.0  # what evidence and proportional attention add to the blocks' attention
    decide_ms: float = 0.0
    reduce_ms: float = 0.0
    out_of_reach: str = ""  # why it could not be timed

    @property
    def share(self) -> float:
        """Everything that deciding adds, over the half-blocks."""
        return (self.evidence_ms + self.decide_ms + self.reduce_ms) / self.half_ms


@dataclass(frozen=True)
class Player:
    """A calibrated method."""

    name: str
    policy: Policy
    sites: tuple[Site, ...]


@torch.inference_mode()
def one_round(
    backbone: Backbone, player: Player, images: Tensor, evidence_first: bool, cpu_time: bool = False
) -> dict[str, float]:
    """Milliseconds of one pass over the images.

    Args:
        backbone: the network.
        player: who decides, and where; one site per block.
        images: `[B, C, H, W]`.
        evidence_first: whether the attention with evidence runs before the one without; the second finds its data in
            the cache, so that rounds should take turns.
        cpu_time: whether to count CPU time instead of the clock's.
    """
    policy, sites = player.policy, player.sites
    stopwatch, log_size = Stopwatch(images.device, cpu_time), policy.attention_bias == "log_size"
    seconds: defaultdict[str, float] = defaultdict(float)

    def watch(name: str, call: Callable[..., T], *arguments: Any) -> T:
        result, spent = stopwatch.time(call, *arguments)
        seconds[name] += spent
        return result

    nothing: tuple[frozenset[str], bool] = (frozenset(), False)
    state = backbone.embed(images)
    policy.reset(len(images), backbone.num_patches)
    for step, site in enumerate(sites):
        state = backbone.run(state, 2 * (site.block - 1), frozenset(), log_size)[0]
        found = {
            name: watch(name, backbone.run, state, state.half + 1, *asked)
            for name, asked in (("asked", (policy.needs, log_size)), ("plain", nothing))[:: 1 if evidence_first else -1]
        }
        state, evidence = found["asked"]
        state = state if site.inside else watch("mlp", backbone.run, state, site.half)[0]

        def look_and_decide(state: TokenState, site: Site, step: int, evidence: dict[str, Tensor]) -> Decision:
            return policy.decide(backbone.observe(state, site, step, len(sites), evidence))

        decision = watch("decide", look_and_decide, state, site, step, evidence)
        state = watch("reduce", reduce_tokens, state, decision, backbone.needs_patches)
    spent = {name: 1e3 * value for name, value in seconds.items()}
    return {
        "half_ms": spent["plain"] if sites[0].inside else spent["mlp"],
        "evidence_ms": spent["asked"] - spent["plain"] if policy.needs or log_size else 0.0,
        "decide_ms": spent["decide"],
        "reduce_ms": spent["reduce"],
    }


def images_for(args: Args, backbone: Backbone) -> Tensor:
    """Scenes for the built-in model; noise for any other."""
    if backbone.name == "vit_digits":
        return Digits("train", args.batch_size, seed=TUNE_SEED).batch(range(args.batch_size))[0].to(args.device)
    shape = (args.batch_size, backbone.in_chans, *backbone.image_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(args.seed)).to(args.device)


def players(args: Args, backbone: Backbone, images: Tensor) -> Iterator[Player | Overhead]:
    """Every method at the budget, or why it cannot meet it."""
    tune = [(images, torch.zeros(len(images), dtype=torch.int64, device=args.device))]
    budget = args.budget * CostModel.of(backbone).dense() / 1e9
    for name in args.methods or available():
        method = describe(name)
        sites = parse_sites(method.sites(backbone), backbone.depth)
        network: dict[str, Any] = {"embed_dim": backbone.embed_dim, "num_sites": len(sites)}
        given = {} if method.needs_only_knob else {key: network[key] for key in network if key in method.parameters}
        try:
            yield Player(name, calibrate(name, budget, backbone, tune, sites, tolerance=0.01, **given), sites)
        except BudgetError as error:
            yield Overhead(name, out_of_reach=str(error))


def measure(args: Args, backbone: Backbone, entries: Sequence[Player], images: Tensor) -> list[Overhead]:
    """All methods in turn, round by round."""
    rounds: dict[str, list[dict[str, float]]] = {player.name: [] for player in entries}
    for number in tqdm(range(args.rounds + WARM_UP), "rounds"):
        for player in entries:
            spent = one_round(backbone, player, images, number % 2 == 0, args.cpu_time)
            rounds[player.name].append(spent)
    return [_median(player, rounds[player.name][WARM_UP:]) for player in entries]


def _median(player: Player, rounds: Sequence[dict[str, float]]) -> Overhead:
    """One method over all rounds."""
    medians: dict[str, Any] = {name: statistics.median(spent[name] for spent in rounds) for name in rounds[0]}
    return Overhead(player.name, tuple(site.label for site in player.sites), **medians)


def table(rows: Sequence[Overhead]) -> str:
    """The overheads as a markdown table, the cheapest first."""
    timed = sorted((row for row in rows if not row.out_of_reach), key=lambda row: row.share)
    cells = [
        {
            "method": row.method,
            "sites": sites_text(row.sites),
            "half-blocks ms": f"{row.half_ms:.2f}",
            "evidence ms": f"{row.evidence_ms:.2f}",
            "decide ms": f"{row.decide_ms:.2f}",
            "apply ms": f"{row.reduce_ms:.2f}",
            "overhead % of the half-blocks": f"{100 * row.share:.0f}",
        }
        for row in timed
    ]
    missing = [f"- {row.method}: {row.out_of_reach}" for row in rows if row.out_of_reach]
    return "\n".join([markdown(cells), "", *missing]).strip() + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Calibrate, time, report."""
    args = read_flags(Args, argv, __doc__)
    if args.quick:
        args = replace(args, batch_size=8, rounds=3)
    args.prepare(built_in=args.model == "vit_digits")
    torch.manual_seed(args.seed)
    backbone = load_backbone(args.model).to(args.device)
    images = images_for(args, backbone)
    found = list(tqdm(players(args, backbone, images), "calibrating", total=len(args.methods or available())))
    rows = measure(args, backbone, [entry for entry in found if isinstance(entry, Player)], images)
    rows += [entry for entry in found if isinstance(entry, Overhead)]
    text = table(rows)
    results = {"rows": [asdict(row) for row in rows], "settings": asdict(args), "versions": versions()}
    write_json(args.output / "overhead.json", results)
    (args.output / "table.md").write_text(text)
    print(f"\n{text}\nresults are in {args.output}/")


if __name__ == "__main__":
    with explained(Args):
        main(sys.argv[1:])
