"""Policy files: every policy comes back, alone or with its network; what could not come back is refused when saving."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
import timm
import torch
from torch import Tensor, nn

from helpers import random_images, rewrite, toy
from places import ROOT
from vitprune_env import (
    Backbone,
    BasePolicy,
    Decision,
    KeepAll,
    Observation,
    PrunedViT,
    load_backbone,
    load_policy,
    load_pruned,
    register_backbone,
    register_policy,
    save_policy,
)
from vitprune_env import policy as registry
from vitprune_env.agents import AdaptivePolicy, TokenActor, TokenPolicy
from vitprune_env.baselines import LTMP, DynamicViT, EViT, LifeRegression, SubSampleMerge, ToMe, TriLevel
from vitprune_env.deploy.descriptions import build_backbone, build_policy, describe_backbone, describe_policy
from vitprune_env.deploy.policy_files import read_policy_file
from vitprune_env.errors import CheckpointError
from vitprune_env.models import load as models
from vitprune_env.models.vit_digits import VIT_DIGITS, create_vit_digits


def actor(width: int = 48) -> TokenActor:
    """An actor that keeps some tokens and prunes others."""
    made = TokenActor(width, (5, 3), generator=torch.Generator().manual_seed(4))
    nn.init.normal_(made.layers[0].weight, generator=torch.Generator().manual_seed(5))  # type: ignore[arg-type]
    return made


POLICIES: dict[str, Any] = {
    "token_policy": lambda: TokenPolicy(actor(), 0.123456789, (1, "2.attn"), {"backbone": "toy", "target_macs": 1e6}),
    "adaptive_policy": lambda: AdaptivePolicy(actor(49), (0.2, 0.4, 0.6), (1.0, 0.5, 0.1), 0.3),
    "dynamicvit": lambda: DynamicViT(0.6, 3, 48, (1, 2, 3)),
    "life_regression": lambda: LifeRegression(0.5, 3, 48, (1, 2, 3)),
    "dpc_subsample": lambda: SubSampleMerge(0.5, 48, 3, "convolution", clusters=[4, 3, 2]),
    "ltmp": lambda: LTMP((0.9, 0.8, 0.7, 0.6, 0.9, 0.8, 0.7, 0.6), 0.001),
    "evit": lambda: EViT(0.7),
    "tome": lambda: ToMe(5),
    "tri_level": lambda: TriLevel(0.5),
    "keep_all": KeepAll,
}


@pytest.fixture
def own_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    monkeypatch.setattr(registry, "_CLASSES", dict(registry._CLASSES))
    monkeypatch.setattr(models, "_BUILDERS", dict(models._BUILDERS))


def logits(backbone: Backbone, policy: Any) -> Tensor:
    with torch.no_grad():
        return PrunedViT(backbone, policy).eval()(random_images(backbone, 3))


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_comes_back_alone_and_with_its_network(name: str, tmp_path: Path) -> None:
    policy, backbone = POLICIES[name](), load_backbone()
    with torch.no_grad():
        backbone.model.cls_token.add_(0.5)
    alone = save_policy(policy, tmp_path / "new" / "alone.safetensors")
    both = save_policy(policy, tmp_path / "both.safetensors", backbone=backbone)
    header, _ = read_policy_file(alone)
    assert (header["format"], header["policy"]["name"], set(header["policy"])) == (2, name, {"name", "config"})
    assert {"vitprune_env", "torch", "timm"} <= set(header["versions"])
    expected = logits(backbone, policy)
    for path in (alone, both):
        again = load_policy(path)
        assert type(again) is type(policy)
        assert describe_policy(again) == describe_policy(policy)
        assert torch.equal(logits(backbone, again), expected)
    model = load_pruned(both)
    assert not model.training
    assert torch.equal(model(random_images(backbone, 3)), expected)
    assert (model.backbone.name, model.backbone.default_sites) == ("vit_digits", backbone.default_sites)
    with pytest.raises(CheckpointError, match="got a policy alone"):
        load_pruned(alone)
    PrunedViT(backbone, policy).save_pretrained(tmp_path / "folder")
    assert torch.equal(load_pruned(tmp_path / "folder")(random_images(backbone, 3)), expected)


def test_loading_imports_the_packages_of_built_in_policies(tmp_path: Path) -> None:
    """In a fresh interpreter; the packages are imported one after the other until the name is known."""
    for name in ("evit", "token_policy", "keep_all"):
        save_policy(POLICIES[name](), tmp_path / name)
    shutil.copy(tmp_path / "keep_all", tmp_path / "unknown")
    rewrite(tmp_path / "unknown", b"keep_all", b"no_such_")
    code = (
        "import sys, vitprune_env as vp\n"
        "loaded = lambda: [name for name in ('agents', 'baselines') if f'vitprune_env.{name}' in sys.modules]\n"
        "for name in ('keep_all', 'evit', 'token_policy'):\n"
        f"    print(type(vp.load_policy({str(tmp_path)!r} + '/' + name)).__name__, *loaded())\n"
        "try:\n"
        f"    vp.load_policy({str(tmp_path / 'unknown')!r})\n"
        "except ValueError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    *loaded, refused = done.stdout.splitlines()
    assert loaded == ["KeepAll", "EViT baselines", "TokenPolicy agents baselines"]
    assert "'no_such_' is not registered" in refused


# Classes of a user's own


@dataclass
class Brightest(BasePolicy):
    """Settings are the fields of a dataclass."""

    share: float = 0.5
    blocks: tuple[int, ...] = (1, 2)
    seen: list[int] = field(default_factory=list, init=False)

    def decide(self, obs: Observation) -> Decision:
        norms = obs.scatter(obs.tokens.norm(dim=1))
        return Decision(keep=obs.alive & (norms >= norms.quantile(1 - self.share, dim=1, keepdim=True)))


class Bare(BasePolicy, nn.Module):
    """A module without settings."""

    def __init__(self, width: int = 48, threshold: float = 0.0) -> None:
        super().__init__()
        self.threshold = threshold
        self.score = nn.Linear(width, 1)

    def decide(self, obs: Observation) -> Decision:
        return Decision(keep=obs.alive & (obs.scatter(self.score(obs.tokens)[:, 0]) > self.threshold))


class Scorer(Bare):
    """A module that says its settings."""

    def config(self) -> dict[str, Any]:
        return {"width": self.score.in_features, "threshold": self.threshold}


class Forgetful(BasePolicy):
    """Has a setting that it does not say."""

    def __init__(self, share: float = 0.5) -> None:
        self.share = share

    def decide(self, obs: Observation) -> Decision:
        return Decision(keep=obs.alive)


@pytest.mark.usefixtures("own_names")
def test_a_class_of_ones_own_comes_back_once_registered(tmp_path: Path) -> None:
    backbone, path = load_backbone(), tmp_path / "policy.safetensors"
    for policy in (Brightest(0.3, (2, 4)), Scorer(48, 0.1)):
        with pytest.raises(CheckpointError, match=r"register_policy\('a_name', (Brightest|Scorer)\)"):
            save_policy(policy, path)
    assert not path.exists()
    assert register_policy("brightest", Brightest) is Brightest
    assert register_policy("lab/scorer")(Scorer) is Scorer
    for policy in (Brightest(0.3, (2, 4)), Scorer(48, 0.1)):
        again = load_policy(save_policy(policy, path))
        assert describe_policy(again) == describe_policy(policy)
        assert torch.equal(logits(backbone, again), logits(backbone, policy))
        model = load_pruned(save_policy(policy, path, backbone))
        assert torch.equal(model(random_images(backbone, 3)), logits(backbone, policy))
    del registry._CLASSES["lab/scorer"]
    with pytest.raises(CheckpointError, match=r"'lab/scorer' is not registered.*register_policy\('lab/scorer'"):
        load_policy(path)


@pytest.mark.usefixtures("own_names")
def test_names_are_unique_and_classes_are_policies() -> None:
    register_policy("brightest", Brightest)
    register_policy("brightest", Brightest)
    again = type("Brightest", (Brightest,), {"__module__": Brightest.__module__})  # a notebook cell that runs again
    assert build_policy({"name": "brightest", "config": {}}).__class__ is Brightest
    register_policy("brightest", again)
    assert type(build_policy({"name": "brightest", "config": {}})) is again
    with pytest.raises(ValueError, match="name: expected one that is free, got 'brightest'"):
        register_policy("brightest", Scorer)
    with pytest.raises(ValueError, match="got 'evit', the name of EViT"):
        register_policy("evit")(Scorer)
    for name, cls in (("", Scorer), (3, Scorer), ("x", Scorer(4)), ("x", nn.Linear)):
        with pytest.raises(TypeError, match=r"name|cls"):
            register_policy(cast(Any, name), cast(Any, cls))


class LoudActor(TokenActor):
    """The same tensors, another computation."""

    def keep_logit(self, tokens: Tensor) -> Tensor:
        return -super().keep_logit(tokens)


def swapped_activation() -> TokenPolicy:
    policy = TokenPolicy(actor())
    policy.actor.layers[1] = nn.Tanh()
    return policy


UNSAVEABLE: dict[str, tuple[Any, str]] = {
    "an actor that is another module": (lambda: TokenPolicy(cast(Any, nn.Linear(48, 2))), r"config\(\) fails"),
    "an actor of a class of its own": (lambda: TokenPolicy(LoudActor(48)), "differs from this one.*LoudActor"),
    "another activation in the actor": (swapped_activation, "differs from this one.*Tanh"),
    "a setting that is a tensor": (lambda: TokenPolicy(actor(), info={"x": torch.ones(1)}), "JSON cannot hold.*Tensor"),
    "a setting whose keys are numbers": (lambda: TokenPolicy(actor(), info={1: 2}), "JSON cannot hold"),
    "a threshold that config() does not hold": (lambda: POLICIES["adaptive_policy"]().with_threshold(9.0), "threshold"),
    "a subclass of a registered class": (lambda: type("Mine", (EViT,), {})(0.5), "expected a registered class, got"),
    "a setting that nothing holds": (lambda: Forgetful(0.7), "share: 0.7, built again 0.5"),
}


@pytest.mark.parametrize("case", UNSAVEABLE)
@pytest.mark.usefixtures("own_names")
def test_what_could_not_be_loaded_is_not_saved(case: str, tmp_path: Path) -> None:
    register_policy("forgetful", Forgetful)
    make, words = UNSAVEABLE[case]
    path = save_policy(EViT(0.5), tmp_path / "policy.safetensors")
    before = path.read_bytes()
    for save in (
        lambda: save_policy(make(), path),
        lambda: save_policy(make(), path, load_backbone()),
        lambda: PrunedViT(load_backbone(), make()).save_pretrained(tmp_path),
    ):
        with pytest.raises(CheckpointError, match=words):
            save()
    assert [entry.name for entry in tmp_path.iterdir()] == ["policy.safetensors"]
    assert path.read_bytes() == before


@pytest.mark.usefixtures("own_names")
def test_settings_that_the_constructor_refuses_or_loses(tmp_path: Path) -> None:
    class Rounding(Scorer):
        def __init__(self, width: int, threshold: float = 0.0) -> None:
            super().__init__(width, round(threshold))

    register_policy("rounding", Rounding)
    register_policy("bare", Bare)
    policy = Rounding(48)
    policy.threshold = 0.4
    with pytest.raises(CheckpointError, match=r"differs from this one.*its settings"):
        save_policy(policy, tmp_path / "p.safetensors")
    bare = Bare()
    again = load_policy(save_policy(bare, tmp_path / "p.safetensors"))
    assert torch.equal(again.score.weight, bare.score.weight)
    bare.threshold = 1.0
    with pytest.raises(CheckpointError, match=r"threshold: 1\.0, built again 0\.0"):
        save_policy(bare, tmp_path / "p.safetensors")
    bare.threshold = 0.0
    bare.score = nn.Linear(24, 1)
    with pytest.raises(CheckpointError, match="score"):
        save_policy(bare, tmp_path / "p.safetensors")


@pytest.mark.usefixtures("own_names")
def test_saving_leaves_policy_network_and_random_state_alone(tmp_path: Path) -> None:
    register_policy("scorer", Scorer)
    backbone, policy = load_backbone(small_module()).train(), Scorer(192).train()
    backbone.model.blocks[2].eval()
    state = torch.get_rng_state()
    save_policy(policy, tmp_path / "p.safetensors", backbone)
    assert torch.equal(torch.get_rng_state(), state)
    assert backbone.training
    assert policy.training
    assert not backbone.model.blocks[2].training
    assert backbone.model.blocks[3].training


# Networks


def small_module(**options: Any) -> nn.Module:
    return timm.create_model("deit_tiny_patch16_224", img_size=48, num_classes=5, **options).eval()


def test_a_timm_module_of_ones_own_comes_back(tmp_path: Path) -> None:
    module = small_module(in_chans=1, drop_path_rate=0.1)
    cfg = {"mean": (0.1,), "std": (0.2,), "crop_pct": 0.7, "interpolation": "nearest", "url": "https://somewhere"}
    cast(Any, module).pretrained_cfg = {**cast(Any, module).pretrained_cfg, **cfg}
    backbone = load_backbone(module, sites=(2, "5.attn"))
    model = load_pruned(save_policy(EViT(0.5), tmp_path / "p.safetensors", backbone))
    assert torch.equal(model(random_images(backbone, 3)), logits(backbone, EViT(0.5)))
    assert [site.label for site in model.backbone.default_sites] == ["2", "5.attn"]
    assert (model.backbone.name, model.backbone.image_size) == (backbone.name, (48, 48))
    found = cast(Any, model.backbone.model).pretrained_cfg
    assert {name: found[name] for name in ("mean", "std", "crop_pct", "interpolation")} == dict(list(cfg.items())[:4])
    assert found["url"] != cfg["url"]
    assert describe_backbone(model.backbone) == describe_backbone(backbone)


@pytest.mark.parametrize(
    ("name", "pool"), [("deit_tiny_patch16_224.fb_in1k", "token"), ("vit_tiny_patch16_224", "avg")]
)
@torch.no_grad()
def test_names_of_timm_come_back_in_half_precision_too(name: str, pool: str) -> None:
    backbone = load_backbone(name, img_size=48, num_classes=5, global_pool=pool).to(torch.bfloat16)
    again = build_backbone(describe_backbone(backbone))
    again.load_state_dict(backbone.state_dict())
    images = random_images(backbone, 2)
    assert (again.name, again.model.global_pool) == (name, pool)
    assert torch.allclose(again(images), backbone.float()(images), atol=1e-6)


def without_architecture() -> Backbone:
    return Backbone(create_vit_digits(), "mine")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: load_backbone("deit_tiny_patch16_224", img_size=48, num_heads=6), "computes other logits"),
        (lambda: load_backbone(small_module(act_layer=nn.ReLU)), "computes other logits"),
        (lambda: load_backbone(small_module(depth=3)), "has other parameters.*blocks.3.norm1.weight: missing, built"),
        (lambda: toy("deit_tiny_patch16_224"), r"has other parameters.*cls_token: \[1, 1, 48\], built again"),
        (without_architecture, "cannot be built again.*neither registered nor"),
        (lambda: Backbone(create_vit_digits(), "resnet18"), "cannot be built again.*ResNet"),
    ],
)
def test_networks_that_could_not_be_built_again_are_refused(make: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"{words}.*register_backbone\(name, builder\)"):
        save_policy(KeepAll(), tmp_path / "p.safetensors", make())
    with pytest.raises(CheckpointError, match=words):
        PrunedViT(make(), KeepAll()).save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("own_names")
@pytest.mark.parametrize("gives", ["a module", "a backbone"])
def test_a_registered_network_comes_back(gives: str, tmp_path: Path) -> None:
    def build() -> nn.Module:
        model = create_vit_digits()
        return model if gives == "a module" else Backbone(model, "whatever", (2, 4))

    register_backbone("mine", build)
    backbone = load_backbone("mine", sites=(3,))
    assert backbone.name == "mine"
    assert [site.block for site in load_backbone("mine").default_sites] == ([2, 4, 6], [2, 4])[gives == "a backbone"]
    with torch.no_grad():
        backbone.model.cls_token.add_(1)
    path = save_policy(EViT(0.5), tmp_path / "p.safetensors", backbone)
    model = load_pruned(path)
    assert torch.equal(model(random_images(backbone, 3)), logits(backbone, EViT(0.5)))
    assert [site.block for site in model.backbone.default_sites] == [3]
    with pytest.raises(ValueError, match="mine is built in or registered and takes no timm options"):
        load_backbone("mine", num_classes=3)
    register_backbone("mine", lambda: create_vit_digits(VIT_DIGITS.__class__(**{**vars(VIT_DIGITS), "num_heads": 6})))
    with pytest.raises(CheckpointError, match="computes other logits"):
        save_policy(EViT(0.5), path, backbone)
    del models._BUILDERS["mine"]
    with pytest.raises(CheckpointError, match=r"'mine' is neither registered nor.*register_backbone\('mine'"):
        load_pruned(path)
    assert type(load_policy(path)) is EViT, "the policy needs no network"


def test_names_of_networks_are_checked() -> None:
    for name in ("vit_digits", "deit_tiny_patch16_224", "deit_tiny_patch16_224.mine"):
        with pytest.raises(ValueError, match="name: expected one that is free"):
            register_backbone(name, create_vit_digits)
    for name, builder in ((3, create_vit_digits), ("", create_vit_digits), ("mine", "create_vit_digits")):
        with pytest.raises(TypeError, match=r"name|builder"):
            register_backbone(cast(Any, name), cast(Any, builder))


@pytest.mark.parametrize(
    "change",
    [
        {"architecture": "hf-hub:somebody/model"},
        {"architecture": "local-dir:somewhere"},
        {"architecture": "os.system"},
        {"architecture": 3},
        {"architecture": None},
        {"options": {"checkpoint_path": "weights.pth"}},
        {"options": {"pretrained": True}},
        {"options": {"pretrained_cfg": "a"}},
        {"options": {"pretrained_cfg_overlay": {"file": "weights.pth"}}},
        {"options": {"img_size": "48"}},
        {"options": {"img_size": [48, 48, 48]}},
        {"options": {"num_classes": -1}},
        {"options": {"in_chans": True}},
        {"options": {"global_pool": "max"}},
        {"options": ["pretrained"]},
        {"pretrained_cfg": {"file": "weights.pth"}},
        {"pretrained_cfg": {"mean": ["a"]}},
    ],
    ids=str,
)
def test_nothing_but_checked_options_reaches_timm(change: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    description = describe_backbone(load_backbone("deit_tiny_patch16_224", img_size=48))

    def never(*args: Any, **options: Any) -> None:
        raise AssertionError(f"timm was called with {args}, {options}")

    monkeypatch.setattr(timm, "create_model", never)
    with pytest.raises(CheckpointError, match="backbone"):
        build_backbone({**description, **change})


def test_what_the_game_cannot_walk_is_refused(tmp_path: Path) -> None:
    path = save_policy(KeepAll(), tmp_path / "p.safetensors", load_backbone("deit_tiny_patch16_224", img_size=48))
    path.write_bytes(path.read_bytes().replace(b"deit_tiny_patch16_224", b"xcit_nano_12_p16_224 ".replace(b" ", b".")))
    with pytest.raises(CheckpointError, match=os.fspath(path)):
        load_pruned(path)


def test_arguments_of_a_wrong_type_are_named(tmp_path: Path) -> None:
    path = tmp_path / "policy.safetensors"
    with pytest.raises(CheckpointError, match="policy: expected an object with a method decide, got <built-in"):
        save_policy(cast(Any, len), path)
    with pytest.raises(CheckpointError, match="backbone: expected a Backbone, got 'vit_digits'"):
        save_policy(KeepAll(), path, cast(Any, "vit_digits"))
    with pytest.raises(CheckpointError, match="expected a policy file, got a folder; load_pruned"):
        load_policy(tmp_path)
