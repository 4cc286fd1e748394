"""Models of transformers, converted: the same numbers as transformers' own forward, then pruned, saved and loaded."""

from __future__ import annotations

import json
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vitprune_env import KeepAll, PrunedViT, TokenGame, load_backbone, play, save_backbone
from vitprune_env.baselines import RandomDrop
from vitprune_env.errors import CheckpointError, UnsupportedBackboneError
from vitprune_env.models.hugging_face import KINDS, _timm_state

hf: Any = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "image_size": 32, "patch_size": 8,
}  # fmt: skip
WIDE = SIZES | {"intermediate_size": 52}
CASES: dict[str, Any] = {  # name -> configuration, with options far from the defaults
    "ViTModel": lambda: hf.ViTConfig(**WIDE, qkv_bias=False, hidden_act="relu"),
    "ViTForImageClassification": lambda: hf.ViTConfig(**WIDE, num_labels=5),
    "Dinov2Model": lambda: hf.Dinov2Config(**SIZES, use_swiglu_ffn=True),
    "Dinov2ForImageClassification": lambda: hf.Dinov2Config(**SIZES, num_labels=5),
    "Dinov2WithRegistersModel": lambda: hf.Dinov2WithRegistersConfig(**SIZES, num_register_tokens=2),
    "Dinov2WithRegistersForImageClassification": lambda: hf.Dinov2WithRegistersConfig(**SIZES, num_labels=5),
    "CLIPVisionModel": lambda: hf.CLIPVisionConfig(**WIDE),
    "CLIPVisionModelWithProjection": lambda: hf.CLIPVisionConfig(**WIDE, projection_dim=7),
    "CLIPModel": lambda: hf.CLIPConfig(vision_config=WIDE, text_config=TEXT, projection_dim=7),
    "CLIPForImageClassification": lambda: hf.CLIPConfig(vision_config=WIDE, text_config=TEXT, num_labels=5),
    "SiglipVisionModel": lambda: hf.SiglipVisionConfig(**WIDE),
    "SiglipModel": lambda: hf.SiglipConfig(vision_config=WIDE, text_config=TEXT),
    "SiglipForImageClassification": lambda: hf.SiglipConfig(vision_config=WIDE, text_config=TEXT, num_labels=5),
}
TEXT: dict[str, Any] = {
    "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 50,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def random_model(name: str, **changes: Any) -> Any:
    """A small model of transformers whose every parameter matters."""
    config = CASES[name]()
    for key, value in changes.items():
        setattr(config, key, value)
    model = getattr(hf, name)(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def expected(model: Any, images: Tensor) -> Tensor:
    """What transformers computes: logits, the projection, or the pooled features."""
    if hasattr(model, "get_image_features"):
        found = model.get_image_features(images)
        return found if isinstance(found, Tensor) else found.pooler_output
    found = model(images)
    if type(model).__name__ == "ViTModel":
        return found.last_hidden_state[:, 0]  # its pooler is a layer for masked image modelling
    return next(getattr(found, part) for part in ("logits", "image_embeds", "pooler_output") if hasattr(found, part))


def some_images() -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_the_same_numbers_as_transformers(name: str) -> None:
    model, images = random_model(name), some_images()
    backbone, wanted = load_backbone(model), expected(model, images)
    torch.testing.assert_close(backbone(images), wanted, rtol=1e-5, atol=1e-5)
    assert backbone.num_classes == wanted.shape[1]
    game = TokenGame(backbone, ("1.attn",))
    torch.testing.assert_close(play(game, KeepAll(), images).outcome.logits, wanted, rtol=1e-4, atol=1e-5)


DINO = {"qkv_bias": False, "hidden_act": "relu", "mlp_ratio": 2, "layerscale_value": 0.3, "use_swiglu_ffn": True}
SETTINGS: dict[str, dict[str, Any]] = {  # of networks: what changes the result, with unusual values
    "ViT": {"qkv_bias": False, "hidden_act": "silu", "intermediate_size": 10, "patch_size": [8, 4]},
    "Dinov2": {**DINO, "use_mask_token": False},
    "Dinov2WithRegisters": {**DINO, "num_register_tokens": 0},
    "CLIPVision": {"hidden_act": "gelu", "intermediate_size": 10},
    "SiglipVision": {"hidden_act": "relu", "intermediate_size": 10},
}
EVERYWHERE: dict[str, Any] = {"layer_norm_eps": 0.1, "num_channels": 1, "image_size": 44}
SIZED = {"hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size", "projection_dim"}
WITHOUT_EFFECT = {  # on what is taken over: training, the pooler of ViTModel, masked image modelling, `Dinov2Backbone`
    "hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout", "drop_path_rate", "initializer_range",
    "initializer_factor", "encoder_stride", "pooler_output_size", "pooler_act", "apply_layernorm", "stage_names",
    "reshape_hidden_states", "out_features", "out_indices", "_out_features", "_out_indices", "model_type",
}  # fmt: skip


@pytest.mark.parametrize("family", SETTINGS)
def test_no_setting_changes_the_result_unheard(family: str) -> None:
    """A version of transformers with a further setting fails here: convert it, refuse it, or list it."""
    common, own = hf.PretrainedConfig().to_dict(), getattr(hf, f"{family}Config")().to_dict()
    known = SIZED | WITHOUT_EFFECT | EVERYWHERE.keys() | SETTINGS[family].keys() | {"vision_use_head"}
    assert own.keys() - common.keys() <= known


@pytest.mark.parametrize(
    ("family", "setting", "value"),
    [(family, *item) for family in SETTINGS for item in {**EVERYWHERE, **SETTINGS[family]}.items()],
)
@torch.no_grad()
def test_every_setting_is_taken_over(family: str, setting: str, value: Any) -> None:
    model = random_model(f"{family}Model", **{"use_swiglu_ffn": False, setting: value})
    channels, size = (3, 32) if setting not in EVERYWHERE else (model.config.num_channels, model.config.image_size)
    images = torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(load_backbone(model)(images), expected(model, images), rtol=1e-5, atol=2e-5)


def test_a_classifier_of_siglip_needs_no_attention_pooling() -> None:
    config = CASES["SiglipForImageClassification"]()
    config.vision_config.vision_use_head = False
    model, images = hf.SiglipForImageClassification(config).eval(), some_images()
    with torch.no_grad():
        torch.testing.assert_close(load_backbone(model)(images), expected(model, images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"do_normalize": False, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.5, 0.5]},
        {"rescale_factor": 1 / 127.5, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 1.0, 2.0]},
        {"do_rescale": False},
    ],
)
def test_images_are_prepared_as_the_image_processor_does(settings: dict[str, Any], tmp_path: Path) -> None:
    random_model("ViTModel").save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    prepared = load_backbone(str(tmp_path)).model.pretrained_cfg
    pixels = torch.tensor([[10.0, 200.0, 255.0]])  # one pixel, three channels
    theirs = pixels * (settings.get("rescale_factor", 1 / 255) if settings.get("do_rescale", True) else 1)
    if settings.get("do_normalize", True):
        mean, std = (torch.tensor(settings.get(f"image_{name}", [0.5] * 3)) for name in ("mean", "std"))
        theirs = (theirs - mean) / std
    ours = (pixels / 255 - torch.tensor(prepared["mean"])) / torch.tensor(prepared["std"])
    torch.testing.assert_close(ours, theirs)


# Every way of reading the tokens: class token beside their mean, a projection, attention pooling.
@pytest.mark.parametrize(
    "name", ["Dinov2WithRegistersForImageClassification", "CLIPVisionModelWithProjection", "SiglipVisionModel"]
)
@torch.no_grad()
def test_it_is_pruned_and_saved_and_loaded_without_transformers(name: str, tmp_path: Path) -> None:
    backbone, images = load_backbone(random_model(name)), some_images()
    game, wanted = TokenGame(backbone, ("1.attn", 2)), backbone(images)
    pruned = PrunedViT(backbone, RandomDrop(0.5, 0), ("1.attn", 2)).eval()
    logits = pruned(images)
    assert not torch.allclose(logits, wanted, atol=1e-3)
    torch.testing.assert_close(logits, play(game, RandomDrop(0.5, 0), images).outcome.logits)
    pruned = PrunedViT(backbone, KeepAll(), (1,)).eval()
    pruned.save_pretrained(tmp_path / "model")  # is built again from its sizes
    assert torch.equal(PrunedViT.from_pretrained(tmp_path / "model").eval()(images), pruned(images))
    saved = save_backbone(backbone, tmp_path / "backbone.safetensors")
    assert torch.equal(load_backbone(backbone.name, checkpoint=saved)(images), backbone(images))


@torch.no_grad()
def test_folder_of_save_pretrained(tmp_path: Path) -> None:
    model, images = random_model("CLIPVisionModelWithProjection"), some_images()
    model.save_pretrained(tmp_path)
    processor = '{"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1], "resample": 2, "do_center_crop": true, '
    (tmp_path / "preprocessor_config.json").write_text(
        processor + '"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}'
    )
    for where in (f"hf:{tmp_path}", str(tmp_path)):
        torch.testing.assert_close(load_backbone(where)(images), expected(model, images), rtol=1e-5, atol=1e-5)
    prepared = load_backbone(f"hf:{tmp_path}").model.pretrained_cfg
    assert (prepared["mean"], prepared["interpolation"], prepared["crop_pct"]) == ((0.1, 0.2, 0.3), "bilinear", 0.8)
    (tmp_path / "preprocessor_config.json").write_text("[")
    with pytest.raises(CheckpointError, match="expected settings of an image processor"):
        load_backbone(str(tmp_path))


def test_classes_keep_their_names(tmp_path: Path) -> None:
    names = ("boat", "ant", "cup", "eye", "dog")
    model = random_model("ViTForImageClassification", id2label=dict(enumerate(names)))
    model.save_pretrained(tmp_path)
    for source in (model, f"hf:{tmp_path}"):
        assert load_backbone(source).class_names == names
    assert load_backbone(model, class_names=list("abcde")).class_names == tuple("abcde")
    for numbers in (load_backbone(model, num_classes=5), load_backbone(random_model("ViTForImageClassification"))):
        assert numbers.class_names is None
    assert load_backbone(random_model("CLIPVisionModelWithProjection")).class_names is None


@torch.no_grad()
def test_another_head_and_another_image_size(tmp_path: Path) -> None:
    model = random_model("Dinov2WithRegistersModel")
    backbone = load_backbone(model, num_classes=4, img_size=48)
    assert backbone(torch.randn(1, 3, 48, 48)).shape == (1, 4)
    assert (backbone.num_patches, backbone.num_prefix) == (36, 3)
    features = save_backbone(load_backbone(model), tmp_path / "features.safetensors")
    again = load_backbone("converted_vit", checkpoint=features, new_head=True, num_classes=6)
    assert again(some_images()).shape == (3, 6)
    with pytest.raises(ValueError, match="num_classes: expected 24, the features of a network without a head, got 6"):
        load_backbone("converted_vit", checkpoint=features, num_classes=6)
    with pytest.raises(ValueError, match="num_classes: expected the width of the head, got None"):
        load_backbone("converted_vit", checkpoint=features, new_head=True)
    with pytest.raises(ValueError, match="expected a file that gives the sizes of converted_vit, got none"):
        load_backbone("converted_vit")


@torch.no_grad()
def test_text_embeddings_are_a_head_without_training(tmp_path: Path) -> None:
    """The recipe of docs/deploy.md answers as CLIP does: by the text that is most similar."""
    clip, images, texts = random_model("CLIPModel"), some_images(), torch.randn(4, 7)
    network = load_backbone(clip).model
    texts = texts / texts.norm(dim=1, keepdim=True)
    head = nn.Linear(24, 4)
    head.weight.copy_(texts @ network.head.weight)
    head.bias.zero_()
    network.head, network.num_classes = head, 4
    backbone = load_backbone(network, class_names=["cat", "dog", "bird", "fish"])
    embeds = expected(clip, images)
    torch.testing.assert_close(backbone(images), embeds @ texts.T, rtol=1e-4, atol=1e-5)
    again = load_backbone("converted_vit", checkpoint=save_backbone(backbone, tmp_path / "zero_shot.safetensors"))
    assert again.class_names == ("cat", "dog", "bird", "fish")
    assert torch.equal(again(images), backbone(images))


def test_names_of_version_4() -> None:
    """Parameters of ViTs and DINOv2 had other names in transformers 4."""
    older = {
        "q_proj": "attention.query", "k_proj": "attention.key", "v_proj": "attention.value", "o_proj": "output.dense",
    }  # fmt: skip
    in_vit = {"vit.layers": "vit.encoder.layer", ".mlp.fc1.": ".intermediate.dense.", ".mlp.fc2.": ".output.dense."}
    for name, changed in (("ViTForImageClassification", older | in_vit), ("Dinov2ForImageClassification", older)):
        state, kind = random_model(name).state_dict(), KINDS[name]
        before = {reduce(lambda key, pair: key.replace(*pair), changed.items(), key): state[key] for key in state}
        assert before.keys() != state.keys()
        found, wanted = (_timm_state(each, kind) for each in (before, state))
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_what_cannot_be_converted_is_named(tmp_path: Path) -> None:
    beit = hf.BeitModel(hf.BeitConfig(**WIDE))
    with pytest.raises(UnsupportedBackboneError, match=r"model: expected one of ViTModel, .*got BeitModel"):
        load_backbone(beit)
    with pytest.raises(UnsupportedBackboneError, match="hidden_act='mish'"):
        load_backbone(random_model("ViTModel", hidden_act="mish"))
    with pytest.raises(UnsupportedBackboneError, match="vision_use_head=False"):
        load_backbone(random_model("SiglipVisionModel", vision_use_head=False))
    with pytest.raises(ValueError, match="pretrained: expected False"):
        load_backbone(random_model("ViTModel"), pretrained=True)
    with pytest.raises(CheckpointError, match="expected a folder that save_pretrained of transformers wrote"):
        load_backbone(f"hf:{tmp_path}/nowhere")
    (tmp_path / "config.json").write_text('{"architectures": ["Trainer"]}')
    with pytest.raises(UnsupportedBackboneError, match="got Trainer in"):
        load_backbone(f"hf:{tmp_path}")
