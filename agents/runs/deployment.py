"""The end of a run: from an actor that explores to a policy that meets its budget, and a network used to it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...game.rewards import SharedOutcome
from ..budgets.adaptive import AdaptivePolicy, spaced
from ..budgets.targets import calibrate_threshold
from ..finetuning.alternate import finetune_settings
from ..finetuning.loop import finetune
from ..policies import TokenPolicy

if TYPE_CHECKING:
    from .trainer import Run


def deploy(run: Run, progress: bool, resume: bool) -> TokenPolicy:
    """The greedy policy, calibrated; with `finetune="after"`, the network learns from it, and it is calibrated anew.

    Args:
        run: whose updates are done.
        progress: whether fine-tuning shows a bar.
        resume: whether fine-tuning may go on from a checkpoint in the run's folder.
    """
    config = run.config
    run.game.reward = SharedOutcome()  # nobody is paid any more; the last reward may be one of a batch of given size
    info = {
        "backbone": run.game.backbone.name,
        "target_macs": run.target,
        "seed": config.seed,
        "algorithm": config.algorithm,
        "reward": config.reward,
        "updates": run.updates_done,
        "finetune": config.finetune,
    }
    if config.adaptive:
        return _adaptive(run, info)
    policy = _calibrated(run, TokenPolicy(run.actor, sites=run.game.sites, info=info).eval())
    if config.finetune == "after":
        _finetune(run, policy, progress, resume)
        policy = _calibrated(run, policy)  # other features, other decisions at the later sites
    return policy


def greedy(run: Run) -> TokenPolicy:
    """The policy as it stands, not calibrated yet."""
    if not run.config.adaptive:
        return TokenPolicy(run.actor, sites=run.game.sites)
    shares = spaced(*run.config.adaptive)
    return AdaptivePolicy(run.actor, shares, [0.0] * len(shares), sum(run.config.adaptive) / 2, run.game.sites)


def _calibrated(run: Run, policy: TokenPolicy) -> TokenPolicy:
    if run.config.is_free:
        return policy
    batches = run.images.first(run.config.calibration_images)
    return calibrate_threshold(run.game, policy, [images for images, _ in batches], run.target)


def _adaptive(run: Run, info: dict[str, object]) -> AdaptivePolicy:
    """A threshold for every knot of the range."""
    shares = spaced(*run.config.adaptive)
    batches = [images for images, _ in run.images.first(run.config.calibration_images)]
    start, dense = [0.0] * len(shares), run.game.cost.dense()
    policies = [AdaptivePolicy(run.actor, shares, start, share, run.game.sites).eval() for share in shares]
    thresholds = [calibrate_threshold(run.game, policy, batches, policy.share * dense).threshold for policy in policies]
    share = run.target / dense
    return AdaptivePolicy(run.actor, shares, thresholds, share, run.game.sites, info).eval()


def _finetune(run: Run, policy: TokenPolicy, progress: bool, resume: bool) -> None:
    """Let the network learn from what the finished policy leaves; what comes before the first site stays."""
    tuned = finetune(
        run.game.backbone,
        policy,
        run.images.dataset,
        config=finetune_settings(run.config, run.config.finetune_steps),
        output=None if run.folder is None else run.folder.finetuning,
        device=run.images.device,
        progress=progress,
        resume=resume and run.folder is not None,
        processes=run.processes,
    )
    run.game.backbone.load_state_dict(tuned.backbone.state_dict())
