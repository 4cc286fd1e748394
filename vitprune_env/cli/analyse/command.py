"""What a policy does image by image, layer by layer and patch by patch: four views, each a figure and its numbers.

    vitprune analyse --checkpoint runs/mappo                      # all four
    vitprune analyse --checkpoint runs/mappo --views difficulty   # kept tokens against how hard an image is
    vitprune analyse --policy evit --views diversity --budgets 0.3 0.5 0.7 --beside dpc    # Long et al., 2023, Fig. 4
    vitprune analyse --policy ltmp --target-share 0.5 --views layers     # thresholds and kept tokens (LTMP)
    vitprune analyse --policy life_regression --target-share 0.5 --views lives    # Chen et al., Fig. 4

Policy, network and images are given as to `vitprune evaluate`. Writes NAME.png, NAME.pdf and NAME.csv for each
view, and images.csv with a line for each image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vitprune_env.cli import evaluate
from vitprune_env.cli.flags import ResumableFlags

if TYPE_CHECKING:
    from vitprune_env.benchmarking.images import Batches
    from vitprune_env.benchmarking.per_image import DiversityPoint, ImageRecords
    from vitprune_env.engine.backbone import Backbone
    from vitprune_env.policy import Policy


@dataclass(frozen=True)
class Args(evaluate.Args):
    """What to look at, and on what."""

    views: tuple[Literal["difficulty", "diversity", "layers", "lives"], ...] = (
        "difficulty",
        "diversity",
        "layers",
        "lives",
    )
    """Which views."""
    difficulty: Literal["margin", "loss"] = "margin"
    """How hard an image is for the dense network: minus its margin (true logit less the largest other one), or its
    cross-entropy."""
    budgets: tuple[float, ...] = ()
    """Shares of the dense GMACs at which the diversity view compares policies; none: the policy as it is."""
    beside: tuple[str, ...] = ()
    """Further policies in the diversity view, at the same budgets: names of baselines, or saved policies."""
    common: ResumableFlags = field(default_factory=lambda: ResumableFlags(output=Path("runs/analysis")))

    @property
    def run_name(self) -> str:
        """Of what."""
        return "analysis" if self.policy is None else f"analysis-{evaluate.name_of(self.policy)}"

    @property
    def fits(self) -> bool:
        """Whether a policy is trained first."""
        return super().fits or any(map(evaluate.is_trained, self.beside))


def parse(argv: Sequence[str] | None, prog: str | None = None) -> Args:
    """Read the command line, as `vitprune evaluate` does.

    Raises:
        SettingsError: for a preset that does not exist, budgets that are none, or further policies without budgets.
    """
    from vitprune_env.errors import SettingsError

    args = evaluate.parse(argv, prog, Args, __doc__)
    for share in args.budgets:
        if not 0 < share < 1:
            raise SettingsError(f"budgets: expected shares of the dense GMACs between 0 and 1, got {share}")
    if args.beside and not args.budgets:
        raise SettingsError("beside: expected budgets to compare policies at, --budgets 0.3 0.5 0.7; got none")
    return args


def name_of(args: Args) -> str:
    """What the policy is called in figures."""
    if args.policy is not None:
        return evaluate.name_of(args.policy)
    return args.checkpoint.name if args.checkpoint.is_dir() else args.checkpoint.stem


def points_of(
    args: Args, policy: Policy, backbone: Backbone, records: ImageRecords, test: Batches
) -> tuple[list[DiversityPoint], list[str]]:
    """The marks of the diversity view, and a sentence for every budget that a policy cannot meet."""
    from vitprune_env.benchmarking.contestants import Fits, Task, contestants_of
    from vitprune_env.benchmarking.per_image import DiversityPoint, diversity_points
    from vitprune_env.benchmarking.prepared import PreparedImages
    from vitprune_env.engine.cost import CostModel

    if not args.budgets:
        return [DiversityPoint.of(name_of(args), records, CostModel.of(backbone).dense() / 1e9)], []
    lines = contestants_of({name_of(args): policy}, controls=False) + contestants_of(args.beside, controls=False)
    task = Task(
        backbone,
        PreparedImages(backbone, test),
        PreparedImages(backbone, args.tuning(backbone)),
        args.training(backbone) if any(line.needs_fit for line in lines) else None,
        shares=args.budgets,
        sites=evaluate.sites_of(args),
        seed=args.common.seed,
        seeds=1,
        fits=Fits(quick=args.common.quick),
        output=args.common.output,
        resume=args.common.resume,
    )
    return diversity_points(lines, task, args.budgets)


def main(argv: Sequence[str] | None = None) -> None:
    """Load, play, write every view."""
    args = parse(argv, prog="vitprune analyse")
    args.prepare()
    from vitprune_env.benchmarking.per_image import Views, record
    from vitprune_env.engine.kernels import autocast

    with autocast(args.common.device, args.amp):
        policy, backbone = evaluate.load(args)
        test = args.held_out(backbone, args.budgeted or bool(args.budgets))
        records = record(backbone, policy, test, evaluate.sites_of(args))
        views = Views(name_of(args), policy, backbone, records, test, args.common.output)
        print(views.images())
        if "difficulty" in args.views:
            print(views.difficulty(args.difficulty))
        if "diversity" in args.views:
            points, missing = points_of(args, policy, backbone, records, test)
            print("\n".join([views.diversity(points), *missing]))
        if "layers" in args.views:
            print(views.layers())
        if "lives" in args.views:
            print(views.lives())
    print(f"figures and numbers are in {args.common.output}/")
