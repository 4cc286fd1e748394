"""Files that version 0.1 wrote still load, and the policies in them decide and classify as they did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from places import TESTS
from vitprune_env import PrunedViT, TokenGame, load_backbone, load_policy, load_pruned, play, save_policy
from vitprune_env.baselines import LTMP, Brightness, TokenScores, ToMeShare, available, describe, load_fitted
from vitprune_env.data import Digits
from vitprune_env.deploy.descriptions import describe_policy
from vitprune_env.deploy.format_1 import NAMES, upgrade_policy
from vitprune_env.deploy.policy_files import read_policy_file
from vitprune_env.errors import CheckpointError
from vitprune_env.files import write_file
from vitprune_env.models.vit_digits import WEIGHTS
from vitprune_env.policy import registered_policy

FILES = TESTS / "deploy" / "files_of_0_1"
ANSWERS: dict[str, dict[str, Any]] = json.loads((FILES / "answers.json").read_text())
IMAGES = Digits("test", 4, seed=7).batch(range(4))[0]
POLICIES = sorted(name for name in ANSWERS if not name.startswith("pruned"))


def old_folder(name: str, folder: Path) -> Path:
    """A folder as `PrunedViT.save_pretrained` of 0.1 wrote it: the built-in network, and the actor of a policy file."""
    tensors = {f"backbone.model.{key}": value for key, value in load_file(WEIGHTS / "vit_digits.safetensors").items()}
    if name == "pruned_token":
        actor = load_file(FILES / "token_policy.safetensors")
        tensors.update({f"policy.actor.{key}": value for key, value in actor.items()})
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text((FILES / f"{name}.json").read_text())
    return folder


@pytest.mark.parametrize("name", POLICIES)
def test_policies_decide_as_they_did(name: str) -> None:
    backbone, expected = load_backbone(), ANSWERS[name]
    policy = load_policy(FILES / f"{name}.safetensors")
    game = TokenGame.for_policy(backbone, policy)
    outcome = play(game, policy, IMAGES).outcome
    assert [site.label for site in game.sites] == expected["sites"]
    assert outcome.n_kept.T.tolist() == expected["keep"]
    assert outcome.macs.tolist() == expected["macs"]
    torch.testing.assert_close(outcome.logits, torch.tensor(expected["logits"]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["pruned_evit", "pruned_token"])
@pytest.mark.parametrize("load", [PrunedViT.from_pretrained, load_pruned])
@torch.no_grad()
def test_models_answer_as_they_did(name: str, load: Any, tmp_path: Path) -> None:
    model = load(old_folder(name, tmp_path))
    torch.testing.assert_close(model(IMAGES), torch.tensor(ANSWERS[name]["logits"]), atol=1e-5, rtol=1e-5)


def test_the_names_of_the_old_functions_read_them() -> None:
    assert load_fitted(FILES / "life_regression.safetensors").default_sites(8)[0].label == "3"
    policy = load_policy(FILES / "ltmp.safetensors")
    assert LTMP.load(FILES / "ltmp.safetensors") == policy
    assert policy.prune_thresholds[:2] == (0.001, 0.002)
    with pytest.raises(CheckpointError, match="expected a file of LTMP, got one of TokenPolicy"):
        LTMP.load(FILES / "token_policy.safetensors")


@pytest.mark.parametrize("name", POLICIES)
def test_an_old_policy_saved_anew_is_of_the_present_format(name: str, tmp_path: Path) -> None:
    old = load_policy(FILES / f"{name}.safetensors")
    path = save_policy(old, tmp_path / "policy.safetensors")
    header, _ = read_policy_file(path)
    assert header["format"] == 2
    assert set(header["policy"]) == {"name", "config"}
    new = load_policy(path)
    assert type(new) is type(old)
    if isinstance(old, torch.nn.Module):
        assert all(torch.equal(value, new.state_dict()[key]) for key, value in old.state_dict().items())
    assert describe_policy(new) == describe_policy(old)


def test_every_old_class_has_a_public_name() -> None:
    """The table leads to classes that are registered, and knows every method that there was."""
    for path, name in NAMES.items():
        kind = registered_policy(name)
        assert kind is not None
        assert kind.__name__ == path.partition(":")[2]
    made = {getattr(method.make, "func", method.make) for method in map(describe, available())}
    newer = {Brightness, TokenScores, ToMeShare}
    assert made - newer == made & {registered_policy(name) for name in NAMES.values()}


@pytest.mark.parametrize(
    "kind",
    [
        "os:system",
        "helpers:Fixed",
        "vitprune_env.deploy.pretrained:Path",  # imported there, from elsewhere
        "vitprune_env.policy:BasePolicy.__init__",
        "vitprune_env.policy:keep_top",
        "vitprune_env.policy:NoSuchPolicy",
        "vitprune_env.no_such_module:Policy",
        "vitprune_env.engine.backbone:Backbone",  # not a policy
        "vitprune_env...os:System",
        "evit",
        "",
        3,
        ["vitprune_env.policy:KeepAll"],
    ],
)
def test_classes_outside_the_table_are_refused(kind: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="policy"):
        upgrade_policy({"class": kind, "config": {}})
    header = {"format": 1, "kind": "fitted policy", "policy": {"class": kind, "config": {}}}
    with pytest.raises(CheckpointError, match=r"expected a class of vitprune_env 0\.1"):
        load_policy(write_file(tmp_path / "p.safetensors", {}, header))
