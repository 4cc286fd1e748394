"""Algorithm 1 of paper 000 on tianshou's trainer: play a batch of games, update actor and critic, repeat, calibrate."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tianshou.trainer import OnPolicyTrainerParams
from tianshou.utils.torch_utils import torch_train_mode
from torch.utils.data import Dataset

from ...engine.backbone import Backbone
from ...errors import SettingsError
from ...files import PathLike
from ...game.rewards import RewardFn
from ...game.rollout import evaluate
from ...game.token_game import TokenGame
from ..budgets.adaptive import AdaptivePrice
from ..budgets.prices import CollapseDetector, FixedReward
from ..budgets.targets import PolicyCost, annealed
from ..finetuning.alternate import Alternation
from ..learners.ppo_single import Critic
from ..policies import TokenPolicy
from .collector import GameCollector
from .config import TrainConfig
from .deployment import deploy, greedy
from .divergence import check_health
from .factory import asked_macs, make_algorithm, make_explorer, make_networks, make_schedule
from .pictures import PICTURES, tokens_picture
from .processes import Processes
from .run_folder import RunFolder
from .run_log import RunLog
from .run_state import facts, restore, state_of
from .signals import StopSignals
from .training_images import BatchedDataset, TrainingImages
from .writers import Sink


@dataclass(frozen=True)
class TrainResult:
    """What training leaves behind."""

    policy: TokenPolicy  # greedy, its threshold calibrated to the budget
    critic: Critic
    history: tuple[dict[str, float], ...]  # one row of metrics per update
    target_macs: float  # the budget, or where `keep_cost` alone should lead, MACs per image
    train_macs: float  # what the policy costs on the calibration images
    train_accuracy: float  # its accuracy there
    backbone: Backbone  # the one given, or its fine-tuned copy


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
    reward: RewardFn | None = None,
) -> TrainResult:
    """Train a token policy for a backbone, which itself stays as it is: fine-tuning, if asked for, trains a copy.

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
        reward: what agents are paid instead of what `config` chooses; it stays as it is, and calibration alone meets
            the budget.

    Returns:
        The calibrated policy, the critic, the history, and the network that the policy goes with.

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
    backbone = backbone if config.finetune == "off" else deepcopy(backbone)
    with torch_train_mode(backbone.to(device), enabled=False):
        run = Run(backbone, dataset, config, folder, torch.device(device), processes, reward)
        if resume:
            run.resume()
        run.learn(progress and processes.is_main)
        return run.finish(progress and processes.is_main, resume)


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
        reward: RewardFn | None = None,
    ) -> None:
        for name in ("images", "finetune_batch"):
            if getattr(config, name) < processes.size:
                raise SettingsError(
                    f"{name}: expected at least one for each of {processes.size} processes, got {getattr(config, name)}"
                )
        self.config = config
        self.folder = folder
        self.processes = processes
        self.generator = torch.Generator().manual_seed(config.seed)
        self.actor, critic = make_networks(backbone.embed_dim, config, self.generator)
        self.game = TokenGame(backbone, config.sites or None)
        self.cost = PolicyCost(self.game.cost, self.game.sites, self.actor.macs_per_token)
        self.target = asked_macs(config, self.cost)
        explorer = make_explorer(self.actor, config, self.generator)
        made = None if reward is None else FixedReward(reward)
        self.schedule = made or make_schedule(config, self.cost, explorer, self.generator, processes)
        self.collapse = CollapseDetector()
        self.images = TrainingImages(dataset, self.game, config.cache_images, self.generator, device, processes)
        self.algorithm = make_algorithm(self.actor, critic, config, self.generator).to(device)
        self.algorithm.processes = processes
        processes.same(self.algorithm)
        self.collector = GameCollector(
            self.algorithm, explorer, self.game, self.images.draw, processes=processes, amp=config.amp
        )
        alternates = config.finetune == "alternate"
        self.alternation = Alternation(backbone, self.actor, config, self.images) if alternates else None
        self.history: list[dict[str, float]] = []
        self.signals = StopSignals(grace=1.0 if processes.size > 1 else 0.0)

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
        if self.updates_done < self.config.updates:
            self.folder.forget_finetuning()
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
        return tokens_picture(self.game, greedy(self), self.images.raw(PICTURES))

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
        if self.alternation is not None:
            row |= self.alternation.after(self.updates_done + 1)
        check_health(row, self.history, self.algorithm)
        if isinstance(self.schedule, AdaptivePrice):
            self.schedule.costs = self.collector.macs / dense
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
        if number and (done < self.config.updates or self.config.finetune == "after"):
            raise self.folder.stopped(number, self.config.updates)
        return ""

    def resume(self) -> None:
        """Go on from the checkpoint in the output folder, if there is one."""
        assert self.folder is not None
        state = self.folder.load(self.config, facts(self))
        if state is not None:
            restore(self, state)

    def finish(self, progress: bool, resume: bool) -> TrainResult:
        """Calibrate to the budget on training images, fine-tune the network if asked to, measure, save."""
        policy = deploy(self, progress, resume)
        batches = self.images.first(self.config.calibration_images)
        measured = evaluate(self.game, policy, batches)
        if self.folder is not None:
            self.folder.save_policy(policy)
            if self.config.finetune != "off":
                self.folder.save_backbone(self.game.backbone)
        if self.alternation is not None:
            self.game.backbone.requires_grad_(True)  # the tuner had frozen what comes before the first site
        critic = self.algorithm.critic
        assert isinstance(critic, Critic)
        history = tuple(self.history)
        return TrainResult(policy, critic, history, self.target, measured.macs, measured.accuracy, self.game.backbone)
