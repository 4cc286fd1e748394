"""What does an update cost? MAPPO's against a dense one, tianshou's stock PPO and TorchRL's, on the same games.

    python tests/benchmarks/update.py                          # the built-in backbone and DeiT-S, one thread
    python tests/benchmarks/update.py --models vit_digits --threads 2 --pairs 21

One round runs every contender once, in turn; figures are medians over rounds, ratios are taken round by round. All of
them do the same: values and advantages, then `epochs` gradient steps on all agent-steps. The game is real, the actor
fresh, with a keep bias for which the asked share of agent-steps is alive. TorchRL takes part if it can be imported.
A cycle is play and update; the dense one hides pruned tokens behind attention masks instead of removing them.

Not a test: nothing is asserted about time.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from tianshou.algorithm.optim import AdamOptimizerFactory
from tianshou.utils.torch_utils import policy_within_training_step
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

from update_rivals import Update, stock_ppo, torchrl_ppo

from dense_ppo import DenseGames, DensePPO, Settings, masked_play
from vitprune_env import TokenGame, load_backbone, play
from vitprune_env.agents.learners.buffer import GameBuffer, Trajectory
from vitprune_env.agents.learners.exploration import ExploringPolicy
from vitprune_env.agents.learners.mappo import MAPPO
from vitprune_env.agents.networks import TokenActor, TokenCritic, paper_sizes
from vitprune_env.game.rewards import SharedOutcome

LR = 1e-3
SETTINGS = Settings()
REFERENCE = "dense, full batch"


@dataclass(frozen=True)
class Args:
    """What to time."""

    models: tuple[str, ...] = ("vit_digits", "deit_small_patch16_224")
    """Backbones: they say how many tokens there are, and how wide."""
    sizes: tuple[Literal["light", "paper"], ...] = ("light", "paper")
    """Widths of actor and critic: the defaults, or the paper's."""
    images: tuple[int, ...] = (128, 16)
    """Games per update, for each model."""
    alive: float = 0.45
    """Share of the agent-steps [T, B, N] in which the agent is still in the game."""
    epochs: int = 3
    """Gradient steps per update."""
    cycle_epochs: tuple[int, ...] = (1, 15)
    """Gradient steps per update in cycles of play and update; 15 is the paper's K. Empty: no cycles."""
    threads: int = 1
    """Threads of torch; CPU time is measured with one, wall time with more."""
    pairs: int = 11
    """Rounds, at most."""
    seconds: float = 60.0
    """Stop a comparison after the round that exceeds this."""
    rivals: bool = True
    """Whether stock PPO and TorchRL take part."""
    seed: int = 0
    """Of images, exploration and the networks of `deit_small`."""


@dataclass(frozen=True)
class Case:
    """One backbone, one pair of networks, one batch of images."""

    game: TokenGame
    actor: TokenActor
    critic: TokenCritic
    images: Tensor
    labels: Tensor

    @classmethod
    def of(cls, model: str, sizes: str, count: int, args: Args) -> Case:
        """Real images would cost the same."""
        backbone = load_backbone(model)
        game = TokenGame(backbone, reward=SharedOutcome())
        hidden = paper_sizes(backbone.embed_dim) if sizes == "paper" else None
        actor = TokenActor(backbone.embed_dim, hidden, keep_bias=keep_bias(args.alive, game.num_steps))
        images = torch.randn(count, backbone.in_chans, *backbone.image_size)
        labels = torch.randint(backbone.num_classes, (count,))
        return cls(game, actor, TokenCritic(backbone.embed_dim, hidden), images, labels)

    def algorithm(self, **options: Any) -> MAPPO:
        """MAPPO on copies of the networks, so that contenders do not teach each other."""
        actor = TokenActor(self.actor.embed_dim, self.actor.hidden)
        critic = TokenCritic(self.actor.embed_dim, self.critic.hidden)
        actor.load_state_dict(self.actor.state_dict())
        critic.load_state_dict(self.critic.state_dict())
        adam = AdamOptimizerFactory(lr=LR, eps=1e-5)
        return MAPPO(actor=actor, critic=critic, optim=adam, **SETTINGS.for_mappo(), **options)

    def played(self, actor: TokenActor, seed: int, state: Any = None) -> tuple[Any, ExploringPolicy, Trajectory]:
        """A batch of games, packed."""
        explorer = ExploringPolicy(actor, torch.Generator().manual_seed(seed))
        images = self.images if state is None else state
        episode = play(self.game, explorer, images, self.labels, record=True)
        return episode, explorer, Trajectory.of(episode, explorer.actions, explorer.log_probs)


def keep_bias(alive: float, steps: int) -> float:
    """Log-odds of keeping for which a share `alive` of all agent-steps is alive: mean of 1, p, p^2 ... equals it."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        small = sum(middle**step for step in range(steps)) / steps < alive
        low, high = (middle, high) if small else (low, middle)
    return float(torch.logit(torch.tensor(low)))


def learn(algorithm: MAPPO, rows: Trajectory, epochs: int, minibatch: int | None = None) -> None:
    """One update."""
    buffer = GameBuffer()
    buffer.store(rows)
    with policy_within_training_step(algorithm.policy):
        algorithm.update(buffer, minibatch, epochs)


class Held:
    """Bytes that autograd holds for the backward pass, at their peak."""

    def __init__(self) -> None:
        self.now = self.peak = 0
        self._users: dict[int, int] = {}

    def measure(self, run: Update) -> int:
        """Run once and tell."""
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: _Hold(self, tensor), lambda hold: hold.tensor):
            run()
        return self.peak

    def count(self, storage: torch.UntypedStorage, sign: int) -> None:
        """One user of a storage more or less."""
        users = self._users.get(storage.data_ptr(), 0) + sign
        self._users[storage.data_ptr()] = users
        if users == (1 if sign > 0 else 0):
            self.now += sign * storage.nbytes()
            self.peak = max(self.peak, self.now)


class _Hold:
    def __init__(self, held: Held, tensor: Tensor) -> None:
        self.held, self.tensor = held, tensor
        held.count(tensor.untyped_storage(), 1)

    def __del__(self) -> None:
        self.held.count(self.tensor.untyped_storage(), -1)


def contenders(case: Case, args: Args) -> dict[str, Update]:
    """Who updates, by name; the first is what the others are compared with."""
    episode, explorer, rows = case.played(case.actor, args.seed)
    table = DenseGames.of(episode, explorer.log_probs)
    print(
        f"  {len(rows)} of {table.alive.numel()} agent-steps alive ({len(rows) / table.alive.numel():.1%})", flush=True
    )
    dense = DensePPO(case.actor, case.critic, LR, SETTINGS)
    options: dict[str, dict[str, Any]] = {
        "MAPPO, one chunk": {"update_chunk": len(rows)},
        "MAPPO": {},
        "MAPPO, bf16": {"precision": "bf16"},
    }
    found: dict[str, Update] = {REFERENCE: lambda: dense.update(table, args.epochs)}
    for name, chosen in options.items():
        algorithm = case.algorithm(**chosen)
        found[name] = lambda algorithm=algorithm: learn(algorithm, rows, args.epochs)
    if args.rivals:
        common = (rows, case.actor, case.critic, LR, SETTINGS, args.epochs)
        found["tianshou PPO"] = stock_ppo(*common)
        try:
            found["TorchRL ClipPPOLoss"] = torchrl_ppo(*common)
        except ImportError as error:
            print(f"  TorchRL takes no part: {error}", flush=True)
    return found


def cycles(case: Case, args: Args, epochs: int) -> dict[str, Update]:
    """Play and update."""
    noise = torch.Generator().manual_seed(args.seed)
    dense, ours, cached = DensePPO(case.actor, case.critic, LR, SETTINGS), case.algorithm(), case.algorithm()
    state = case.game.prepare(case.images)

    def dense_cycle() -> None:
        dense.update(masked_play(case.game, dense.actor, case.images, case.labels, noise), epochs)

    return {
        "masked play, dense update": dense_cycle,
        "packed play, MAPPO": lambda: learn(ours, case.played(ours.actor, args.seed)[2], epochs),
        "same, first blocks cached": lambda: learn(cached, case.played(cached.actor, args.seed, state)[2], epochs),
    }


def compare(runs: dict[str, Update], args: Args) -> dict[str, list[float]]:
    """Seconds of every contender, round by round; the first round only warms up."""
    clock: Callable[[], float] = time.process_time if args.threads == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in runs}
    begin = time.perf_counter()
    for number in range(args.pairs + 1):
        for name, run in runs.items():
            start = clock()
            run()
            if number:
                times[name].append(clock() - start)
        if number and time.perf_counter() - begin > args.seconds:
            break
    return times


def report(times: dict[str, list[float]], held: dict[str, int]) -> None:
    """Print a table; the first row is the reference."""
    reference = next(iter(times.values()))
    print(
        f"  {'':28s} {'ms':>9s} {'times as fast':>14s} {'quartiles':>13s} {'held, MiB':>10s}   rounds {len(reference)}"
    )
    for name, own in times.items():
        ratios = [slow / fast for slow, fast in zip(reference, own, strict=True)]
        low, high = (ratios[0], ratios[0]) if len(ratios) < 2 else statistics.quantiles(ratios, n=4)[::2]
        memory = f"{held[name] / 2**20:10.1f}" if name in held else ""
        spread = f"{low:.2f} - {high:.2f}"
        middle = f"{1e3 * statistics.median(own):9.1f} {statistics.median(ratios):14.2f}"
        print(f"  {name:28s} {middle} {spread:>13s} {memory}", flush=True)


def main() -> None:
    """Time and report."""
    args = tyro.cli(Args, description=__doc__)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    for model, count in zip(args.models, args.images, strict=False):
        for sizes in args.sizes:
            case = Case.of(model, sizes, count, args)
            widths = (case.actor.hidden, case.critic.hidden)
            print(f"{model}, {count} images, actor and critic {widths}, {args.threads} thread(s)", flush=True)
            runs = contenders(case, args)
            held = {name: Held().measure(run) for name, run in runs.items()}
            print(f"  update, {args.epochs} gradient steps", flush=True)
            report(compare(runs, args), held)
            for epochs in args.cycle_epochs:
                print(f"  cycle, {epochs} gradient steps", flush=True)
                report(compare(cycles(case, args, epochs), args), {})


if __name__ == "__main__":
    main()
