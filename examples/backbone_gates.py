"""Does a backbone need its tokens? If random pruning costs nothing, there is no game to learn.

python examples/backbone_gates.py                        # the shipped weights on the validation split
python examples/backbone_gates.py --split test
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from vitprune_env.baselines import EViT, RandomDrop
from vitprune_env.data import Digits
from vitprune_env.engine.backbone import Backbone
from vitprune_env.engine.cost import CostModel
from vitprune_env.game.rollout import evaluate
from vitprune_env.game.token_game import TokenGame
from vitprune_env.models.vit_digits import VIT_DIGITS, WEIGHTS, load_vit_digits
from vitprune_env.policy import BasePolicy, KeepAll, Policy, keep_top
from vitprune_env.types import Decision, Observation

SHARES = (0.25, 0.35)  # of the dense MACs
BATCH = 250
INKED = 0.02  # mean ink from which a patch counts as part of the digit


@dataclass(frozen=True)
class Gate:
    """A bound that the built-in backbone has to keep."""

    name: str
    bound: float
    at_least: bool = True

    def passed(self, value: float) -> bool:
        """Whether a measured value keeps it."""
        return value >= self.bound if self.at_least else value <= self.bound


GATES = (
    Gate("dense accuracy", 96.0),
    Gate("lost by RandomDrop at 25 %", 15.0),
    Gate("lost with the class token alone", 40.0),
    Gate("floor", 17.0, at_least=False),
)


class DropAll(BasePolicy):
    """Leaves the class token alone."""

    def decide(self, obs: Observation) -> Decision:
        """Drop every patch token."""
        return Decision(keep=torch.zeros_like(obs.alive))


class Scored(BasePolicy):
    """Keep `ceil(keep_rate * n)` tokens by scores fixed beforehand; plays the images in their order.

    Args:
        keep_rate: fraction kept at every site.
        scores: `[images, N]`.
    """

    def __init__(self, keep_rate: float, scores: Tensor) -> None:
        self.keep_rate, self.scores = keep_rate, scores
        self.start = self.stop = 0

    def reset(self, batch_size: int, num_agents: int) -> None:
        """Turn to the next images."""
        self.start, self.stop = self.stop, self.stop + batch_size

    def decide(self, obs: Observation) -> Decision:
        """Keep the best."""
        scores = obs.gather(self.scores[self.start : self.stop])
        return Decision(keep=keep_top(obs, scores, (obs.num_alive * self.keep_rate).ceil()))


def ink_per_patch(scenes: Digits, backbone: Backbone) -> Tensor:
    """Mean ink of the digit in every patch, `[images, N]`."""
    ink = scenes.ink(torch.arange(len(scenes)))
    return F.adaptive_avg_pool2d(ink[:, None], backbone.grid_size).flatten(1)


def taylor(backbone: Backbone, images: Tensor, labels: Tensor) -> Tensor:
    """Gain in the true class's log-probability per unit of each patch token's mask after the first site, `[B, N]`."""
    mask = torch.ones(len(images), backbone.num_patches, requires_grad=True)
    first = backbone.default_sites[0].block
    weights = torch.stack([torch.ones_like(mask)] * first + [mask] * (backbone.depth - first))
    logits, _ = backbone.forward_soft(images, weights)
    gain = logits.log_softmax(1).gather(1, labels[:, None]).sum()
    return torch.autograd.grad(gain, mask)[0]


def batches(scenes: Digits) -> Iterator[tuple[Tensor, Tensor]]:
    """All scenes, in order."""
    for start in range(0, len(scenes), BATCH):
        yield scenes.batch(torch.arange(start, min(start + BATCH, len(scenes))))


def measure(backbone: Backbone, scenes: Digits) -> dict[str, float]:
    """Play the backbone with controls, a baseline and oracles.

    Args:
        backbone: in evaluation mode; it is pruned at its default sites.
        scenes: held-out scenes.

    Returns:
        Per cent (accuracies, losses in points, shares of MACs) and tokens, by name.
    """
    images = list(batches(scenes))
    cost = CostModel.of(backbone)
    ink = ink_per_patch(scenes, backbone)
    attribution = torch.cat([taylor(backbone, *batch) for batch in images])

    def accuracy(policy: Policy) -> float:
        game = TokenGame(backbone, needs=policy.needs)
        return 100 * evaluate(game, policy, images).accuracy

    dense = accuracy(KeepAll())
    found = {
        "dense accuracy": dense,
        "floor": 100 * cost.floor(backbone.default_sites) / cost.dense(),
        "lost with the class token alone": dense - accuracy(DropAll()),
    }
    for share in SHARES:
        rate = cost.keep_rate_for(share * cost.dense(), backbone.default_sites)
        where = f"at {share:.0%}".replace("%", " %")
        found[f"keep rate {where}"] = 100 * rate
        found[f"lost by RandomDrop {where}"] = dense - accuracy(RandomDrop(rate))
        found[f"lost by EViT {where}"] = dense - accuracy(EViT(rate, fuse=False))
        found[f"lost by the ink oracle {where}"] = dense - accuracy(Scored(rate, ink))
        found[f"lost by the attribution oracle {where}"] = dense - accuracy(Scored(rate, attribution))
    inked = (ink >= INKED).sum(1).float()
    return found | {"inked tokens, mean": float(inked.mean()), "inked tokens, std": float(inked.std())}


def accuracy_by_side(backbone: Backbone, scenes: Digits, width: float = 4.0) -> dict[str, float]:
    """Dense accuracy in per cent by side of the digit, in bins of `width` pixels."""
    with torch.no_grad():
        correct = torch.cat([backbone(images).argmax(1) == labels for images, labels in batches(scenes)])
    sides = scenes.sides(torch.arange(len(scenes)))
    low, high = scenes.config.side
    starts = torch.arange(low, high, width).tolist()
    bins = {f"{start:g}-{start + width:g} px": (sides >= start) & (sides < start + width) for start in starts}
    return {name: 100 * float(correct[rows].float().mean()) for name, rows in bins.items() if rows.any()}


def table(title: str, values: dict[str, float]) -> Table:
    """Values beside the gates that they have to pass."""
    gates = {gate.name: gate for gate in GATES}
    out = Table("", "value", "gate", "", title=title)
    for name, value in values.items():
        gate = gates.get(name)
        bound = "" if gate is None else f"{'>=' if gate.at_least else '<='} {gate.bound:g}"
        verdict = "" if gate is None else ("pass" if gate.passed(value) else "FAIL")
        out.add_row(name, f"{value:.2f}", bound, verdict)
    return out


@dataclass(frozen=True)
class Config:
    """Measure the gates of the built-in backbone (per cent, points, tokens)."""

    weights: Path = WEIGHTS / "vit_digits.safetensors"
    """Weights of `vit_digits`."""
    split: str = "validation"
    """train, validation or test."""
    images: int = 3000
    """Scenes to play."""
    seed: int = 0
    """Of the scenes."""


def main(config: Config) -> None:
    """Print gates and accuracy by side."""
    torch.set_num_threads(1)
    backbone = Backbone(load_vit_digits(config.weights), "vit_digits", VIT_DIGITS.sites)
    scenes = Digits(config.split, config.images, config.seed)
    console = Console()
    console.print(table(f"vit_digits, {config.split}", measure(backbone, scenes)))
    console.print(table("accuracy by side of the digit", accuracy_by_side(backbone, scenes)))


if __name__ == "__main__":
    main(tyro.cli(Config))
