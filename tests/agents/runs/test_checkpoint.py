"""Files: what is written comes back, and what is not ours is refused."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from failures import Hostile, fill_the_disk
from helpers import random_images, rewrite, toy
from vitprune_env import PrunedViT, load_backbone
from vitprune_env.agents import AdaptivePolicy, TokenActor, TokenPolicy, load_policy, save_policy
from vitprune_env.errors import CheckpointError, StorageError
from vitprune_env.files import load_state, locked, prepare_folder, replace_file, save_state
from vitprune_env.game.token_game import TokenGame
from vitprune_env.models.load import save_backbone


def policy() -> TokenPolicy:
    actor = TokenActor(48, (5, 3), generator=torch.Generator().manual_seed(4))
    return TokenPolicy(actor, 0.123456789, (1, "2.attn"), {"backbone": "toy", "target_macs": 1e6, "seed": 4})


def adaptive() -> AdaptivePolicy:
    return AdaptivePolicy(TokenActor(49, generator=torch.Generator().manual_seed(4)), (0.4, 0.8), (1.0, 0.0), seed=4)


def test_a_policy_comes_back_as_it_was(tmp_path: Path) -> None:
    saved = policy()
    path = save_policy(saved, tmp_path / "new" / "p.safetensors")
    loaded = load_policy(path)
    assert (loaded.threshold, loaded.sites, loaded.info) == (saved.threshold, saved.sites, saved.info)
    assert loaded.actor.hidden == (5, 3)
    backbone = toy("vit_tiny_patch16_224")
    obs = TokenGame(backbone, (1, "2.attn")).reset(random_images(backbone, 3))
    assert torch.equal(saved.actor(obs.tokens), loaded.actor(obs.tokens))
    assert torch.equal(saved.decide(obs).keep, loaded.decide(obs).keep)
    assert [entry.name for entry in path.parent.iterdir()] == ["p.safetensors"]


def test_a_tree_comes_back_bit_by_bit(tmp_path: Path) -> None:
    shared = torch.arange(6.0)
    tree = {
        "nets": {0: {"a": torch.randn(3, 2), "b": shared}, "1": [torch.tensor(7), shared]},
        "numbers": [0.1 + 0.2, 1, True, None, "text"],
        "rng": torch.Generator().get_state(),
        "empty": {},
    }
    loaded = load_state(save_state(tree, tmp_path / "s.safetensors"))
    assert loaded["numbers"] == tree["numbers"]
    assert loaded["empty"] == {}
    assert list(loaded["nets"]) == [0, "1"]
    assert torch.equal(loaded["nets"][0]["a"], tree["nets"][0]["a"])
    assert torch.equal(loaded["nets"]["1"][1], shared)
    assert loaded["nets"]["1"][0].shape == ()
    assert torch.equal(loaded["rng"], tree["rng"])


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_policy(policy(), tmp_path / "p.safetensors")
    before = path.read_bytes()
    fill_the_disk(monkeypatch, tmp_path)
    with pytest.raises(StorageError, match=r"p\.safetensors: could not be written \(No space left on device\)"):
        save_policy(TokenPolicy(TokenActor(8)), path)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["p.safetensors"]


def test_content_reaches_the_disk_before_its_name_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new file is flushed, then renamed, then the folder is flushed: what a power cut needs."""
    calls: list[str] = []
    flush, rename = os.fsync, os.replace

    def fsync(handle: int) -> None:
        calls.append("folder" if Path(f"/proc/self/fd/{handle}").resolve().is_dir() else "file")
        flush(handle)

    def replace(old: Path, new: Path) -> None:
        assert old.read_bytes() == b"new"
        assert new.read_bytes() == b"old"
        calls.append("rename")
        rename(old, new)

    path = replace_file(tmp_path / "a", b"old")
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    assert replace_file(path, b"new").read_bytes() == b"new"
    assert calls == ["file", "rename", "folder"]


def test_a_folder_is_tried_and_tidied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "new" / "run"
    prepare_folder(folder)
    for name in (".p.safetensors.17.vitprune.tmp", "mine.tmp"):
        (folder / name).write_text("half")
    prepare_folder(folder)
    assert [entry.name for entry in folder.iterdir()] == ["mine.tmp"]
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"output: expected a folder that can be written, got .*(Not a dir|exists)"):
        prepare_folder(tmp_path / "file")
    fill_the_disk(monkeypatch, tmp_path)
    with pytest.raises(StorageError, match=r"output: expected a folder that can be written, .*No space left"):
        prepare_folder(folder)


LOADERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "policy": ("p.safetensors", load_policy),
    "state": ("s.safetensors", load_state),
    "weights": ("w.safetensors", lambda path: load_backbone("vit_tiny_patch16_224", checkpoint=path)),
    "torch": ("w.pth", lambda path: load_backbone("vit_tiny_patch16_224", checkpoint=path)),
    "numpy": ("w.npz", lambda path: load_backbone("vit_tiny_patch16_224", checkpoint=path)),
    "model": ("model.safetensors", lambda path: PrunedViT.from_pretrained(path.parent)),
}


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("write", ["pickle", "torch", "legacy", "numpy"])
def test_nothing_is_ever_unpickled(loader: str, write: str, tmp_path: Path) -> None:
    name, load = LOADERS[loader]
    path, trace = tmp_path / name, tmp_path / "touched"
    content = {"model": {"cls_token": Hostile(trace)}}
    if write == "pickle":
        path.write_bytes(pickle.dumps(content))
    elif write == "numpy":
        with path.open("wb") as file:
            np.savez(file, **{"head/bias": np.array([content], dtype=object)})
    else:
        torch.save(content, path, _use_new_zipfile_serialization=write == "torch")
    (tmp_path / "config.json").write_text('{"vitprune_env": {"format": 1}}')
    with pytest.raises(CheckpointError):
        load(path)
    assert not trace.exists()


def test_foreign_and_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    with pytest.raises(CheckpointError, match="found none"):
        load_policy(path)
    path.write_bytes(pickle.dumps({"state_dict": 1}))
    with pytest.raises(CheckpointError, match="unreadable"):
        load_policy(path)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="without its header"):
        load_policy(path)
    save_state({"x": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="expected a policy file, got a training file"):
        load_policy(path)
    save_policy(policy(), path)
    with pytest.raises(CheckpointError, match="expected a training file, got a policy file"):
        load_state(path)
    rewrite(path, b"", b"")  # without a checksum, which would refuse all that follows
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="unreadable"):
        load_policy(path)
    path.write_bytes(whole.replace(b'\\"embed_dim\\": 48', b'\\"embed_dim\\": 84'))
    with pytest.raises(CheckpointError, match="does not fit together"):
        load_policy(path)
    path.write_bytes(whole.replace(b'\\"kind\\"', b'\\"kind\\\\'))
    with pytest.raises(CheckpointError, match="JSON object"):
        load_policy(path)
    path.write_bytes(whole.replace(b'\\"format\\": 2', b'\\"format\\": 9'))
    with pytest.raises(CheckpointError, match="another version"):
        load_policy(path)


def flipped(content: bytes, place: int) -> bytes:
    """A file with one bit of the byte at this place turned over."""
    changed = bytearray(content)
    changed[place] ^= 1 << place % 8
    return bytes(changed)


@pytest.mark.parametrize("kind", ["policy", "adaptive", "state", "network", "model"])
def test_a_file_with_a_damaged_bit_is_refused(kind: str, tmp_path: Path) -> None:
    """Wherever the damage is: 200 random places in all."""
    path, backbone = tmp_path / "file.safetensors", load_backbone("vit_digits")
    read: Callable[[], Any]
    if kind in ("policy", "adaptive"):
        read, _ = lambda: load_policy(path), save_policy(policy() if kind == "policy" else adaptive(), path)
    elif kind == "state":
        read, _ = lambda: load_state(path), save_state({"weight": torch.randn(50), "done": 3, "text": "abc"}, path)
    elif kind == "network":
        read, _ = lambda: load_backbone("vit_digits", checkpoint=path), save_backbone(backbone, path)
    else:
        path = tmp_path / "model.safetensors"
        read, _ = lambda: PrunedViT.from_pretrained(tmp_path), PrunedViT(backbone, policy()).save_pretrained(tmp_path)
    read()
    whole = path.read_bytes()
    header = int.from_bytes(whole[:8], "little")
    generator = torch.Generator().manual_seed(0)
    places = torch.cat([torch.randint(end, (20,), generator=generator) for end in (8 + header, len(whole))]).tolist()
    for place in places:
        path.write_bytes(flipped(whole, place))
        with pytest.raises(CheckpointError):
            read()


@pytest.mark.parametrize(
    ("old", "new"), [(b'"sha256"', b'"sha25v"'), (b'"format":', b'"format": '), (b'"format"', b'"\\u0066ormat"')]
)
def test_a_header_is_as_it_was_written(old: bytes, new: bytes, tmp_path: Path) -> None:
    """Also where another one would be read alike."""
    path = save_policy(policy(), tmp_path / "file.safetensors")
    whole = path.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    header = whole[8:end].replace(old, new, 1)
    assert header != whole[8:end]
    header += b" " * (-len(header) % 8)
    path.write_bytes(len(header).to_bytes(8, "little") + header + whole[end:])
    with pytest.raises(CheckpointError, match="damaged"):
        load_policy(path)


def test_the_same_values_make_the_same_bytes(tmp_path: Path) -> None:
    one, two = (
        save_backbone(load_backbone(), tmp_path / name).read_bytes() for name in ("1.safetensors", "2.safetensors")
    )
    assert one == two


def test_a_folder_belongs_to_one_run(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(StorageError, match="another process"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="can be written"), locked(tmp_path / "file"):
        pass
