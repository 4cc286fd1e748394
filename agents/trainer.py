"""Algorithm 1 of paper 000 on tianshou's trainer: play a batch of games, update actor and critic, repeat, calibrate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tianshou.algorithm.optim import AdamOptimizerFactory
from tianshou.trainer import OnPolicyTrainerParams
from tianshou.utils import TensorboardLogger
from tianshou.utils.torch_utils import torch_train_mode
from torch.utils.data import Dataset
from torch.utils.tensorboard import SummaryWriter

from ..backbone import Backbone
from ..errors import CheckpointError
from ..game import TokenGame
from ..reward import PaperReward, SharedOutcome, correct, log_probability
from ..rollout import evaluate
from ..team_reward import TeamOutcome
from .budget import PolicyCost, annealed, calibrate_threshold, target_macs
from .checkpoint import PathLike, load_state, save_policy, save_state
from .collector import GameCollector
from .config import TrainConfig
from .images import BatchedDataset, TrainingImages
from .mappo import MAPPO, LinearDecay
from .networks import TokenActor, TokenCritic, paper_sizes
from .policy import ExploringPolicy, TokenPolicy
from .ppo_single import Critic, ImageCritic, PPOSingle
from .run_log import RunLog
from .schedule import CollapseDetector, DualPrice, FedForwardKeepCost, RewardSchedule

STATE_FILE = "training.safetensors"
POLICY_FILE = "policy.safetensors"


@dataclass(frozen=True)
class TrainResult:
    """What training leaves behind."""

    policy: TokenPolicy  # greedy, its threshold calibrated to the budget
    critic: Critic
    history: tuple[dict[str, float], ...]  # one row of metrics per update
    target_macs: float  # the budget, or where `keep_cost` alone should lead, MACs per image
    train_macs: float  # what the policy costs on the calibration images
    train_accuracy: float  # its accuracy there


def train(
    backbone: Backbone,
    dataset: BatchedDataset | Dataset[Any],
    config: TrainConfig | None = None,
    *,
    output: PathLike | None = None,
    device: str | torch.device = "cpu",
    progress: bool = True,
    resume: bool = False,
) -> TrainResult:
    """Train a token policy for a backbone, which itself stays as it is.

    Args:
        backbone: the network to prune; moved to `device`.
        dataset: training images, normalised as the backbone wants them, with labels.
        config: settings; None: the defaults.
        output: folder for checkpoints, TensorBoard events and the policy; None: nothing is written.
        device: where to train.
        progress: whether to show a progress bar.
        resume: whether to go on from the checkpoint in `output`; on an empty folder training starts afresh.

    Returns:
        The calibrated policy, the critic and the history.

    Raises:
        ValueError: for `resume` without `output`, an empty dataset, or settings that do not fit.
        BudgetError: for a budget that no policy can meet.
        CheckpointError: for a checkpoint that cannot be read or belongs to other settings.
        NumericalError: for NaN in logits, rewards or losses; the last checkpoint is kept.
    """
    if resume and output is None:
        raise ValueError("resume: expected an output folder to resume from, got output=None")
    with torch_train_mode(backbone.to(device), enabled=False):
        run = _Run(backbone, dataset, TrainConfig() if config is None else config, output, torch.device(device))
        if resume:
            run.resume()
        run.learn(progress)
        return run.finish()


class _Run:
    """The parts of one training run."""

    def __init__(
        self,
        backbone: Backbone,
        dataset: BatchedDataset | Dataset[Any],
        config: TrainConfig,
        output: PathLike | None,
        device: torch.device,
    ) -> None:
        self.config = config
        self.output = None if output is None else Path(output)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.actor, critic = make_networks(backbone.embed_dim, config, self.generator)
        self.game = TokenGame(backbone, config.sites or None)
        self.cost = PolicyCost(self.game.cost, self.game.sites, self.actor.macs_per_token)
        self.target = settled_macs(config, self.cost) if config.is_free else target_macs(self.cost, **config.budget)
        self.schedule = make_schedule(config, self.cost)
        self.collapse = CollapseDetector()
        self.images = TrainingImages(dataset, self.game, config.cache_images, self.generator, device)
        self.algorithm = make_algorithm(self.actor, critic, config, self.generator).to(device)
        self.collector = GameCollector(
            self.algorithm, ExploringPolicy(self.actor, self.generator), self.game, self.images.draw
        )
        self.history: list[dict[str, float]] = []

    @property
    def updates_done(self) -> int:
        return len(self.history)

    @property
    def target_share(self) -> float:
        """Target of the coming update, as a share of dense MACs."""
        share = self.target / self.game.cost.dense()
        config = self.config
        return annealed(self.updates_done, config.updates, share, config.anneal_from, config.anneal_part)

    def learn(self, progress: bool) -> None:
        """Run tianshou's trainer over the updates that remain; one of its epochs is one update."""
        config = self.config
        writer = None if self.output is None else TensorboardLogger(SummaryWriter(self.output / "tensorboard"), 1, 1, 1)
        steps = config.images * self.game.num_steps
        log = RunLog(
            self.after_update, config.updates, self.updates_done, steps, config.checkpoint_every, writer, progress
        )
        params = OnPolicyTrainerParams(
            training_collector=self.collector,
            max_epochs=config.updates,
            epoch_num_steps=steps,
            collection_step_num_env_steps=None,
            collection_step_num_episodes=config.images,
            batch_size=config.minibatch,
            update_step_num_repetitions=config.epochs,
            training_fn=self.before_update,
            save_checkpoint_fn=None if self.output is None else self.save,
            logger=log,
            resume_from_log=True,
            verbose=False,
            show_progress=False,
        )
        try:
            self.algorithm.run_training(params)
        finally:
            log.finalize()

    def before_update(self, epoch: int, env_step: int) -> None:
        """Set the reward of the coming games."""
        self.game.reward = self.schedule.reward(self.target_share)

    def after_update(self, played: dict[str, Any], learnt: dict[str, float]) -> dict[str, float]:
        """Book an update and move the price; returns its row of the history."""
        dense, target = self.game.cost.dense(), self.target_share
        kept = list(played["keep"].values())
        share = played["macs"] / dense
        fraction = self.cost.fraction_for(target * dense)
        row = {
            "update": float(self.updates_done + 1),
            "accuracy": played["accuracy"],
            "gmacs": played["macs"] / 1e9,
            "share": share,
            "target_share": target,
            **{f"keep/{site}": rate for site, rate in played["keep"].items()},
            "price": self.schedule.price,
            "return": float(played["returns"].mean()),
            "collapsed": float(self.collapse.observe(kept[0], kept[-1], fraction, played["accuracy"])),
            **learnt,
        }
        self.schedule.observe(share, played["accuracy"], target)
        self.history.append(row)
        return row

    def save(self, epoch: int, env_step: int, gradient_step: int) -> str:
        """Write all that the coming updates depend on; tianshou's `save_checkpoint_fn`."""
        assert self.output is not None
        state = {
            "config": self.config.as_json(),
            "backbone": self.game.backbone.name,
            "target_macs": self.target,
            "algorithm": self.algorithm.state_dict(),
            "lr_schedule": [_plain(scheduler.state_dict()) for scheduler in self.algorithm.lr_schedulers],
            "generator": self.generator.get_state(),
            "images": self.images.state(),
            "schedule": self.schedule.state(),
            "collapse_streak": self.collapse.streak,
            "history": self.history,
        }
        return str(save_state(state, self.output / STATE_FILE))

    def resume(self) -> None:
        """Go on from the checkpoint in the output folder, if there is one."""
        assert self.output is not None
        path = self.output / STATE_FILE
        if not path.exists():
            return
        state = load_state(path)
        self._check_same(path, state)
        self.algorithm.load_state_dict(state["algorithm"])
        for scheduler, saved in zip(self.algorithm.lr_schedulers, state["lr_schedule"], strict=True):
            scheduler.load_state_dict({**scheduler.state_dict(), **saved})
        self.generator.set_state(state["generator"])
        self.images.restore(state["images"])
        self.schedule.restore(state["schedule"])
        self.collapse.streak = state["collapse_streak"]
        self.history = list(state["history"])

    def _check_same(self, path: Path, state: dict[str, Any]) -> None:
        differences = self.config.differences(state.get("config", {}))
        if state.get("backbone") != self.game.backbone.name:
            differences.append(f"backbone ({state.get('backbone')!r})")
        if differences:
            raise CheckpointError(
                f"{path}: expected a checkpoint of the same run to resume, got one with other {', '.join(differences)}"
            )

    def finish(self) -> TrainResult:
        """Calibrate the threshold on training images, if there is a budget, and measure there."""
        batches = self.images.first(self.config.calibration_images)
        info = {
            "backbone": self.game.backbone.name,
            "target_macs": self.target,
            "seed": self.config.seed,
            "reward": self.config.reward,
            "updates": self.updates_done,
        }
        policy = TokenPolicy(self.actor, sites=self.game.sites, info=info).eval()
        if not self.config.is_free:
            policy = calibrate_threshold(self.game, policy, [images for images, _ in batches], self.target)
        measured = evaluate(self.game, policy, batches)
        if self.output is not None:
            save_policy(policy, self.output / POLICY_FILE)
        critic = self.algorithm.critic
        assert isinstance(critic, Critic)
        history = tuple(self.history)
        return TrainResult(policy, critic, history, self.target, measured.macs, measured.accuracy)


def make_networks(embed_dim: int, config: TrainConfig, generator: torch.Generator) -> tuple[TokenActor, Critic]:
    """Actor and critic of the sizes that a configuration asks for."""
    default = paper_sizes(embed_dim) if config.paper_sizes else None
    actor = TokenActor(embed_dim, config.actor_hidden or default, config.keep_bias, generator)
    kind = ImageCritic if config.algorithm == "ppo_single" else TokenCritic
    return actor, kind(embed_dim, config.critic_hidden or default, generator)


def settled_macs(config: TrainConfig, cost: PolicyCost) -> float:
    """What play costs where the paper's reward is in equilibrium, were every image classified correctly."""
    assert config.keep_cost is not None
    fraction = min(1.0, config.outcome_bonus / config.keep_cost)
    return min(cost.at_fraction(fraction), cost.model.dense())


def make_schedule(config: TrainConfig, cost: PolicyCost) -> RewardSchedule:
    """The reward that a configuration asks for, and how it moves towards the budget."""
    outcome: Callable[..., Any] = correct if config.outcome == "correct" else log_probability
    if config.reward == "paper":
        reward = PaperReward(outcome_bonus=config.outcome_bonus, outcome=outcome)
        if config.is_free:  # as if every image came out right, so that the annealing ends at `keep_cost` itself
            return FedForwardKeepCost(reward, cost, accuracy=1.0, smoothing=1.0)
        return FedForwardKeepCost(reward, cost)
    shared = TeamOutcome if config.algorithm == "ppo_single" else SharedOutcome
    return DualPrice(shared(price=config.price, outcome=outcome), config.price_rate, config.price_gain)


def make_algorithm(actor: TokenActor, critic: Critic, config: TrainConfig, generator: torch.Generator) -> Any:
    """MAPPO or single-agent PPO with the optimiser and the learning-rate schedule of a configuration."""
    adam = AdamOptimizerFactory(lr=config.lr, eps=config.adam_eps)
    kind: Any = PPOSingle if config.algorithm == "ppo_single" else MAPPO
    return kind(
        actor=actor,
        critic=critic,
        optim=adam.with_lr_scheduler_factory(LinearDecay(config.updates, config.lr_final)),
        clip=config.clip,
        value_clip=config.value_clip,
        huber_delta=config.huber_delta,
        value_norm=config.value_norm,
        advantage_normalization=config.normalize_advantages,
        vf_coef=config.value_coef,
        ent_coef=config.entropy,
        max_grad_norm=config.max_grad_norm,
        gae_lambda=config.trace,
        gamma=config.discount,
        generator=generator,
    )


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    """What of a scheduler's state is numbers; its functions are made anew."""
    return {name: value for name, value in state.items() if name != "lr_lambdas"}
