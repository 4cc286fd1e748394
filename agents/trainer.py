"""Algorithm 1 of paper 000 on tianshou's trainer: play a batch of games, update actor and critic, repeat, calibrate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tianshou.algorithm.optim import AdamOptimizerFactory
from tianshou.trainer import OnPolicyTrainerParams
from tianshou.utils.torch_utils import torch_train_mode
from torch.utils.data import Dataset

from ..backbone import Backbone
from ..game import TokenGame
from ..rollout import evaluate
from ..storage import PathLike
from .budget import PolicyCost, annealed, calibrate_threshold, target_macs
from .collector import GameCollector
from .config import TrainConfig
from .health import check_health
from .images import BatchedDataset, TrainingImages
from .mappo import MAPPO, LinearDecay
from .networks import TokenActor, TokenCritic, paper_sizes
from .parallel import Processes
from .pictures import PICTURES, tokens_picture
from .policy import ExploringPolicy, TokenPolicy
from .ppo_single import Critic, ImageCritic, PPOSingle
from .run_folder import RunFolder
from .run_log import RunLog
from .run_state import facts, restore, state_of
from .schedule import CollapseDetector, make_schedule, settled_macs
from .signals import StopSignals
from .sinks import Sink


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
    processes: Processes | None = None,
) -> TrainResult:
    """Train a token policy for a backbone, which itself stays as it is.

    Args:
        backbone: the network to prune; moved to `device`.
        dataset: training images, normalised as the backbone wants them, with labels.
        config: settings; None: the defaults.
        output: folder for checkpoints, history, TensorBoard events and the policy; None: nothing is written. With it,
            SIGTERM and Ctrl-C let the current update finish and save.
        device: where to train.
        progress: whether to show a progress bar.
        resume: whether to go on from the checkpoint in `output`; on an empty folder training starts afresh.
        processes: those that train together (`parallel.launched`); each gets the same arguments and the same result.

    Returns:
        The calibrated policy, the critic and the history.

    Raises:
        TrainingStopped: (a `SystemExit`) after a signal, once everything is saved.
        StorageError: for an `output` that cannot be written, at once; when the disk is full, as soon as it is.
        ValueError: for `resume` without `output`, an empty dataset, or settings that do not fit.
        BudgetError: for a budget that no policy can meet.
        CheckpointError: for a checkpoint that cannot be read or belongs to other settings.
        NumericalError: for NaN in logits, rewards or losses, or losses that explode; the last checkpoint is kept.
    """
    if resume and output is None:
        raise ValueError("resume: expected an output folder to resume from, got output=None")
    processes = Processes() if processes is None else processes
    folder = None if output is None else RunFolder(output, processes)
    config = TrainConfig() if config is None else config
    with torch_train_mode(backbone.to(device), enabled=False):
        run = Run(backbone, dataset, config, folder, torch.device(device), processes)
        if resume:
            run.resume()
        run.learn(progress and processes.is_main)
        return run.finish()


class Run:
    """The parts of one training run; `train` puts it together and sees it through."""

    def __init__(
        self,
        backbone: Backbone,
        dataset: BatchedDataset | Dataset[Any],
        config: TrainConfig,
        folder: RunFolder | None,
        device: torch.device,
        processes: Processes,
    ) -> None:
        if config.images < processes.size:
            raise ValueError(
                f"images: expected at least one for each of {processes.size} processes, got {config.images}"
            )
        self.config = config
        self.folder = folder
        self.processes = processes
        self.generator = torch.Generator().manual_seed(config.seed)
        self.actor, critic = make_networks(backbone.embed_dim, config, self.generator)
        self.game = TokenGame(backbone, config.sites or None)
        self.cost = PolicyCost(self.game.cost, self.game.sites, self.actor.macs_per_token)
        self.target = settled_macs(config, self.cost) if config.is_free else target_macs(self.cost, **config.budget)
        self.schedule = make_schedule(config, self.cost)
        self.collapse = CollapseDetector()
        self.images = TrainingImages(dataset, self.game, config.cache_images, self.generator, device, processes)
        self.algorithm = make_algorithm(self.actor, critic, config, self.generator).to(device)
        self.algorithm.processes = processes
        processes.same(self.algorithm)
        explorer = ExploringPolicy(self.actor, self.generator)
        self.collector = GameCollector(
            self.algorithm, explorer, self.game, self.images.draw, processes=processes, amp=config.amp
        )
        self.history: list[dict[str, float]] = []
        self.signals = StopSignals()

    @property
    def updates_done(self) -> int:
        """Rows of the history."""
        return len(self.history)

    @property
    def steps(self) -> int:
        """Environment steps of an update, as tianshou counts them: images times sites."""
        return self.config.images * self.game.num_steps

    @property
    def target_share(self) -> float:
        """Target of the coming update, as a share of dense MACs."""
        share = self.target / self.game.cost.dense()
        config = self.config
        return annealed(self.updates_done, config.updates, share, config.anneal_from, config.anneal_part)

    def learn(self, progress: bool) -> None:
        """Run tianshou's trainer over the updates that remain; one of its epochs is one update."""
        if self.folder is None:
            return self._learn([], progress)
        with self.folder.explaining(self.config), self.signals:
            return self._learn(self.folder.sinks(self.config, self.history, self.steps), progress)

    def _learn(self, sinks: list[Sink], progress: bool) -> None:
        config = self.config
        picture = (config.log_images_every, self.picture) if config.log_images_every else None
        log = RunLog(self.after_update, config.updates, self.updates_done, self.steps, sinks, progress, picture)
        params = OnPolicyTrainerParams(
            training_collector=self.collector,
            max_epochs=config.updates,
            epoch_num_steps=self.steps,
            collection_step_num_env_steps=None,
            collection_step_num_episodes=config.images,
            batch_size=config.minibatch,
            update_step_num_repetitions=config.epochs,
            training_fn=self.before_update,
            save_checkpoint_fn=self.save_if_due,
            logger=log,
            resume_from_log=True,
            verbose=False,
            show_progress=False,
        )
        try:
            self.algorithm.run_training(params)
        finally:
            log.finalize()

    def picture(self) -> np.ndarray:
        """What the greedy policy prunes of a few training images."""
        return tokens_picture(self.game, TokenPolicy(self.actor), self.images.raw(PICTURES))

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
        check_health(row, self.history, self.algorithm)
        self.schedule.observe(share, played["accuracy"], target)
        self.history.append(row)
        return row

    def save_if_due(self, epoch: int, env_step: int, gradient_step: int) -> str:
        """Save every so many updates, after the last one, and when a signal came: then training ends here."""
        if self.folder is None:
            return ""
        done = self.updates_done
        number = self.processes.largest(self.signals.received)  # all processes stop where one is asked to
        if number or done % self.config.checkpoint_every == 0 or done == self.config.updates:
            self.folder.save(state_of(self))
        if number and done < self.config.updates:
            raise self.folder.stopped(number, self.config.updates)
        return ""

    def resume(self) -> None:
        """Go on from the checkpoint in the output folder, if there is one."""
        assert self.folder is not None
        state = self.folder.load(self.config, facts(self))
        if state is not None:
            restore(self, state)

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
        if self.folder is not None:
            self.folder.save_policy(policy)
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
        update_chunk=config.update_chunk,
        precision=config.precision,
        generator=generator,
    )
