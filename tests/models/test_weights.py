"""Weights of other sizes and layouts: DeiT's files, AugReg's .npz, other image and patch sizes, other heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from vitprune_env import Backbone, PrunedViT, load_backbone, load_pruned, save_backbone, save_policy
from vitprune_env.agents.runs.folder import RunFolder
from vitprune_env.agents.shared.processes import Processes
from vitprune_env.baselines import EViT
from vitprune_env.errors import CheckpointError, UnknownNameError
from vitprune_env.models.load import about_weights

NAME = "vit_tiny_patch16_224"
TINY: dict[str, Any] = {"img_size": 64, "depth": 2, "embed_dim": 24, "num_heads": 3, "num_classes": 5}


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """A small ViT whose every parameter matters."""
    torch.manual_seed(0)
    model = timm.create_model(NAME, **TINY).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape))
    return model


def images(size: int = 64) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def augreg(model: nn.Module) -> dict[str, np.ndarray]:
    """The model's weights in the layout of the JAX checkpoints: kernels in x out, heads apart, convolutions HWIO."""
    state = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    width, heads = TINY["embed_dim"], TINY["num_heads"]
    out = {
        "cls": state["cls_token"],
        "embedding/kernel": state["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        "Transformer/posembed_input/pos_embedding": state["pos_embed"],
        "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
        "head/kernel": state["head.weight"].T,
        "head/bias": state["head.bias"],
    }
    for index in range(TINY["depth"]):
        ours, theirs = f"blocks.{index}.", f"Transformer/encoderblock_{index}/"
        attention = theirs + "MultiHeadDotProductAttention_1/"
        weights = state[ours + "attn.qkv.weight"].reshape(3, heads, width // heads, width)
        biases = state[ours + "attn.qkv.bias"].reshape(3, heads, width // heads)
        for part, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
            out[f"{attention}{part}/kernel"] = weight.transpose(2, 0, 1)
            out[f"{attention}{part}/bias"] = bias
        out[attention + "out/kernel"] = state[ours + "attn.proj.weight"].T.reshape(heads, width // heads, width)
        out[attention + "out/bias"] = state[ours + "attn.proj.bias"]
        for norm, layer in (("norm1", "LayerNorm_0"), ("norm2", "LayerNorm_2")):
            out[f"{theirs}{layer}/scale"] = state[f"{ours}{norm}.weight"]
            out[f"{theirs}{layer}/bias"] = state[f"{ours}{norm}.bias"]
        for linear, layer in (("fc1", "Dense_0"), ("fc2", "Dense_1")):
            out[f"{theirs}MlpBlock_3/{layer}/kernel"] = state[f"{ours}mlp.{linear}.weight"].T
            out[f"{theirs}MlpBlock_3/{layer}/bias"] = state[f"{ours}mlp.{linear}.bias"]
    return out


def save_as(model: nn.Module, path: Path) -> Path:
    """Write weights in the format that the suffix names."""
    if path.suffix == ".npz":
        np.savez(path, **cast(Any, augreg(model)))
    elif path.suffix == ".safetensors":
        save_file(model.state_dict(), path)
    else:
        torch.save({"model": model.state_dict()}, path)
    return path


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".npz"])
def test_every_format_gives_the_same_network(network: nn.Module, tmp_path: Path, suffix: str) -> None:
    path = save_as(network, tmp_path / f"weights{suffix}")
    loaded = load_backbone(NAME, checkpoint=path, **TINY)
    assert torch.allclose(loaded(images()), network(images()), atol=1e-6)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".npz"])
@pytest.mark.parametrize("size", [96, 48])
def test_position_embeddings_are_interpolated(network: nn.Module, tmp_path: Path, suffix: str, size: int) -> None:
    path = save_as(network, tmp_path / f"weights{suffix}")
    loaded = load_backbone(NAME, checkpoint=path, **(TINY | {"img_size": size}))
    side = size // 16
    options = {"interpolation": "bilinear", "antialias": False} if suffix == ".npz" else {}
    expected = resample_abs_pos_embed(cast(Any, network).pos_embed, [side, side], **cast(Any, options))
    assert loaded.grid_size == (side, side)
    assert torch.allclose(cast(Tensor, loaded.model.pos_embed), expected, atol=1e-6)
    assert loaded(images(size)).isfinite().all()


def test_images_need_not_be_square(network: nn.Module, tmp_path: Path) -> None:
    path = save_as(network, tmp_path / "weights.pth")
    loaded = load_backbone(NAME, checkpoint=path, **(TINY | {"img_size": (48, 96)}))
    assert loaded.grid_size == (3, 6)
    assert loaded(torch.randn(1, 3, 48, 96)).isfinite().all()


def test_patches_of_another_size_are_resampled(network: nn.Module, tmp_path: Path) -> None:
    """Patches of 8 x 8 on an image half as large see what patches of 16 x 16 see."""
    path = save_as(network, tmp_path / "weights.pth")
    loaded = load_backbone(NAME, checkpoint=path, **(TINY | {"img_size": 32, "patch_size": 8}))
    flat = torch.ones(1, 3, 32, 32) * torch.tensor([0.3, -0.2, 0.5])[:, None, None]
    large = flat.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.allclose(loaded(flat), network(large), atol=1e-2)


@pytest.mark.parametrize("suffix", [".pth", ".npz"])
def test_a_head_of_other_classes_is_refused_by_number(network: nn.Module, tmp_path: Path, suffix: str) -> None:
    path = save_as(network, tmp_path / f"weights{suffix}")
    with pytest.raises(CheckpointError, match=r"a head of 5 classes, the model one of 7"):
        load_backbone(NAME, checkpoint=path, **(TINY | {"num_classes": 7}))


@pytest.mark.parametrize("suffix", [".pth", ".npz"])
def test_other_depths_and_widths_are_refused(network: nn.Module, tmp_path: Path, suffix: str) -> None:
    path = save_as(network, tmp_path / f"weights{suffix}")
    for change in ({"depth": 1}, {"depth": 3}, {"embed_dim": 48}):
        with pytest.raises(CheckpointError, match="checkpoint: "):
            load_backbone(NAME, checkpoint=path, **(TINY | change))


def test_a_file_that_is_no_npz_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.npz"
    path.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"got .*weights\.npz"):
        load_backbone(NAME, checkpoint=path, **TINY)


def test_wrappers_of_training_scripts_are_taken_off(network: nn.Module, tmp_path: Path) -> None:
    """DistributedDataParallel's `module.`; the averaged weights come first, as in timm."""
    zeros = {name: torch.zeros_like(value) for name, value in network.state_dict().items()}
    wrapped = {f"module.{name}": value for name, value in network.state_dict().items()}
    torch.save({"state_dict": zeros, "state_dict_ema": wrapped, "epoch": 3}, tmp_path / "run.pth")
    loaded = load_backbone(NAME, checkpoint=tmp_path / "run.pth", **TINY)
    assert torch.equal(loaded(images()), network(images()))


def test_an_unknown_tag_gives_the_known_ones() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown weights .*did you mean .*deit_tiny_patch16_224\.fb_in1k"):
        load_backbone("deit_tiny_patch16_224.fb_in1")


ANIMALS = ("Bee", "ant", "Cow", "dog", "eel")


@pytest.fixture
def named(network: nn.Module) -> Backbone:
    backbone = load_backbone(NAME, class_names=ANIMALS, **TINY)
    backbone.model.load_state_dict(network.state_dict())
    return backbone


def test_weights_carry_class_names_and_sizes(named: Backbone, tmp_path: Path) -> None:
    path = save_backbone(named, tmp_path / "weights.safetensors")
    assert about_weights(path) == {
        "architecture": NAME,
        "img_size": [64, 64],
        "num_classes": 5,
        "class_names": list(ANIMALS),
    }
    sizes = {name: TINY[name] for name in ("depth", "embed_dim", "num_heads")}
    loaded = load_backbone(NAME, checkpoint=path, **sizes)  # image size and number of classes are the file's
    assert loaded.class_names == ANIMALS
    assert torch.equal(loaded(images()), named(images()))
    others = tuple("abcde")
    assert load_backbone(NAME, checkpoint=path, class_names=others, **sizes).class_names == others
    assert load_backbone(NAME, checkpoint=path, **(sizes | {"img_size": 48})).image_size == (48, 48)
    with pytest.raises(CheckpointError, match=r"head of 5 classes, the model one of 7; num_classes=5 gives"):
        load_backbone(NAME, checkpoint=path, **(sizes | {"num_classes": 7}))


def test_what_a_damaged_file_says_is_not_believed(named: Backbone, tmp_path: Path) -> None:
    path = save_backbone(named, tmp_path / "weights.safetensors")
    path.write_bytes(path.read_bytes().replace(b'"num_classes":"5"', b'"num_classes":"7"'))
    for read in (about_weights, lambda path: load_backbone(NAME, checkpoint=path, new_head=True, **TINY)):
        with pytest.raises(CheckpointError, match=r"checkpoint: .*weights\.safetensors: .* a damaged file"):
            read(path)


def test_weights_can_be_kept_in_half_precision(named: Backbone, tmp_path: Path) -> None:
    whole, half = (save_backbone(named, tmp_path / f"{dtype}.safetensors", dtype) for dtype in (None, torch.float16))
    assert half.stat().st_size < 0.6 * whole.stat().st_size
    loaded = load_backbone(NAME, checkpoint=half, **TINY)
    assert loaded.class_names == ANIMALS
    assert loaded(images()).dtype == torch.float32
    assert torch.allclose(loaded(images()), named(images()), atol=0.05)
    with pytest.raises(ValueError, match=r"path: expected a file name that ends in \.safetensors"):
        save_backbone(named, tmp_path / "weights.pth")


def test_files_of_others_say_nothing_or_something_else(network: nn.Module, tmp_path: Path) -> None:
    path = save_as(network, tmp_path / "weights.safetensors")
    assert about_weights(path) == about_weights(save_as(network, tmp_path / "weights.pth")) == {}
    save_file(network.state_dict(), path, {"class_names": "cat, dog", "num_classes": "many", "img_size": "64"})
    assert about_weights(path) == {}
    assert load_backbone(NAME, checkpoint=path, **TINY).class_names is None
    (tmp_path / "no.safetensors").write_bytes(b"nothing")
    for missing, said in (("no", "no.safetensors: expected a safetensors"), ("nowhere", "nowhere.safetensors, where")):
        with pytest.raises(CheckpointError, match=f"^checkpoint: .*{said}"):
            load_backbone(NAME, checkpoint=tmp_path / f"{missing}.safetensors", **TINY)


def test_class_names_survive_whatever_is_saved(named: Backbone, tmp_path: Path) -> None:
    named = load_backbone(NAME, class_names=ANIMALS, img_size=32, num_classes=5)  # of sizes that a name tells
    PrunedViT(named, EViT(0.5)).save_pretrained(tmp_path / "folder")
    save_policy(EViT(0.5), tmp_path / "policy.safetensors", named)
    RunFolder(tmp_path / "run", Processes()).save_backbone(named)
    found = [
        PrunedViT.from_pretrained(tmp_path / "folder").backbone,
        load_pruned(tmp_path / "policy.safetensors").backbone,
        load_backbone(NAME, checkpoint=tmp_path / "run" / "backbone.safetensors"),
    ]
    assert [backbone.class_names for backbone in found] == [ANIMALS] * 3
    assert [backbone.image_size for backbone in found] == [(32, 32)] * 3


@pytest.mark.parametrize(
    ("names", "got"),
    [
        (tuple("abcd"), "got 4, 4 of them different"),
        (tuple("abcda"), "got 5, 4 of them different"),
        ("abcde", "got 'abcde'"),
        ((1, 2, 3, 4, 5), r"got \(1, 2, 3, 4, 5\)"),
    ],
)
def test_class_names_must_fit_the_head(names: Any, got: str) -> None:
    with pytest.raises(ValueError, match=f"class_names: expected 5 different strings, .* {got}"):
        load_backbone(NAME, class_names=names, **TINY)
