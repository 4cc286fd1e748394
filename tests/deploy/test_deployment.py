"""The pruned model outside of this package: folders, the hub, torch.export, ONNX."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_pruned import describe, token_policy

from helpers import Fixed, everyday, random_images, toy
from vitprune_env import KeepAll, Policy, PrunedViT, load_backbone
from vitprune_env.baselines import EViT, RandomDrop, TopK
from vitprune_env.deploy.descriptions import build_policy, describe_policy
from vitprune_env.deploy.export import export_onnx, export_program
from vitprune_env.deploy.pretrained import CONFIG, WEIGHTS
from vitprune_env.engine.backbone import Backbone
from vitprune_env.errors import CheckpointError, ExportError, SiteError, StorageError
from vitprune_env.files import read_file, read_tensors, write_file
from vitprune_env.models.vit_digits import create_vit_digits


def small_deit() -> Backbone:
    """A timm model by name, with other classes and another image size."""
    return load_backbone("deit_tiny_patch16_224", img_size=48, num_classes=5)


def edit(folder: Path, **changes: Any) -> None:
    """Change what the file says of the model."""
    tensors, header = read_file(folder / WEIGHTS, "policy", dict.fromkeys((2, 99), ("policy",)))
    write_file(folder / WEIGHTS, tensors, {**header, **changes})


@pytest.mark.parametrize("policy", ["learnt", EViT(0.6), TopK(0.5), RandomDrop(0.5, seed=3), KeepAll()], ids=describe)
@torch.no_grad()
def test_comes_back_the_same(tmp_path: Path, policy: Policy | str) -> None:
    backbone = small_deit()
    chosen = token_policy(backbone) if isinstance(policy, str) else policy
    model = PrunedViT(backbone, chosen, sites=(2, 5), execution="packed").eval()
    images = random_images(backbone, 4)
    expected = model(images)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {CONFIG, WEIGHTS, "README.md"}
    again = PrunedViT.from_pretrained(tmp_path)
    assert (again.sites, again.execution, again.training) == (model.sites, "packed", False)
    assert describe_policy(again.policy) == describe_policy(chosen)
    if not isinstance(chosen, RandomDrop):  # whose stream begins anew
        assert torch.equal(again(images), expected)


@torch.no_grad()
def test_the_built_in_model_with_other_weights(tmp_path: Path) -> None:
    backbone = load_backbone("vit_digits")
    backbone.model.cls_token.add_(1)
    model = PrunedViT(backbone, EViT(0.5)).eval()
    model.save_pretrained(str(tmp_path))
    images = random_images(backbone, 2)
    assert torch.equal(PrunedViT.from_pretrained(str(tmp_path))(images), model(images))
    card = tmp_path / "README.md"
    assert "vit_digits, pruned by EViT" in card.read_text()
    PrunedViT(backbone, TopK(0.5)).save_pretrained(tmp_path)
    assert "vit_digits, pruned by TopK" in card.read_text()
    card.write_text("# notes of mine")
    model.save_pretrained(tmp_path)
    assert card.read_text() == "# notes of mine"


@pytest.mark.parametrize("repository", ["somebody/pruned"])
def test_pushing_uploads_the_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, repository: str) -> None:
    """A local folder stands in for the hub."""

    class Hub:
        def __init__(self, **_: Any) -> None: ...

        def create_repo(self, repo_id: str, **_: Any) -> Any:
            return type("Url", (), {"repo_id": repo_id})()

        def upload_folder(self, repo_id: str, folder_path: Path, **_: Any) -> str:
            (tmp_path / repo_id).mkdir(parents=True)
            for file in Path(folder_path).iterdir():
                (tmp_path / repo_id / file.name).write_bytes(file.read_bytes())
            return repo_id

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Hub)
    monkeypatch.setattr("vitprune_env.deploy.pruned_vit.snapshot_download", lambda name, **_: str(tmp_path / name))
    model = PrunedViT(small_deit(), EViT(0.5))
    model.push_to_hub(repository)
    again = PrunedViT.from_pretrained(repository, token=False, revision="main")
    assert describe_policy(again.policy) == describe_policy(model.policy)
    with pytest.raises(TypeError, match="expected some of revision"):
        PrunedViT.from_pretrained(repository, trust_remote_code=True)


@pytest.mark.parametrize(
    "name", ["os:system", "os.system", "vitprune_env.policy:KeepAll", "Fixed", "", 3, ["evit"], None]
)
def test_nothing_but_registered_policies_is_built(name: Any) -> None:
    with pytest.raises(CheckpointError, match="policy"):
        build_policy({"name": name, "config": {}})


def test_settings_that_do_not_fit_are_refused() -> None:
    description = describe_policy(EViT(0.5))
    for config in ({"keep_rate": 7}, {"rate": 0.5}):
        with pytest.raises(CheckpointError, match="settings"):
            build_policy({**description, "config": config})


def test_what_could_not_be_read_again_is_not_written(tmp_path: Path) -> None:
    for model in (
        PrunedViT(small_deit(), Fixed([])),  # a foreign policy
        PrunedViT(toy("deit_tiny_patch16_224"), KeepAll()),  # of other sizes than its name says
        PrunedViT(Backbone(create_vit_digits()), KeepAll()),  # without a name
    ):
        with pytest.raises(CheckpointError, match=r"policy|backbone"):
            model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("failing", [0, 1, 2])
@torch.no_grad()
def test_a_failed_save_leaves_whole_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    """Whichever of the three files cannot be written, the folder holds the old model or the new one, whole."""
    backbone, rename, calls = small_deit(), os.replace, []
    PrunedViT(backbone, EViT(0.5)).save_pretrained(tmp_path)
    old = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def replace(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) > failing:
            raise OSError(28, "No space left on device")
        rename(source, target)

    backbone.model.cls_token.add_(1)
    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(StorageError, match="No space left"):
        PrunedViT(backbone, TopK(0.5)).save_pretrained(tmp_path)
    monkeypatch.undo()
    found = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(found) == set(old), "no temporary file stays"
    assert sum(found[name] != old[name] for name in old) == failing
    with pytest.raises(CheckpointError):
        PrunedViT(backbone, Fixed([])).save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == found
    assert type(PrunedViT.from_pretrained(tmp_path).policy) is (EViT if failing < 1 else TopK)


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=WEIGHTS):
        PrunedViT.from_pretrained(tmp_path)
    PrunedViT(small_deit(), EViT(0.5)).save_pretrained(tmp_path)
    edit(tmp_path, sites=["99"])
    with pytest.raises(ValueError, match="1 to 12"):
        PrunedViT.from_pretrained(tmp_path)
    edit(tmp_path, sites=["3"], format=99)
    with pytest.raises(CheckpointError, match="format"):
        PrunedViT.from_pretrained(tmp_path)
    edit(tmp_path, format=2)
    (tmp_path / WEIGHTS).write_bytes(b"not weights")
    with pytest.raises(CheckpointError, match=WEIGHTS):
        PrunedViT.from_pretrained(tmp_path)


def test_sites_and_execution_of_the_wrong_type_are_refused(tmp_path: Path) -> None:
    PrunedViT(small_deit(), EViT(0.5)).save_pretrained(tmp_path)
    for change in ({"sites": 5}, {"execution": ["packed"]}, {"policy": "evit"}, {"backbone": []}):
        whole = (tmp_path / WEIGHTS).read_bytes()
        edit(tmp_path, **change)
        with pytest.raises((CheckpointError, SiteError)):
            PrunedViT.from_pretrained(tmp_path)
        (tmp_path / WEIGHTS).write_bytes(whole)


def test_the_copy_of_the_description_is_for_readers_alone(tmp_path: Path) -> None:
    """A folder of an earlier version keeps it there alone; without either there is no model."""
    PrunedViT(load_backbone("vit_digits"), EViT(0.5)).save_pretrained(tmp_path)
    copy, whole = (tmp_path / CONFIG).read_text(), (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / CONFIG).write_text("damaged")
    assert type(PrunedViT.from_pretrained(tmp_path).policy) is EViT
    tensors, _ = read_tensors(tmp_path / WEIGHTS)
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match=CONFIG):
        PrunedViT.from_pretrained(tmp_path)
    (tmp_path / CONFIG).write_text(copy)
    assert type(PrunedViT.from_pretrained(tmp_path).policy) is EViT
    (tmp_path / WEIGHTS).write_bytes(whole)


@pytest.mark.parametrize(
    "name", ["missing", "./missing", "../runs/missing", "a/b/c", "runs\\x", Path("x"), "here/x", "~/x"]
)
def test_a_mistyped_path_is_not_looked_for_on_the_hub(
    name: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "vitprune_env.deploy.pruned_vit.snapshot_download", lambda *_, **__: pytest.fail("asked the hub")
    )
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder"):
        PrunedViT.from_pretrained(name)


@pytest.mark.parametrize("policy", everyday([EViT(0.5, fuse=False), EViT(0.6), KeepAll()], EViT(0.6)), ids=describe)
@torch.no_grad()
def test_export_takes_any_batch_size(policy: Policy) -> None:
    backbone = toy("deit_tiny_patch16_224")
    model = PrunedViT(backbone, policy).eval()
    graph = export_program(model).module()
    for batch in (1, 2, 5):
        images = random_images(backbone, batch, seed=batch)
        torch.testing.assert_close(graph(images), model(images), atol=1e-5, rtol=1e-5)


def test_export_refuses_what_has_no_fixed_shape() -> None:
    backbone = toy("deit_tiny_patch16_224")
    with pytest.raises(ExportError, match=r"TokenPolicy does not say beforehand how many tokens stay after 1, 2, 3"):
        export_program(PrunedViT(backbone, token_policy(backbone)).eval())
    with pytest.raises(ExportError, match="RandomDrop decides the same images differently each time"):
        export_program(PrunedViT(backbone, RandomDrop(0.5)).eval())
    with pytest.raises(ValueError, match="max_batch: expected at least 1 or None, got 0"):
        export_program(PrunedViT(backbone, EViT(0.5)).eval(), max_batch=0)
    with pytest.raises(ExportError, match="evaluation mode"):
        export_program(PrunedViT(backbone, EViT(0.5)).train())


@pytest.mark.parametrize("policy", [EViT(0.5, fuse=False), EViT(0.6)], ids=describe)
@torch.no_grad()
def test_onnx_gives_the_same_logits(tmp_path: Path, policy: Policy) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    backbone = toy("deit_tiny_patch16_224")
    model = PrunedViT(backbone, policy).eval()
    session = runtime.InferenceSession(str(export_onnx(model, tmp_path / "model.onnx")))
    for batch in (1, 4):
        images = random_images(backbone, batch)
        (logits,) = session.run(["logits"], {"images": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), model(images), atol=1e-5, rtol=1e-4)
