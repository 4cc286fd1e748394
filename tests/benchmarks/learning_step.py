"""What does it save to learn without a backward pass through the network? MAPPO beside differentiable masks.

    python tests/benchmarks/learning_step.py                   # the built-in backbone and DeiT-S, one thread
    python tests/benchmarks/learning_step.py --models vit_digits --pairs 21

A step is what one batch of images costs in training: for MAPPO play and a gradient step, for masks a pass through the
network, the way back, and a step of the optimiser. Both begin with the tokens before the first site, which both keep in
memory. In play, pruned tokens are removed; masks carry them to the end, whatever the budget. MAPPO with first-order
attribution plays like MAPPO, and then takes derivatives as masks do.

One round runs every contender once, in turn; figures are medians over rounds, ratios are taken round by round. Held is
what autograd keeps for the backward pass.

Not a test: nothing is asserted about time.
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
import tyro
from torch.optim import AdamW
from update import LR, Args, Case, Held, Update, compare, learn, report

from vitprune_env import TokenGame
from vitprune_env.baselines.fitting.recipe import Problem
from vitprune_env.baselines.fitting.task import frozen
from vitprune_env.baselines.token_scores.masks import MASKS_RECIPE, MasksTask
from vitprune_env.game.rewards import START_PRICE, Attribution


def with_masks(case: Case, args: Args) -> Update:
    """A step of the fit `masks`."""
    backbone, half = case.game.backbone, 0.5 * case.game.cost.dense() / 1e9
    pictures = list(zip(case.images, case.labels.tolist(), strict=True))
    with frozen(backbone):
        problem = Problem(backbone, pictures, half, case.game.sites, None, args.seed, MASKS_RECIPE.config)
        task = cast(MasksTask, MASKS_RECIPE.task(problem))
        inputs, labels = task.data.batch(range(len(pictures)))
    optimizer = AdamW(task.module.parameters(), LR)
    noise = torch.Generator().manual_seed(args.seed)

    def step() -> None:
        with frozen(backbone):
            optimizer.zero_grad()
            task.loss(inputs, labels, noise)[0].backward()
            optimizer.step()
            task.after_step()

    return step


def with_games(case: Case, args: Args) -> Update:
    """A step of MAPPO."""
    algorithm, state = case.algorithm(), case.game.prepare(case.images)
    return lambda: learn(algorithm, case.played(algorithm.actor, args.seed, state)[2], 1)


def main() -> None:
    """Time and report."""
    args = tyro.cli(Args, default=Args(alive=0.6), description=__doc__)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    for model, count in zip(args.models, args.images, strict=False):
        case = Case.of(model, "light", count, args)
        credited = replace(case, game=TokenGame(case.game.backbone, reward=Attribution(START_PRICE)))
        runs = {
            "differentiable masks": with_masks(case, args),
            "MAPPO": with_games(case, args),
            "MAPPO, attribution": with_games(credited, args),
        }
        outcome = case.played(case.actor, args.seed)[0].outcome
        held = {name: Held().measure(run) for name, run in runs.items()}
        share = float(outcome.macs.mean()) / case.game.cost.dense()
        print(f"{model}, {count} images, games at {share:.0%} of the dense MACs, {args.threads} thread(s)", flush=True)
        report(compare(runs, args), held)


if __name__ == "__main__":
    main()
