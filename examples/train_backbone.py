"""Train the built-in backbone `vit_digits` from a seed, and check that it needs its tokens.

    python examples/train_backbone.py --output runs/vit_digits            # about 20 minutes on one CPU core
    python examples/train_backbone.py --output runs/quick --quick         # seconds, for a first look
    python examples/train_backbone.py --check                             # only measure the shipped weights

The output folder gets `vit_digits.safetensors` and `vit_digits.json`. An interrupted run goes on with `--resume`
and ends with the same weights, bit for bit on the same machine.
"""

from __future__ import annotations

import copy
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import Attention, Block
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from vitprune_env import Backbone, BasePolicy, Decision, KeepAll, Observation, Policy, TokenGame, evaluate
from vitprune_env.baselines import EViT, RandomDrop
from vitprune_env.benchmarking.tables import markdown
from vitprune_env.cli import explained
from vitprune_env.cli.flags import make_way, read_flags
from vitprune_env.data import Digits, DigitsConfig, batches_of
from vitprune_env.engine.cost import CostModel
from vitprune_env.errors import CheckpointError, NumericalError
from vitprune_env.models.vit_digits import VIT_DIGITS, WEIGHTS, create_vit_digits, load_vit_digits
from vitprune_env.policy import keep_top

GRID = round(create_vit_digits().patch_embed.num_patches ** 0.5)  # patches per side
CHUNK = 200  # steps whose scenes are drawn together
SHARES = (0.25, 0.35)  # of the dense MACs, at which policies are compared
INKED = 0.02  # mean ink from which a patch counts as part of the digit
EVAL_SEED = 0  # of the held-out scenes: every seed of the training is judged on the same ones


@dataclass(frozen=True)
class Config:
    """Train the built-in backbone `vit_digits`."""

    output: Path = Path("runs/vit_digits")
    """Folder for weights, report and checkpoint."""
    seed: int = 0
    """Of weights and training scenes."""
    device: str = "cpu"
    """Where to train, such as cpu or cuda."""
    threads: int = 1
    """CPU threads; the result depends on it in the last bits."""
    resume: bool = False
    """Go on from the checkpoint in the output folder, if there is one."""
    overwrite: bool = False
    """Replace the weights that lie in the output folder."""
    quick: bool = False
    """A tiny run (seconds, useless weights) to see that everything works."""
    steps: int = 4500
    """Optimiser steps."""
    batch_size: int = 64
    """Images per step; each is seen once."""
    muon_lr: float = 0.02
    """Learning rate of Muon, which trains the matrices of the blocks."""
    adam_lr: float = 3e-3
    """Learning rate of AdamW, which trains everything else."""
    weight_decay: float = 0.05
    """Of both optimisers."""
    warmup: int = 50
    """Steps of linear warm-up."""
    decay_share: float = 0.6
    """Last part of the training, in which the learning rates fall linearly to 0."""
    clip: float = 1.0
    """Largest gradient norm."""
    ema: float = 0.998
    """Decay of the weight average that is kept in the end."""
    local_share: float = 0.75
    """First part of the training, in which the model sees only the tokens around the digit: cheaper, learns sooner."""
    window: int = 7
    """Side of that window of tokens."""
    locality: float = 0.3
    """Weight of the penalty on patch tokens that look far in the first block."""
    radius: int = 1
    """How far they may look for free: rows or columns of patches."""
    rotation: float = 0.2
    """Augmentation: largest rotation of a training digit, in radians."""
    shear: float = 0.15
    """Augmentation: largest shear."""
    warp: float = 0.12
    """Augmentation: largest elastic displacement, per half side of the digit."""
    eval_images: int = 3000
    """Scenes per held-out evaluation."""
    checkpoint_every: int = 200
    """Steps between checkpoints."""
    check: bool = False
    """Train nothing: measure the weights in the package, or those of --weights."""
    weights: Path = WEIGHTS / "vit_digits.safetensors"
    """Weights to measure with --check."""


def quick(config: Config) -> Config:
    """The same run in miniature."""
    return replace(config, steps=30, batch_size=16, eval_images=100, warmup=5, checkpoint_every=10)


class Training:
    """Model, its average and its optimisers; a step is a function of (config, step number, state) alone."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.step, self.seconds = 0, 0.0
        self.model = create_vit_digits(seed=config.seed).to(config.device).train()
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        named = list(self.model.named_parameters())
        matrices = [p for name, p in named if name.startswith("blocks.") and p.ndim == 2]
        others = [p for name, p in named if not (name.startswith("blocks.") and p.ndim == 2)]
        self.optimizers = (
            torch.optim.Muon(matrices, lr=config.muon_lr, weight_decay=config.weight_decay),
            torch.optim.AdamW(others, lr=config.adam_lr, weight_decay=config.weight_decay),
        )
        self.scenes: Digits | None = None

    def run(self) -> None:
        """Train to the last step, with a checkpoint now and then."""
        config, start = self.config, time.perf_counter() - self.seconds
        with tqdm(total=config.steps, initial=self.step, unit="step") as bar:
            while self.step < config.steps:
                loss = self.advance()
                self.seconds = time.perf_counter() - start
                bar.update()
                if self.step % config.checkpoint_every == 0 or self.step == config.steps:
                    bar.set_postfix(loss=f"{float(loss):.3f}")
                    self.save(config.output / "checkpoint.pt")

    def _batch(self) -> tuple[Tensor, Tensor, Tensor]:
        """Images, labels and boxes of this step, never seen before."""
        config = self.config
        chunk, offset = divmod(self.step, CHUNK)
        if self.scenes is None or offset == 0:
            look = DigitsConfig(rotation=config.rotation, shear=config.shear, warp=config.warp)
            self.scenes = Digits("train", CHUNK * config.batch_size, seed=1000 * config.seed + chunk + 1, config=look)
        rows = torch.arange(config.batch_size) + offset * config.batch_size
        images, labels = self.scenes.batch(rows)
        return images.to(config.device), labels.to(config.device), self.scenes.boxes(rows).to(config.device)

    def advance(self) -> Tensor:
        """Take one step and return its loss."""
        config, model = self.config, self.model
        images, labels, boxes = self._batch()
        tokens = model._pos_embed(model.patch_embed(images))
        if self.step < config.local_share * config.steps:
            patches = around_digit(boxes, config.window)
            near = patches[..., None].expand(-1, -1, tokens.shape[2])
            tokens = torch.cat((tokens[:, :1], tokens[:, 1:].gather(1, near)), dim=1)
        else:
            patches = torch.arange(GRID**2, device=tokens.device).expand(len(tokens), -1)
        loss = F.cross_entropy(model.forward_head(model.norm(model.blocks(tokens))), labels)
        loss = loss + config.locality * far_looking(model.blocks[0], tokens, patches, config.radius)
        if not torch.isfinite(loss):
            raise NumericalError(f"loss: expected a finite number, got {loss.item()} in step {self.step}")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        for optimizer, rate in zip(self.optimizers, (config.muon_lr, config.adam_lr), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * self._rate()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        # Shorter at first, so that the initial weights do not linger in the average.
        decay = min(config.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(model.parameters()), 1 - decay)
        self.step += 1
        return loss.detach()

    def _rate(self) -> float:
        """Warm-up, constant, linear decay; 0 to 1."""
        config = self.config
        left = (config.steps - self.step) / (config.decay_share * config.steps)
        return min(1.0, (self.step + 1) / config.warmup, left)

    def save(self, path: Path) -> None:
        """Write a checkpoint, never leaving half a file."""
        state = {
            "recipe": recipe(self.config),
            "step": self.step,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        torch.save(state, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)

    def load(self, path: Path) -> None:
        """Go on where a checkpoint of the same recipe left off.

        Raises:
            CheckpointError: If it was written with other settings.
        """
        state = torch.load(path, map_location=self.config.device, weights_only=True)
        if state["recipe"] != recipe(self.config):
            raise CheckpointError(f"resume: expected a checkpoint of {recipe(self.config)}, got {state['recipe']}")
        self.step, self.seconds = state["step"], state["seconds"]
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


def recipe(config: Config) -> dict[str, Any]:
    """The settings that decide the weights."""
    free = {"output", "resume", "overwrite", "quick", "checkpoint_every", "eval_images", "check", "weights"}
    return {name: value for name, value in asdict(config).items() if name not in free}


def around_digit(boxes: Tensor, window: int) -> Tensor:
    """Patch numbers `[B, window ** 2]` of the window around each digit, given boxes `[B, 4]` in pixels."""
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2 * GRID / VIT_DIGITS.image_size
    corner = (centre - window / 2).round().long().clamp(0, GRID - window)  # x, y
    steps = torch.arange(window, device=boxes.device)
    rows, columns = corner[:, 1, None] + steps, corner[:, 0, None] + steps
    return (rows[:, :, None] * GRID + columns[:, None, :]).flatten(1)


def far_looking(block: nn.Module, tokens: Tensor, patches: Tensor, radius: int) -> Tensor:
    """Mean -log share of the attention that patch tokens pay to near patches and to the class token.

    Left alone, a small ViT gathers the whole image into every token in its first block; then any few tokens will do,
    and nothing is left to choose.

    Args:
        block: the first block.
        tokens: `[B, 1 + n, D]`, before it.
        patches: `[B, n]`, the number of the patch behind each token.
        radius: how far near is, in rows or columns.
    """
    attn = cast(Attention, cast(Block, block).attn)
    heads = attn.qkv(cast(Block, block).norm1(tokens)).unflatten(-1, (3, attn.num_heads, attn.head_dim))
    query, key, _ = heads.permute(2, 0, 3, 1, 4)
    share = (query[:, :, 1:] @ key.mT * attn.scale).softmax(-1)  # [B, heads, n, 1 + n]
    places = torch.stack((patches // GRID, patches % GRID), -1)
    distance = (places[:, :, None] - places[:, None]).abs().amax(-1)
    near = F.pad(distance <= radius, (1, 0), value=True)
    return -((share * near[:, None]).sum(-1) + 1e-4).log().mean()


# Does the network need its tokens? If random pruning costs nothing, there is nothing to learn.


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
        """Take the next images."""
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


def measure(backbone: Backbone, scenes: Digits) -> dict[str, float]:
    """Play the backbone with controls, a baseline and oracles.

    Args:
        backbone: in evaluation mode; it is pruned at its default sites.
        scenes: held-out scenes.

    Returns:
        Per cent (accuracies, losses in points, shares of MACs) and tokens, by name.
    """
    images = batches_of(scenes, 250)
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
        correct = torch.cat([backbone(images).argmax(1) == labels for images, labels in batches_of(scenes, 250)])
    sides = scenes.sides(torch.arange(len(scenes)))
    low, high = scenes.config.side
    starts = torch.arange(low, high, width).tolist()
    bins = {f"{start:g}-{start + width:g} px": (sides >= start) & (sides < start + width) for start in starts}
    return {name: 100 * float(correct[rows].float().mean()) for name, rows in bins.items() if rows.any()}


def table(values: dict[str, float]) -> str:
    """Values beside the gates that they have to pass, as markdown."""
    gates = {gate.name: gate for gate in GATES}
    rows = []
    for name, value in values.items():
        gate = gates.get(name)
        bound = "" if gate is None else f"{'>=' if gate.at_least else '<='} {gate.bound:g}"
        verdict = "" if gate is None else ("pass" if gate.passed(value) else "FAIL")
        rows.append({"measured": name, "value": f"{value:.2f}", "gate": bound, "verdict": verdict})
    return markdown(rows)


def rounded(values: dict[str, float]) -> dict[str, float]:
    """Without the digits that mean nothing."""
    return {name: round(value, 2) for name, value in values.items()}


def held_out(config: Config, backbone: Backbone) -> dict[str, Any]:
    """Gates and accuracy by the digit's side on both held-out splits, ready for JSON."""
    found = {}
    for split in ("validation", "test"):
        scenes = Digits(split, config.eval_images, EVAL_SEED)
        found[split] = {
            "scenes": config.eval_images,
            "seed": EVAL_SEED,
            "gates": rounded(measure(backbone, scenes)),
            "accuracy by side": rounded(accuracy_by_side(backbone, scenes)),
        }
    return found


def report(config: Config, training: Training) -> dict[str, Any]:
    """Settings, versions and held-out figures, ready for JSON."""
    found = held_out(config, Backbone(training.average.cpu().eval(), "vit_digits", VIT_DIGITS.sites))
    return {
        "preset": asdict(VIT_DIGITS),
        "recipe": recipe(config),
        "seconds": round(training.seconds, 1),
        "machine": platform.machine(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__},
        "held out": found,
        "passed": {gate.name: gate.passed(found["validation"]["gates"][gate.name]) for gate in GATES},
    }


def train(config: Config) -> dict[str, Any]:
    """Train, or go on; weights and report are in the output folder."""
    config.output.mkdir(parents=True, exist_ok=True)
    if not config.resume:
        make_way(config.output, ("vit_digits.safetensors", "checkpoint.pt"), config.overwrite, config.quick)
    training, checkpoint = Training(config), config.output / "checkpoint.pt"
    if config.resume and checkpoint.exists():
        training.load(checkpoint)
    training.run()
    save_file(training.average.state_dict(), config.output / "vit_digits.safetensors")
    figures = report(config, training)
    (config.output / "vit_digits.json").write_text(json.dumps(figures, indent=2) + "\n")
    return figures["held out"]


def main(argv: Sequence[str] | None = None) -> None:
    """Train or check, print what was measured."""
    config = read_flags(Config, argv, __doc__)
    config = quick(config) if config.quick else config
    torch.set_num_threads(config.threads)
    if config.check:
        shipped = Backbone(load_vit_digits(config.weights), "vit_digits", VIT_DIGITS.sites)
        found = held_out(config, shipped)
    else:
        found = train(config)
    for split, values in found.items():
        print(f"\nvit_digits, {split}\n\n{table(values['gates'])}\n\n{table(values['accuracy by side'])}")


if __name__ == "__main__":
    with explained(Config):
        main(sys.argv[1:])
