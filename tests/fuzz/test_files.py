"""Damaged files: every one is refused, by the same kind of error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fuzzing import TIMES, in_time, inputs
from vitprune_env import PrunedViT, load_backbone
from vitprune_env.agents import AdaptivePolicy, TokenActor, TokenPolicy, load_policy, save_policy
from vitprune_env.baselines import EViT
from vitprune_env.deploy.pretrained import WEIGHTS
from vitprune_env.errors import CheckpointError
from vitprune_env.files import load_state, save_state
from vitprune_env.models.load import save_backbone

Kind = tuple[Path, bytes, Callable[[], Any]]


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> list[Kind]:
    """A file of every kind, its content, and what reads it."""
    folder = tmp_path_factory.mktemp("files")
    backbone, generator = load_backbone("vit_digits"), torch.Generator().manual_seed(0)
    policy = TokenPolicy(TokenActor(48, (4,), generator=generator), 0.5)
    adaptive = AdaptivePolicy(TokenActor(49, (4,), generator=generator), (0.4, 0.8), (1.0, 0.0))
    state = {"weight": torch.randn(9, generator=generator), "done": 3, "words": ["a", None], "empty": {}}
    model = folder / "model"
    PrunedViT(backbone, policy).save_pretrained(model)
    paths = {
        save_policy(policy, folder / "policy.safetensors"): load_policy,
        save_policy(adaptive, folder / "adaptive.safetensors"): load_policy,
        save_policy(EViT(0.5), folder / "evit.safetensors"): load_policy,
        save_state(state, folder / "state.safetensors"): load_state,
        save_backbone(backbone, folder / "network.safetensors"): lambda path: load_backbone(checkpoint=path),
        model / WEIGHTS: lambda _: PrunedViT.from_pretrained(model),
    }
    return [(path, path.read_bytes(), lambda path=path, read=read: read(path)) for path, read in paths.items()]


def damaged(content: bytes, how: str, place: int, other: bytes) -> bytes:
    """A file that was cut, changed, or written over."""
    return {
        "bit": content[:place] + bytes([content[place] ^ (1 << other[0] % 8)]) + content[place + 1 :],
        "cut": content[:place],
        "overwritten": content[:place] + other + content[place + len(other) :],
        "inserted": content[:place] + other + content[place:],
        "removed": content[:place] + content[place + len(other) :],
        "longer": content + other,
        "zeros": content[:place] + bytes(len(content) - place),
        "other": other * 50,
    }[how]


HOWS = ("bit", "cut", "overwritten", "inserted", "removed", "longer", "zeros", "other")


@TIMES
def test_damaged_files_are_refused(times: int, kinds: list[Kind]) -> None:
    places: set[tuple[int, int]] = set()

    @inputs(300 * times)
    @given(st.integers(0, len(kinds) - 1), st.sampled_from(HOWS), st.floats(0, 1), st.binary(min_size=1, max_size=9))
    def check(number: int, how: str, part: float, other: bytes) -> None:
        path, content, read = kinds[number]
        header = 8 + int.from_bytes(content[:8], "little")
        end = header if other[0] % 2 else len(content)  # half of the damage in the header, which is small
        place = int(part * (end - 1))
        changed = damaged(content, how, place, other)
        path.write_bytes(changed)
        try:
            if changed == content:
                read()
                return
            with in_time(), pytest.raises(CheckpointError) as refused:
                read()
            assert "\n" not in str(refused.value)
            places.add((number, place))
        finally:
            path.write_bytes(content)

    check()
    assert len(places) >= 200
