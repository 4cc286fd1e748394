"""How many images does a gradient of the actor need? Signal and noise of several ways to credit agents.

    python tests/benchmarks/credit.py                     # the built-in task at 20 %, early in training and at its end

For every estimator of `tests/support/credit_estimators.py`: the images for which the squared norm of the expected
gradient equals the variance of its mean ("images for SNR 1"), and the cosine of that mean with the control variates'.
The exact flip is of an agent at the first site, and has the gradient of that site alone. Prices are left out: agents
know them exactly.

Not a test: nothing is asserted.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor
from torch.func import functional_call, grad, vmap

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

from credit_estimators import (
    Coins,
    by_attribution,
    by_flip,
    mean_field,
    without_group,
    without_mean,
    without_others,
)
from vitprune_env import TokenGame, load_backbone, play
from vitprune_env.agents import RunConfig, Share, TokenActor, train
from vitprune_env.data import Digits
from vitprune_env.game.credit import attribution
from vitprune_env.game.rewards import correct, probability

CHUNK = 256


@dataclass(frozen=True)
class Args:
    """What to measure."""

    share: float = 0.2
    """Budget of the runs that give the actors."""
    updates: tuple[int, ...] = (10, 80)
    """Their lengths."""
    images: int = 2048
    """Images, each played `games` times."""
    games: int = 2
    """Games per image, at least 2."""
    seed: int = 0
    """Of everything."""


def gradients(actor: TokenActor, tokens: Tensor, keep: Tensor, advantage: Tensor) -> Tensor:
    """Of every image's sum of advantage times log-probability, `[B, P]`, from `[T, B, N, ...]`."""
    parameters = {name: value.detach() for name, value in actor.named_parameters()}

    def objective(parameters: dict[str, Tensor], tokens: Tensor, keep: Tensor, weight: Tensor) -> Tensor:
        logits = functional_call(actor, parameters, (tokens.flatten(0, 1),))
        chosen = logits.log_softmax(dim=1).gather(1, keep.long().flatten()[:, None]).squeeze(1)
        return (chosen * weight.flatten()).sum()

    each = vmap(grad(objective), in_dims=(None, 1, 1, 1))(parameters, tokens, keep, advantage)
    return torch.cat([value.flatten(1) for value in each.values()], dim=1)


def measure(actor: TokenActor, args: Args) -> dict[str, Tensor]:
    """Gradients per image, `[images, P]`, by name of the estimator."""
    backbone = load_backbone("vit_digits")
    game = TokenGame(backbone)
    generator = torch.Generator().manual_seed(args.seed + 1)
    data = Digits("train", size=args.images, seed=args.seed + 1)
    found: dict[str, list[Tensor]] = {}
    for rows in torch.arange(args.images).split(CHUNK):
        images, labels = data.batch(rows)
        start = game.prepare(images)
        shape = game.num_steps, len(rows), game.num_agents
        others = [
            play(game, Coins(actor, torch.rand(shape, generator=generator)), start, labels).outcome.logits
            for _ in range(args.games - 1)
        ]
        policy = Coins(actor, torch.rand(shape, generator=generator))
        episode = play(game, policy, start, labels, record=True)
        steps = game.steps
        scores = torch.stack([correct(logits, labels) for logits in (episode.outcome.logits, *others)])
        score, surprise = scores[0], (episode.keep.float() - torch.stack(policy.chance)) * episode.alive
        arguments = backbone, start, game.sites, actor, labels, probability
        average = mean_field(*arguments)
        later = [mean_field(*arguments, list(episode.keep[:step]))[step] for step in range(1, len(steps))]
        flipped = torch.zeros(shape, dtype=torch.bool)
        flipped[0, torch.arange(len(rows)), torch.randint(game.num_agents, (len(rows),), generator=generator)] = True
        other = correct(play(game, Coins(actor, policy.noise, flipped), start, labels).outcome.logits, labels)
        everyone = torch.full((len(rows),), float(game.num_agents))
        credit = attribution(backbone, start, steps, labels, probability)
        advantages = {
            "outcome": score[:, None],
            "minus the mean": without_mean(score)[:, None],
            "minus the image's other games": without_group(scores)[0][:, None],
            "control variate, average play": without_others(without_mean(score), average, surprise),
            "control variate, given earlier sites": without_others(
                without_mean(score), torch.stack([average[0], *later]), surprise
            ),
            "one exact flip at the first site": by_flip(score, other, flipped, surprise, everyone),
            "attribution": by_attribution((game.num_agents * credit).clamp(-1.0, 1.0), surprise),
        }
        dense = torch.stack([obs.dense() for obs in episode.observations])
        for name, advantage in advantages.items():
            found.setdefault(name, []).append(gradients(actor, dense, episode.keep, advantage * episode.alive))
    return {name: torch.cat(parts) for name, parts in found.items()}


def summary(found: dict[str, Tensor]) -> list[str]:
    """One line per estimator."""
    reference = torch.stack([each.mean(dim=0) for name, each in found.items() if "control" in name]).mean(dim=0)
    lines = []
    for name, each in found.items():
        mean, noise = each.mean(dim=0), float(each.var(dim=0).sum())
        signal = float(mean.square().sum()) - noise / len(each)
        needed = f"{noise / signal:.0f}" if signal > 0 else "not measurable"
        cosine = float(torch.cosine_similarity(mean, reference, dim=0))
        lines.append(f"{name:40} images for SNR 1: {needed:>15}   cosine {cosine:.2f}   noise {noise:.3g}")
    return lines


def main() -> None:
    """Train, measure, print."""
    torch.set_num_threads(1)
    args = tyro.cli(Args, description=__doc__)
    for updates in args.updates:
        run = RunConfig(updates=updates, seed=args.seed)
        data = Digits("train", size=2048, seed=args.seed)
        result = train(load_backbone("vit_digits"), data, Share(args.share), run=run, progress=False)
        print(f"\nafter {updates} updates", *summary(measure(result.policy.actor, args)), sep="\n", flush=True)


if __name__ == "__main__":
    main()
