"""The pruned model is the game, deployed: same decisions, same logits, whatever the batch."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from helpers import TIMM_MODELS, Fixed, key_weights, make_model, random_images, random_merges, spread_keeps, toy
from vitprune_env import BasePolicy, Decision, KeepAll, Observation, Policy, PrunedViT, TokenGame, load_backbone, play
from vitprune_env.agents import TokenActor, TokenPolicy
from vitprune_env.baselines import EViT, RandomDrop, TopK
from vitprune_env.engine.backbone import Backbone
from vitprune_env.engine.cost import CostModel
from vitprune_env.errors import EvidenceError, NumericalError, SiteError, UnknownNameError, UnsupportedBackboneError

SITES = ["1", "2.attn", "2", "3"]  # two of them share one attention
ALL = frozenset({"cls_attention", "mean_attention", "keys", "value_norms"})


def token_policy(backbone: Backbone, seed: int = 0) -> TokenPolicy:
    """An actor with opinions: it keeps about half of the tokens, of some images more than of others."""
    generator = torch.Generator().manual_seed(seed)
    actor = TokenActor(backbone.embed_dim, generator=generator)
    with torch.no_grad():
        for parameter in actor.layers.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return TokenPolicy(actor, sites=(1, 2, 3))


def describe(policy: object) -> str:
    """A test id that is the same in every process."""
    return policy if isinstance(policy, str) else f"{type(policy).__name__}-{getattr(policy, 'fuse', '')}"


class Loud(BasePolicy):
    """Keeps what is larger than its image's mean; asks for all evidence, and checks that it belongs to the tokens."""

    needs = ALL

    def decide(self, obs: Observation) -> Decision:
        assert all(len(values) == len(obs.tokens) for values in obs.evidence.values())
        norms = obs.scatter(obs.evidence["keys"].norm(dim=1) * obs.evidence["cls_attention"])
        return Decision(keep=obs.alive & (norms >= norms.sum(1, keepdim=True) / obs.num_alive.clamp(min=1)[:, None]))


@torch.no_grad()
def agrees_with_the_game(model: PrunedViT, images: Tensor, atol: float = 1e-6) -> None:
    """Same tokens in the same places, same logits."""
    game = TokenGame.for_policy(model.backbone, model.policy, sites=model.sites)
    outcome = play(game, model.policy, images).outcome
    features = model.forward_features(images)
    assert torch.equal(features.alive, outcome.alive)
    assert torch.equal(features.source, outcome.source)
    torch.testing.assert_close(features.size, outcome.size)
    torch.testing.assert_close(model.forward_head(features), outcome.logits, atol=atol, rtol=1e-5)
    torch.testing.assert_close(model(images), outcome.logits, atol=atol, rtol=1e-5)


@pytest.mark.parametrize("name", sorted(TIMM_MODELS))
@torch.no_grad()
def test_plays_the_game_on_every_backbone(name: str) -> None:
    backbone = toy(name)
    images = random_images(backbone, 6)
    drops = [Decision(keep=keep) for keep in spread_keeps(backbone, SITES, 6, 0)]
    needs = ALL if backbone.has_class_token else ALL - {"cls_attention"}
    agrees_with_the_game(PrunedViT(backbone, Fixed(drops, needs=needs), SITES), images)
    merges = Fixed(random_merges(backbone, len(SITES), 6, 1), attention_bias="log_size")
    agrees_with_the_game(PrunedViT(backbone, merges, SITES), images)
    assert torch.equal(PrunedViT(backbone, KeepAll())(images), PrunedViT(backbone, KeepAll(), ["4"])(images))
    torch.testing.assert_close(PrunedViT(backbone, KeepAll())(images), backbone(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("execution", ["auto", "packed", "nested", "flex", "masked"])
@pytest.mark.filterwarnings("ignore")  # prototypes of torch and uncompiled flex attention say so
@torch.no_grad()
def test_every_execution_gives_the_same_logits(execution: str) -> None:
    backbone = toy("deit_tiny_patch16_224")
    images, keeps = random_images(backbone, 8), spread_keeps(backbone, ["1", "2", "3"], 8, 3)
    model = PrunedViT(backbone, Fixed([Decision(keep=keep) for keep in keeps]), (1, 2, 3), execution)
    oracle, _ = backbone.forward_soft(images, key_weights(backbone, (1, 2, 3), keeps))
    torch.testing.assert_close(model(images), oracle, atol=1e-5, rtol=1e-4)
    assert f"execution='{execution}'" in repr(model)


POLICIES = {
    "keep all": lambda _: KeepAll(),
    "evit": lambda _: EViT(0.6, fuse=False),
    "evit fused": lambda _: EViT(0.6),
    "topk": lambda _: TopK(0.6),
    "token policy": token_policy,
    "loud": lambda _: Loud(),
}


@pytest.mark.parametrize("name", sorted(POLICIES))
@given(seed=st.integers(0, 99), size=st.integers(2, 32))
@settings(max_examples=4)
@torch.no_grad()
def test_an_image_does_not_notice_the_others(name: str, seed: int, size: int) -> None:
    backbone = toy("vit_tiny_patch16_224")
    model = PrunedViT(backbone, POLICIES[name](backbone)).eval()
    images = random_images(backbone, size, seed)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    together, shuffled = model.forward_features(images), model.forward_features(images[order])
    assert torch.equal(together.alive[order], shuffled.alive)
    logits = model.forward_head(together)
    torch.testing.assert_close(logits[order], model.forward_head(shuffled), atol=1e-5, rtol=1e-5)
    for index in range(0, size, 5):
        alone = model.forward_features(images[index : index + 1])
        assert torch.equal(alone.alive[0], together.alive[index])
        torch.testing.assert_close(model.forward_head(alone)[0], logits[index], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_ragged_batch_of_32_is_really_ragged() -> None:
    """Guards the test above: the learnt policy keeps different numbers."""
    backbone = toy("vit_tiny_patch16_224")
    lengths = PrunedViT(backbone, token_policy(backbone)).forward_features(random_images(backbone, 32)).lengths
    assert len(set(lengths)) > 3


@pytest.mark.parametrize(
    "policy", [EViT(0.7), EViT(0.5, fuse=False), TopK(0.6), RandomDrop(0.5), KeepAll()], ids=describe
)
@torch.no_grad()
def test_counts_announced_are_counts_kept(policy: Policy) -> None:
    """The game checks what the model believes: `Decision.count`."""
    backbone = toy("deit_tiny_patch16_224")
    images = random_images(backbone, 4)
    counts: list[int | None] = []
    features = PrunedViT(backbone, policy).forward_features(images, lambda decision, _: counts.append(decision.count))
    assert None not in counts
    assert features.lengths == (backbone.num_prefix + cast(int, counts[-1]),) * 4
    play(TokenGame.for_policy(backbone, policy), policy, images)


@torch.no_grad()
def test_the_game_refuses_a_wrong_count() -> None:
    backbone = toy("deit_tiny_patch16_224")
    game = TokenGame(backbone, sites=(1,))
    alive = game.reset(random_images(backbone, 2)).alive
    with pytest.raises(ValueError, match="count"):
        game.step(Decision(keep=alive, count=3))


@given(seed=st.integers(0, 99))
@settings(max_examples=4)
@torch.no_grad()
def test_macs_are_the_closed_form_exactly(seed: int) -> None:
    backbone = toy("deit_tiny_patch16_224")
    keeps = spread_keeps(backbone, ["1", "2", "3"], 8, seed)
    model = PrunedViT(backbone, Fixed([Decision(keep=keep) for keep in keeps]), (1, 2, 3))
    with FlopCounterMode(display=False) as counter:
        model(random_images(backbone, 8))
    n_kept = torch.stack([keep.sum(dim=1) for keep in keeps], dim=1)
    assert counter.get_total_flops() == 2 * int(CostModel.of(backbone).forward(n_kept, model.sites).sum())


def test_gradients_equal_those_of_masked_execution() -> None:
    backbone = toy("deit_tiny_patch16_224")
    images, keeps = random_images(backbone, 6), spread_keeps(backbone, ["1", "3"], 6, 2)
    model = PrunedViT(backbone, Fixed([Decision(keep=keep) for keep in keeps]), (1, 3))
    weights = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
    packed = torch.autograd.grad(model(images).square().sum(), weights)
    oracle = torch.autograd.grad(
        backbone.forward_soft(images, key_weights(backbone, (1, 3), keeps))[0].square().sum(), weights
    )
    for ours, theirs in zip(packed, oracle, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_bfloat16_and_autocast_stay_near_single_precision() -> None:
    backbone = load_backbone("deit_tiny_patch16_224", img_size=64, num_classes=10)
    images, keeps = random_images(backbone, 6), spread_keeps(backbone, ["3", "6"], 6, 1)
    model = PrunedViT(backbone, Fixed([Decision(keep=keep) for keep in keeps]), (3, 6)).eval()
    exact = model(images)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(images)
    half = model.to(torch.bfloat16)(images.bfloat16())
    assert half.dtype == torch.bfloat16
    for rough in (mixed, half):
        assert (rough.float() - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"sites": (9,)}, SiteError, "1 to 4"),
        ({"execution": "paked"}, UnknownNameError, "packed"),
        ({"policy": EViT(0.5), "backbone": "vit_medium_patch16_gap_240"}, EvidenceError, "class token"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], error: type[Exception], words: str) -> None:
    arguments = {"backbone": "deit_tiny_patch16_224", "policy": KeepAll(), **changes}
    with pytest.raises(error, match=words):
        PrunedViT(**{**arguments, "backbone": toy(arguments["backbone"])})


def test_no_number_is_no_answer() -> None:
    backbone = deepcopy(toy("deit_tiny_patch16_224"))
    model, images = PrunedViT(backbone, TopK(0.5)).eval(), random_images(backbone, 3)
    with pytest.raises(NumericalError, match="logits: expected finite numbers, got NaN or infinity in 1 of 3 images"):
        model(images.index_fill(0, torch.tensor([1]), float("nan")))
    backbone.model.norm.weight.data[0] = float("nan")
    with pytest.raises(NumericalError, match="in 3 of 3 images"):
        model(images)


def test_images_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="images"):
        PrunedViT(toy("deit_tiny_patch16_224"), KeepAll())(torch.zeros(1, 3, 5, 5))


def test_a_policy_with_weights_is_part_of_the_model() -> None:
    backbone = toy("deit_tiny_patch16_224")
    names = set(PrunedViT(backbone, token_policy(backbone)).state_dict())
    assert {"policy.actor.norm.weight", "backbone.model.cls_token"} <= names
    assert all(name.startswith("backbone.") for name in PrunedViT(backbone, EViT(0.5)).state_dict())


def test_takes_a_timm_model_as_load_backbone_does() -> None:
    model = make_model("deit_tiny_patch16_224").train()
    pruned, game = PrunedViT(model, EViT(0.5)), TokenGame.for_policy(model, EViT(0.5))
    assert not model.training
    assert pruned.backbone.model is game.backbone.model is model
    agrees_with_the_game(pruned, random_images(pruned.backbone, 3))
    for wrong in ("vit_digits", None):
        for make in (lambda it: PrunedViT(it, KeepAll()), TokenGame):
            with pytest.raises(TypeError, match="backbone: expected a timm model or a Backbone"):
                make(cast(Any, wrong))
    with pytest.raises(UnsupportedBackboneError):
        TokenGame(torch.nn.Linear(2, 2))
