"""`check_policy` finds what breaks the contract."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import timm
import torch

from vitprune_env import Backbone, BasePolicy, Decision, KeepAll, Observation, check_policy, load_backbone
from vitprune_env.baselines import EViT, EvoViT, RandomDrop


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    torch.manual_seed(0)
    options = {"img_size": 64, "depth": 4, "embed_dim": 24, "num_heads": 3, "num_classes": 5}
    return load_backbone(timm.create_model("deit_tiny_patch16_224", **options))


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))


class KeepAboveBatchMean(BasePolicy):
    """Looks at other images: forbidden."""

    def decide(self, obs: Observation) -> Decision:
        norms = obs.tokens.norm(dim=1)
        return Decision(obs.scatter(norms > norms.mean(), fill=False))


@dataclass
class ParkBelowBatchMean(EvoViT):
    """Keeps everybody, and lets the rest of the batch decide who waits: forbidden."""

    def decide(self, obs: Observation) -> Decision:
        decision = super().decide(obs)
        norms = obs.tokens.norm(dim=1)
        waits = obs.scatter(norms < norms.mean(), fill=False)
        return replace(decision, park=waits, count=None, park_count=None)


class KeepMore(BasePolicy):
    """Wakes the dead."""

    def decide(self, obs: Observation) -> Decision:
        keep = torch.ones_like(obs.alive)
        keep[:, 0] = obs.step > 0
        return Decision(keep)


def test_good_policies_pass(backbone: Backbone, images: torch.Tensor) -> None:
    for policy in (KeepAll(), EViT(0.5)):
        check_policy(policy, backbone, images)
    check_policy(RandomDrop(0.5), backbone, images, deterministic=False)


def test_a_sampling_policy_is_found(backbone: Backbone, images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="RandomDrop decides the same batch differently"):
        check_policy(RandomDrop(0.5), backbone, images)


def test_a_policy_that_looks_at_other_images_is_found(backbone: Backbone, images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="depend on the rest of the batch"):
        check_policy(KeepAboveBatchMean(), backbone, images)


def test_waiting_that_depends_on_other_images_is_found(backbone: Backbone, images: torch.Tensor) -> None:
    check_policy(EvoViT(0.5), backbone, images)
    with pytest.raises(ValueError, match=r"ParkBelowBatchMean decides image . differently when it is alone"):
        check_policy(ParkBelowBatchMean(0.5), backbone, images)


def test_waking_the_dead_is_found(backbone: Backbone, images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="token 0 of image 0 is dead"):
        check_policy(KeepMore(), backbone, images)


def test_missing_members_are_named(backbone: Backbone, images: torch.Tensor) -> None:
    with pytest.raises(TypeError, match="object lacks needs, attention_bias, default_sites, reset, decide"):
        check_policy(object(), backbone, images)  # type: ignore[arg-type]


def test_one_image_is_not_enough(backbone: Backbone, images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="at least 2"):
        check_policy(KeepAll(), backbone, images[:1])
