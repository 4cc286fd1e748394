"""Presets of baselines on stock networks: every one plays at its budget on a shrunk network of its kind."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import timm
import torch

from helpers import everyday
from vitprune_env import Backbone, PrunedViT, TokenGame, load_policy, save_policy
from vitprune_env.baselines import available, calibrate, describe, fit
from vitprune_env.benchmarking.presets import DEIT_B, DEIT_S, PUBLISHED, Published
from vitprune_env.engine.cost import CostModel
from vitprune_env.game.rollout import evaluate

DENSE = {DEIT_S: 4.599, DEIT_B: 17.564, "vit_small_patch16_224.augreg_in21k_ft_in1k": 4.599}


@cache
def shrunk(name: str) -> Backbone:
    """A network of this kind with 12 blocks, 36 tokens and random weights."""
    torch.manual_seed(0)
    sizes = {"embed_dim": 24, "num_heads": 3, "img_size": 48, "patch_size": 8, "num_classes": 4}
    return Backbone(timm.create_model(name, **sizes).eval(), name=name)


def images(count: int) -> Any:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, 48, 48, generator=generator), torch.arange(count) % 4


class Pictures:
    """Noise with labels."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return images(40)[0][index], index % 4


def share_of(preset: Published) -> float:
    return preset.share or (preset.gmacs or 0) / DENSE[preset.model]


PLAIN = [name for name, preset in PUBLISHED.items() if preset.keep_rate is None]
HALF = [name for name in PLAIN if name.endswith("-half")]
KINDS = ("deit-s", "augreg-s", "dinov2-s")
CLOSE = 0.02  # where the search may stop, above the budget
# Every method once, on the three kinds of network in turn.
ONCE = [f"{method}-{KINDS[index % 3]}-half" for index, method in enumerate(available())]


@pytest.mark.parametrize("name", everyday(ONCE, *ONCE[::3]))
def test_every_preset_builds_calibrates_deploys_and_is_read_back(name: str, tmp_path: Any) -> None:
    preset = PUBLISHED[name]
    backbone, method = shrunk(preset.model), describe(preset.policy)
    budget = share_of(preset) * CostModel.of(backbone).dense() / 1e9
    if method.recipe is None:
        policy: Any = calibrate(preset.policy, budget, backbone, [images(4)], tolerance=CLOSE)
    else:
        options: Any = {"config": method.fit_config().quick(), "progress": False}
        fitted: Any = fit(method, backbone, Pictures(), budget, **options)
        policy = calibrate(fitted.at, budget, backbone, [images(4)], knob=method.fitted_knob, tolerance=CLOSE)
    found = evaluate(TokenGame.for_policy(backbone, policy), policy, [images(4)])
    assert budget <= found.gmacs <= 1.12 * budget, "few tokens are coarse"
    again = load_policy(save_policy(policy, tmp_path / "policy.safetensors"))
    if preset.policy == "random":  # draws on in every pass
        assert again == policy
        return
    with torch.no_grad():
        models = [PrunedViT(backbone, each).eval()(images(4)[0]) for each in (policy, again)]
    assert torch.equal(*models)


def test_presets_are_of_methods_and_networks_that_exist() -> None:
    for name, preset in PUBLISHED.items():
        assert preset.policy in available()
        assert preset.model.partition(".")[0] in timm.list_models()
        assert [preset.keep_rate, preset.gmacs, preset.share].count(None) == (1 if preset.keep_rate else 2), name
        assert (preset.top1 is None) == (not preset.source), (
            "a number is printed somewhere, or marked as printed nowhere"
        )
        assert name.startswith(preset.policy)
    assert {PUBLISHED[name].policy for name in HALF} == set(available())


@pytest.mark.parametrize("name", [name for name in PLAIN if PUBLISHED[name].source and PUBLISHED[name].model == DEIT_S])
def test_printed_budgets_lie_within_the_reach_of_the_real_network(name: str) -> None:
    """From the first site on nothing would be cheaper than the floor; nothing is dearer than the dense network."""
    preset = PUBLISHED[name]
    backbone = stock(preset.model)
    method = describe(preset.policy)
    sizes = {"embed_dim": backbone.embed_dim, "num_sites": 3}
    required = {key for key, parameter in method.parameters.items() if parameter.default is parameter.empty}
    needed: dict[str, Any] = {key: value for key, value in sizes.items() if key in required}
    needed[method.knob.name] = method.knob.setting(1.0, backbone.num_patches, backbone.depth)
    policy = method(**{**method.start, **needed})
    sites = backbone.sites_for(policy, "published")
    cost = CostModel.of(backbone)
    assert preset.gmacs is not None
    assert cost.floor(sites) < 1e9 * preset.gmacs < cost.dense()


@cache
def stock(name: str) -> Backbone:
    return Backbone(timm.create_model(name), name=name)
