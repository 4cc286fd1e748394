"""Games in which images have different numbers of tokens by the time a policy gets to see them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from helpers import random_images, random_keeps, toy
from vitprune_env.engine.backbone import Backbone
from vitprune_env.game.rollout import play
from vitprune_env.game.token_game import TokenGame
from vitprune_env.policy import BasePolicy, Policy
from vitprune_env.types import Decision, Episode, Observation


@dataclass
class Ragged(BasePolicy):
    """Drops given tokens at a first site of its own, and leaves the others to a policy."""

    keep: Tensor  # [B, N]
    policy: Policy

    def __post_init__(self) -> None:
        self.needs = self.policy.needs
        self.attention_bias = self.policy.attention_bias

    def decide(self, obs: Observation) -> Decision:
        if not obs.step:
            return Decision(keep=self.keep)
        return self.policy.decide(replace(obs, step=obs.step - 1, num_steps=obs.num_steps - 1))


def ragged_keep(backbone: Backbone, batch: int, seed: int, least: int = 0) -> Tensor:
    """From hardly any token to all of them, `[B, N]` bool."""
    return random_keeps(1, batch, backbone.num_patches, seed, least)[0]


def play_ragged(
    backbone: Backbone, policy: Policy, keep: Tensor, images: Tensor, sites: Sequence[str] = ("1", "2.attn", "3.attn")
) -> Episode:
    """A game whose first site is ragged; the policy acts at the others."""
    ragged = Ragged(keep, policy)
    return play(TokenGame.for_policy(backbone, ragged, sites=sites), ragged, images, record=True)


def check_batch_independence(policy: Policy, seed: int, name: str = "deit_tiny_patch16_224", batch: int = 8) -> None:
    """Every image is decided, classified and charged as if it were alone."""
    backbone = toy(name)
    images, keep = random_images(backbone, batch, seed), ragged_keep(backbone, batch, seed)
    together = play_ragged(backbone, policy, keep, images)
    assert len(set(together.outcome.n_kept[:, 0].tolist())) > 3, "the counts should be ragged"
    for image in range(batch):
        alone = play_ragged(backbone, policy, keep[image : image + 1], images[image : image + 1])
        assert torch.equal(alone.keep[:, 0], together.keep[:, image])
        assert torch.equal(alone.outcome.source[0], together.outcome.source[image])
        assert torch.equal(alone.outcome.macs[0], together.outcome.macs[image])
        torch.testing.assert_close(alone.outcome.logits[0], together.outcome.logits[image], atol=2e-5, rtol=1e-5)
