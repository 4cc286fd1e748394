"""A misspelt flag is refused before a command is loaded that takes seconds to load.

The flags of training are the settings of the classes that train, which need torch, timm and tianshou. Their names stand
here a second time; `tests/cli/test_known_flags.py` compares them with the flags.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

from vitprune_env.cli.flags.common import ImageFlags, ResumableFlags, TargetFlags
from vitprune_env.cli.flags.reading import names_of

SHARED = (ResumableFlags, ImageFlags, TargetFlags)  # groups of flags that are known without these packages
TRAIN = """
    preset split test_images batch_size untrained_actors views smallest_view
    algorithm init_from sites actions reward outcome price charge_overhead outcome_bonus keep_cost pay scaled
    adaptive anneal_from anneal_part price_rate price_gain sampled fixed_counts
    updates images cache_images calibration_images validate_every validation_images patience checkpoint_every amp
    log_images_every wandb
    lr lr_final adam_eps epochs minibatch max_grad_norm clip value_clip discount trace entropy value_coef
    normalize_advantages value_norm huber_delta update_chunk precision noise
    networks paper_sizes actor_hidden critic_hidden keep_bias critic_context senses
    finetune finetune_every finetune_steps finetune_batch finetune_lr trainable distill
"""
OWN = {
    "train": TRAIN,
    "reward-ratio": TRAIN + "ratios forms",
    "finetune": """
        policy checkpoint sites schedule split images train_images
        steps batch_size trainable opt lr min_lr sched warmup_steps weight_decay max_grad_norm label_smoothing distill
        temperature cache_images amp checkpoint_every
        scheme sharpness predictor_steps predictor_lr
    """,
    "finetune-backbone": """
        drop_path validate_every validate_images
        epochs steps batch_size blocks lr layer_decay weight_decay label_smoothing view_scale head_views amp
        checkpoint_every dense most_sites keep_rates
    """,
}


def misspelt(command: str, words: Sequence[str]) -> str | None:
    """What is wrong with the first flag that a command does not have; None: nothing, or the command loads quickly.

    Args:
        command: its name.
        words: of its command line.
    """
    if command not in OWN or {"-h", "--help"} & set(words):
        return None
    known = {*OWN[command].split(), *(name for group in SHARED for name in names_of(group))}
    for word in words:
        found = re.match(r"--(?!tyro-)(?:no[-_])?([a-zA-Z][\w-]*)", word)
        if found and (name := found[1].replace("-", "_")) not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean --{near[0].replace('_', '-')}?" if near else ""
            return f"Unrecognized options: {word.partition('=')[0]}{hint}"
    return None
