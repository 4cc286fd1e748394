"""Loading backbones: built in, by timm name, from local files; every error says what to do."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from vitprune_env import load_backbone
from vitprune_env.errors import CheckpointError, SiteError, UnknownNameError, UnsupportedBackboneError

TINY = {"img_size": 32, "depth": 3, "embed_dim": 24, "num_heads": 3, "num_classes": 5}


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("deit_tiny_patch16_224", **TINY)


def test_built_in_backbone_needs_no_network_and_brings_its_sites() -> None:
    backbone = load_backbone()
    assert backbone.name == "vit_digits"
    assert not backbone.training
    assert 64 <= backbone.num_patches <= 144
    assert [site.block for site in backbone.default_sites] == sorted({site.block for site in backbone.default_sites})
    assert load_backbone("vit_digits", sites=(2, "4.attn")).default_sites[1].label == "4.attn"


def test_timm_name_and_module_give_the_same_backbone(network: torch.nn.Module) -> None:
    by_name = load_backbone("deit_tiny_patch16_224", **TINY)
    by_module = load_backbone(network)
    assert by_name.num_patches == by_module.num_patches == 4
    assert by_name.num_classes == by_module.num_classes == 5
    assert by_name.name == "deit_tiny_patch16_224"


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("key", [None, "model", "state_dict"])
def test_local_weights(network: torch.nn.Module, tmp_path: Path, suffix: str, key: str | None) -> None:
    path = tmp_path / f"weights{suffix}"
    state = network.state_dict()
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state if key is None else {key: state, "epoch": 3}, path)
    loaded = load_backbone("deit_tiny_patch16_224", checkpoint=path, **TINY)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(images), network.eval()(images))


def test_unknown_name_gives_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown model 'deit_tiny_patch16_22'.*deit_tiny_patch16_224"):
        load_backbone("deit_tiny_patch16_22")


def test_unsupported_architecture_is_named() -> None:
    with pytest.raises(UnsupportedBackboneError, match="got SwinTransformer"):
        load_backbone("swin_tiny_patch4_window7_224")


def test_sites_outside_the_network() -> None:
    with pytest.raises(SiteError, match="expected blocks 1 to 3, got '9'"):
        load_backbone("deit_tiny_patch16_224", sites=(1, 9), **TINY)


def test_options_that_make_no_sense(network: torch.nn.Module) -> None:
    with pytest.raises(ValueError, match="got a module"):
        load_backbone(network, pretrained=True)
    with pytest.raises(ValueError, match="vit_digits is built in"):
        load_backbone("vit_digits", num_classes=3)
    with pytest.raises(TypeError, match="model: expected a name or a timm model, got 3"):
        load_backbone(3)  # pyright: ignore[reportArgumentType]


class _Hostile:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("hostile-was-here"),))


def test_foreign_and_hostile_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    hostile = tmp_path / "hostile.pth"
    hostile.write_bytes(pickle.dumps({"model": _Hostile()}))
    other = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(2)}, other)
    garbage = tmp_path / "garbage.safetensors"
    garbage.write_bytes(b"not weights")
    for path in (hostile, other, garbage, tmp_path / "missing.pth"):
        with pytest.raises(CheckpointError, match="checkpoint: "):
            load_backbone("deit_tiny_patch16_224", checkpoint=path, **TINY)
    assert not (tmp_path / "hostile-was-here").exists()


def test_no_network_is_said_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ConnectionError, match="pass checkpoint=<local file>"):
        load_backbone("deit_tiny_patch16_224", pretrained=True)


@pytest.mark.parametrize(
    "options", [{"depth": 0}, {"depth": -1}, {"num_heads": 0}, {"img_size": 0}, {"img_size": 15}, {"x": 1}]
)
def test_networks_that_cannot_be_built_are_refused_by_name(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"^(model|depth|img_size): expected"):
        load_backbone("vit_tiny_patch16_224", **{"depth": 1, **options})


def test_no_sites_are_not_the_usual_ones() -> None:
    for name in ("vit_digits", "vit_tiny_patch16_224"):
        with pytest.raises(SiteError, match="sites: expected a non-empty sequence"):
            load_backbone(name, sites=(), **({} if name == "vit_digits" else {"depth": 1}))
