"""Files: what is written comes back, and what is not ours is refused."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from helpers import random_images, toy
from vitprune_env.agents import TokenActor, TokenPolicy, load_policy, save_policy
from vitprune_env.agents.checkpoint import load_state, save_state
from vitprune_env.errors import CheckpointError
from vitprune_env.game import TokenGame


def policy() -> TokenPolicy:
    actor = TokenActor(48, (5, 3), generator=torch.Generator().manual_seed(4))
    return TokenPolicy(actor, 0.123456789, (1, "2.attn"), {"backbone": "toy", "target_macs": 1e6, "seed": 4})


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


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_policy(policy(), tmp_path / "p.safetensors")
    before = path.read_bytes()

    def full(*_: object) -> int:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="disk full"):
        save_policy(TokenPolicy(TokenActor(8)), path)
    assert path.read_bytes() == before


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
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="unreadable"):
        load_policy(path)
    path.write_bytes(whole.replace(b'\\"embed_dim\\": 48', b'\\"embed_dim\\": 84'))
    with pytest.raises(CheckpointError, match="does not fit together"):
        load_policy(path)
    path.write_bytes(whole.replace(b'\\"format\\": 1', b'\\"format\\": 9'))
    with pytest.raises(CheckpointError, match="another version"):
        load_policy(path)
