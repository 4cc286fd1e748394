"""`check_policy` finds what breaks the contract."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import timm
import torch

from vitprune_env import (
    Backbone,
    BasePolicy,
    Decision,
    KeepAll,
    Observation,
    PrunedViT,
    TokenGame,
    check_policy,
    load_backbone,
    play,
)
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


class KeepPositiveInPlace(BasePolicy):
    """Reuses the tensors that it is given, and leaves nothing of them."""

    needs = frozenset({"cls_attention", "keys", "brightness"})

    def decide(self, obs: Observation) -> Decision:
        keep = obs.alive
        keep &= obs.scatter(obs.tokens[:, 0] > 0, fill=False)
        seen = [obs.tokens, obs.image, obs.token, obs.offsets, obs.cls, obs.size, obs.order, obs.position]
        for values in (*seen, *obs.evidence.values()):
            values.fill_(7)
        return Decision(keep)


class KeepPositive(BasePolicy):
    """The same without a trace."""

    def decide(self, obs: Observation) -> Decision:
        return Decision(obs.scatter(obs.tokens[:, 0] > 0, fill=False))


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "vit_tiny_patch16_224_mean"])
@torch.no_grad()
def test_what_a_policy_does_to_its_observation_changes_no_game(
    name: str, count: int, backbone: Backbone, images: torch.Tensor
) -> None:
    if name.endswith("mean"):  # without prefix tokens
        options = {"img_size": 64, "depth": 4, "embed_dim": 24, "num_heads": 3, "num_classes": 5}
        model = timm.create_model("vit_tiny_patch16_224", class_token=False, global_pool="avg", **options)
        backbone = load_backbone(model)
    sites, images = (1, 2, 3), images[:count]
    needs = frozenset({"keys", "brightness"} | ({"cls_attention"} if backbone.has_class_token else set()))
    kept, logits = [], []
    for policy in (KeepPositive(), KeepPositiveInPlace()):
        policy.needs = needs
        episode = play(TokenGame.for_policy(backbone, policy, sites=sites), policy, images)
        kept.append(episode.keep)
        logits += [episode.outcome.logits, PrunedViT(backbone, policy, sites).eval()(images)]
    assert 0 < kept[0][-1].sum() < kept[0][0].numel()
    assert torch.equal(kept[0], kept[1])
    assert torch.equal(logits[0], logits[2])
    torch.testing.assert_close(logits[1], logits[3], rtol=0, atol=0)
    if count > 1:
        policy.needs = needs
        check_policy(policy, backbone, images)


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
