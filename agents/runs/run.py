"""Algorithm 1 of RL4EViT on tianshou's trainer: play a batch of games, update actor and critic, repeat, calibrate."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from tianshou.trainer import OnPolicyTrainerParams
from tianshou.utils.torch_utils import torch_train_mode
from torch import nn
from torch.utils.data import Dataset

from ...engine.backbone import Backbone
from ...envs.actions import ActionKind, KeepActions, action_kind, registered_actions
from ...errors import SettingsError
from ...files import PathLike
from ...game.rewards import RewardFn, SharedOutcome, has_price
from ...game.rollout import evaluate
from ...game.token_game import TokenGame
from ...models.load import weights_digest
from ...types import Site
from ..budgets.controller import Budget, Equilibrium, Share
from ..finetuning.alternate import Alternation
from ..finetuning.loop import finetune as finetune_network
from ..finetuning.settings import FinetuneConfig
from ..learners.learner import LearnerConfig, learner_state, restore_learner
from ..learners.mappo import MAPPOConfig
from ..merging.policy import MergePolicy, PairActor
from ..policies import TokenPolicy
from ..senses import needed
from ..shared.processes import Processes
from ..shared.settings import check_type
from ..shared.signals import StopSignals
from ..shared.training_images import BatchedDataset, TrainingImages
from ..shared.writers import Writer
from .collector import GameCollector
from .divergence import check_health
from .folder import RunFolder
from .held_out import FEW, Labelled, Validation, fixed_images
from .log import RunLog
from .pictures import PICTURES, tokens_picture
from .settings import RunConfig, Settings
from .stopping import reason_to_stop

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """The result of training."""

    policy: Any  # a TokenPolicy, AdaptivePolicy or MergePolicy: greedy, its threshold calibrated to the budget
    critic: nn.Module = field(repr=False)
    history: tuple[dict[str, float], ...] = field(repr=False)  # one row of metrics per update
    target_macs: float  # the budget, or where the weights of the reward should lead, MACs per image
    train_macs: float  # what the policy costs on the calibration images
    train_accuracy: float  # its accuracy there
    backbone: Backbone = field(repr=False)  # the one given, or its fine-tuned copy
    stopped: str | None = None  # after which update training ended early, and why; None: it did all updates


def train(
    backbone: Backbone,
    data: BatchedDataset | Dataset[Any],
    budget: Budget | None = Share(0.35),  # noqa: B008, frozen
    learner: LearnerConfig = MAPPOConfig(),  # noqa: B008, frozen
    reward: RewardFn | None = None,
    run: RunConfig = RunConfig(),  # noqa: B008, frozen
    finetune: FinetuneConfig | None = None,
    *,
    sites: Sequence[int | str | Site] | None = None,
    actions: ActionKind | str = KeepActions(),  # noqa: B008, frozen
    calibration: BatchedDataset | Dataset[Any] | None = None,
    validation: BatchedDataset | Dataset[Any] | None = None,
    start: TokenPolicy | MergePolicy | None = None,
    output: PathLike | None = None,
    device: str | torch.device = "cpu",
    progress: bool = True,
    resume: bool = False,
    overwrite: bool = False,
    processes: Processes | None = None,
) -> TrainResult:
    """Train a token policy for a backbone, which itself stays as it is; fine-tuning, if asked for, trains a copy.

    Args:
        backbone: the network to prune; moved to `device`.
        data: training images, normalised as the backbone wants them, with labels.
        budget: what images may cost: `Share`, `GMACs`, `KeepRate`, or a `BudgetRange` for a policy that serves all
            budgets of a range. None: the weights of the reward decide, if it settles by itself as `PaperReward` does.
        learner: the algorithm, such as `MAPPOConfig()` or `PPOSingleConfig()`, or one of your own (`LearnerConfig`).
        reward: what agents are paid; None: the learner's default. If it has a price, the price follows the budget.
        run: length of the run, seed, images, checkpoints.
        finetune: how the network learns, too; None: it does not.
        sites: where tokens are pruned, such as `(3, 6, 9)` or `("4.attn", "7.attn")`; None: the backbone's own.
        actions: what agents may do; an object, or the name of a registered kind. With `output`, a kind of your own has
            to be registered (`register_actions`), so that the policy can be saved.
        calibration: images on which the threshold is set in the end, such as `RandomViews` of the training images, if
            the network knows those by heart; None: the training images.
        validation: images with labels that nothing is learnt from, for `RunConfig(validate_every=...)`: what the policy
            would achieve on them if it were deployed goes into the history, and may end training (`patience`). Not the
            images to report on, since they decide when training ends.
        start: a policy to go on from, such as one that was trained before or that `distilled_policy` made; it brings
            its actor with its senses, and its sites where none are given. The target is not annealed. None: a new
            actor.
        output: folder for checkpoints, history, TensorBoard events and the policy; None: nothing is written. With it,
            SIGTERM and Ctrl-C let the current update finish and save.
        device: where to train.
        progress: whether to show a progress bar.
        resume: whether to continue from the checkpoint in `output`; with an empty folder training starts afresh.
        overwrite: whether to replace a run that is in `output`, which is refused otherwise.
        processes: those that train together (`launched`); each gets the same arguments and the same result.

    Returns:
        The calibrated policy, the critic, the history, and the network that the policy goes with.

    Raises:
        TrainingStopped: (a `SystemExit`) after a signal, once everything is saved.
        StorageError: for an `output` that cannot be written, at once; when the disk is full, as soon as it is.
        TypeError: for an argument of another type than described.
        ValueError: for `resume` without `output`, an `output` that holds a run, an empty dataset, or settings that do
            not fit.
        BudgetError: for a budget that no policy can meet.
        CheckpointError: for a checkpoint that cannot be read or belongs to other settings.
        NumericalError: for NaN in logits, rewards or losses, or losses that explode; the last checkpoint is kept.
    """
    if resume and output is None:
        raise ValueError("resume: expected an output folder to resume from, got output=None")
    check_type("backbone", backbone, Backbone, "a Backbone, such as load_backbone() gives")
    check_type("learner", learner, LearnerConfig, "settings of a learner, such as MAPPOConfig()")
    reward = learner.default_reward() if reward is None else reward
    budget = Equilibrium() if budget is None else budget
    learner.check_start(start)
    if start is not None:
        if start.width != backbone.embed_dim:
            raise SettingsError(f"start: expected a policy of width {backbone.embed_dim}, got {start.width}")
        sites = start.default_sites(backbone.depth) if sites is None else sites
        budget = replace(budget, anneal_from=0.0)  # the target is the budget from the first update on
        learner = learner.continuing(start)
    settings = Settings(budget, learner, reward, run, finetune, sites, action_kind(actions, "actions"), start)
    processes = Processes() if processes is None else processes
    settings.check(processes)
    if (validation is None) != (run.validate_every == 0):
        expected, got = ("None", "a dataset") if validation is not None else ("held-out images with labels", "None")
        raise SettingsError(f"validation: expected {expected} with validate_every={run.validate_every}, got {got}")
    if output is not None:
        registered_actions(settings.actions)  # refuses a kind that the policy's file could not name
    folder = None if output is None else RunFolder(output, processes)
    backbone = backbone if finetune is None else deepcopy(backbone)
    alone = nullcontext() if folder is None else folder.alone()
    with alone, torch_train_mode(backbone.to(device), enabled=False):
        if folder is not None and not resume:
            folder.make_way(overwrite)
        training = Run(backbone, data, settings, folder, torch.device(device), processes, calibration, validation)
        if resume:
            training.resume()
        training.learn(progress and processes.is_main)
        return training.finish(progress and processes.is_main, resume)


class Run:
    """The parts of one training run; `train` puts it together and runs it to the end."""

    def __init__(
        self,
        backbone: Backbone,
        data: BatchedDataset | Dataset[Any],
        settings: Settings,
        folder: RunFolder | None,
        device: torch.device,
        processes: Processes,
        calibration: BatchedDataset | Dataset[Any] | None = None,
        validation: BatchedDataset | Dataset[Any] | None = None,
    ) -> None:
        self.calibration = calibration
        budget, learner, config = settings.budget, settings.learner, settings.run
        self.settings, self.config = settings, config
        self.folder = folder
        self.weights = "" if folder is None else weights_digest(backbone)  # before fine-tuning changes them
        self.processes = processes
        self.generator = torch.Generator().manual_seed(config.seed)
        start = settings.start
        actions, needs = settings.actions, needed(learner.networks.senses)
        sees = (actions.needs | needs, actions.attention_bias) if start is None else (start.needs, start.attention_bias)
        self.game = TokenGame(backbone, settings.sites, needs=sees[0], attention_bias=sees[1])
        width = backbone.embed_dim + budget.extra_features
        algorithm = learner.build(width, self.game.num_agents, config.updates, settings.actions, self.generator, start)
        self.actor = algorithm.actor
        self.controller = budget.controller(
            self.game, config.updates, settings.reward, self.actor.macs_per_token,
            images=config.images, generator=self.generator, processes=processes,
        )  # fmt: skip
        self.images = TrainingImages(data, self.game, config.cache_images, self.generator, device, processes)
        self.algorithm = algorithm.to(device)
        self.algorithm.processes = processes
        processes.same(self.algorithm)
        explorer = learner.explorer(self.actor, settings.actions, self.generator, self.controller.schedule.view)
        self.collector = GameCollector(
            self.algorithm,
            explorer,
            self.game,
            partial(self.images.draw, times=learner.games_per_image),
            processes=processes,
            amp=config.amp,
        )
        self.alternation: Alternation | None = None
        if settings.finetune is not None and settings.finetune.when == "alternate":
            tuned = settings.actions, settings.finetune, config.updates, self.images
            self.alternation = Alternation(backbone, self.actor, *tuned)
        self.validation: Validation | None = None
        if validation is not None:
            seed, prepared = config.seed, config.cache_images > 0
            held_out = fixed_images(validation, self.game, config.validation_images, seed, device, prepared)
            few = self._calibration_images(min(FEW, config.calibration_images), prepared)
            self.validation = Validation(self.controller, few, held_out, processes)
        self.history: list[dict[str, float]] = []
        self.signals = StopSignals(grace=1.0 if processes.size > 1 else 0.0)

    @property
    def updates_done(self) -> int:
        """Rows of the history."""
        return len(self.history)

    @property
    def stop(self) -> str | None:
        """After which update training ends early, and why; None: it goes on, or all updates are done."""
        done, updates = self.updates_done, self.config.updates
        reason = reason_to_stop(self.history, self.config.patience, led=has_price(self.settings.reward))
        return f"after update {done} of {updates}: {reason}" if reason is not None and done < updates else None

    @property
    def updates(self) -> int:
        """Updates of the whole run, as far as is known now."""
        return self.config.updates if self.stop is None else self.updates_done

    @property
    def steps(self) -> int:
        """Environment steps of an update, as tianshou counts them: images times sites."""
        return self.config.images * self.game.num_steps

    def learn(self, progress: bool) -> None:
        """Run tianshou's trainer over the updates that remain; one of its epochs is one update."""
        if self.folder is None:
            return self._learn([], progress)
        if self.updates_done < self.updates:
            self.folder.forget_finetuning()
        learner, settings = self.settings.learner, self.settings.as_json(self.game.sites)
        with self.folder.explaining(learner.lr, learner.max_grad_norm), self.signals:
            return self._learn(self.folder.writers(self.history, self.steps, self.config.wandb, settings), progress)

    def _learn(self, writers: list[Writer], progress: bool) -> None:
        config, learner = self.config, self.settings.learner
        picture = (config.log_images_every, self.picture) if config.log_images_every else None
        log = RunLog(self.after_update, config.updates, self.updates_done, self.steps, writers, progress, picture)
        params = OnPolicyTrainerParams(
            training_collector=self.collector,
            max_epochs=self.updates,
            epoch_num_steps=self.steps,
            collection_step_num_env_steps=None,
            collection_step_num_episodes=config.images,
            batch_size=learner.minibatch,
            update_step_num_repetitions=learner.epochs,
            training_fn=self.before_update,
            save_checkpoint_fn=lambda *_: self.end_update(params),
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
        return tokens_picture(self.game, self.greedy(), self.images.raw(PICTURES))

    def greedy(self, info: Mapping[str, Any] | None = None) -> Any:
        """The policy to deploy, not calibrated yet."""
        if isinstance(self.actor, PairActor):
            return MergePolicy(self.actor, sites=self.game.sites, info=info)
        return self.settings.budget.greedy(self.actor, self.game.sites, self.settings.actions, info)

    def before_update(self, epoch: int, env_step: int) -> None:
        """Set the reward of the coming games."""
        self.game.reward = self.controller.reward()

    def after_update(self, played: dict[str, Any], learnt: dict[str, float]) -> dict[str, float]:
        """Record an update and move the price; returns its row of the history."""
        assert self.collector.last is not None
        row = {
            "update": float(self.updates_done + 1),
            **self.controller.observe(self.collector.last),
            **{f"keep/{site}": rate for site, rate in played["keep"].items()},
            "return": float(played["returns"].mean()),
            **learnt,
        }
        if self.alternation is not None:
            row |= self.alternation.after(self.updates_done + 1)
        check_health(row, self.history, self.algorithm)
        self.history.append(row | self._validated(self.updates_done + 1))
        return self.history[-1]

    def _validated(self, update: int) -> dict[str, float]:
        """How the greedy policy does on held-out images, every so many updates and after the last one."""
        if self.validation is None or (update % self.config.validate_every and update < self.config.updates):
            return {}
        with torch_train_mode(self.actor, enabled=False):
            return self.validation.measure(self.greedy())

    def end_update(self, params: OnPolicyTrainerParams) -> str:
        """Save every so many updates, after the last one, and after a signal; the latter two end training.

        Args:
            params: of tianshou's trainer, which looks at their `max_epochs` before every update.
        """
        done, stop = self.updates_done, self.stop
        if stop is not None:
            params.max_epochs = done
            _log.info("training ended %s", stop)
        if self.folder is None:
            return ""
        number = self.processes.largest(self.signals.received)  # a signal to one process stops all of them
        last = done == params.max_epochs
        if number or last or done % self.config.checkpoint_every == 0:
            self.folder.save(self.state())
        if number and (not last or self._finetunes_after):
            raise self.folder.stopped(number, self.config.updates)
        return ""

    def facts(self) -> dict[str, Any]:
        """What a resumed run must have in common with its checkpoint, beside its settings."""
        return {
            "backbone": self.game.backbone.name,
            "weights": self.weights,
            "dataset_size": self.images.size,
            "first_image": self.images.digest,
        }

    def state(self) -> dict[str, Any]:
        """All that the coming updates depend on. Exploration has no state: its noise follows from seed and game."""
        return {
            "settings": self.settings.as_json(self.game.sites),
            **self.facts(),
            "target_macs": self.controller.target,
            **learner_state(self.algorithm),
            "generator": self.generator.get_state(),
            "images": self.images.state(),
            "budget": self.controller.state(),
            "finetune": {} if self.alternation is None else self.alternation.state(),
            "history": self.history,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from the result of `state`, of a run with the same settings."""
        restore_learner(self.algorithm, state, self.settings.learner.lr)
        self.generator.set_state(state["generator"])
        self.images.restore(state["images"])
        self.controller.restore(state["budget"])
        if self.alternation is not None:
            self.alternation.restore(state["finetune"])
        self.history = list(state["history"])
        self.collector.played = self.updates_done * self.config.images

    def resume(self) -> None:
        """Continue from the checkpoint in the output folder, if there is one."""
        assert self.folder is not None
        settings = self.settings.as_json(self.game.sites)
        state = self.folder.load(settings, self.facts(), self.settings.may_change)
        if state is not None:
            self.restore(state)

    def finish(self, progress: bool, resume: bool) -> TrainResult:
        """Calibrate to the budget, fine-tune the network if so set, measure, save."""
        self.game.reward = SharedOutcome()  # the last reward may have a price for each image of a batch
        batches = self._calibration_images(self.config.calibration_images)
        images = [batch for batch, _ in batches]
        policy = self.controller.calibrate(self.greedy(self._info()).eval(), images)
        if self._finetunes_after:
            self._finetune(policy, progress, resume)
            batches = self._calibration_images(self.config.calibration_images)
            policy = self.controller.calibrate(policy, [batch for batch, _ in batches])  # the features have changed
        measured = evaluate(self.game, policy, batches)
        if self.folder is not None:
            self.folder.save_policy(policy)
            if self.settings.finetune is not None:
                self.folder.save_backbone(self.game.backbone)
        if self.alternation is not None:
            self.game.backbone.requires_grad_(True)  # fine-tuning had frozen what comes before the first site
        results = self.controller.target, measured.macs, measured.accuracy, self.game.backbone, self.stop
        return TrainResult(policy, self.algorithm.critic, tuple(self.history), *results)

    def _calibration_images(self, count: int, prepared: bool = True) -> Labelled:
        """Images to set the threshold on, in batches."""
        if self.calibration is None:
            return self.images.first(count)
        return fixed_images(self.calibration, self.game, count, self.config.seed, self.images.device, prepared)

    @property
    def _finetunes_after(self) -> bool:
        return self.settings.finetune is not None and self.settings.finetune.when == "after"

    def _info(self) -> dict[str, Any]:
        """What the policy's file says about its origin."""
        finetune = self.settings.finetune
        return {
            "backbone": self.game.backbone.name,
            "target_macs": self.controller.target,
            "seed": self.config.seed,
            "algorithm": type(self.algorithm).__name__,
            "reward": type(self.settings.reward).__name__,
            "updates": self.updates_done,
            "finetune": "off" if finetune is None else finetune.when,
        }

    def _finetune(self, policy: TokenPolicy, progress: bool, resume: bool) -> None:
        """Train the network on the tokens that the finished policy keeps; what comes before the first site stays."""
        tuned = finetune_network(
            self.game.backbone,
            policy,
            self.images.dataset,
            config=self.settings.finetune,
            output=None if self.folder is None else self.folder.finetuning,
            device=self.images.device,
            progress=progress,
            resume=resume and self.folder is not None,
            overwrite=True,  # what is left there is of the run that this one replaces
            processes=self.processes,
        )
        self.game.backbone.load_state_dict(tuned.backbone.state_dict())
