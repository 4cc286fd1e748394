"""A network that bears missing tokens: what is drawn, what learns, resuming to the bit, refusals."""

from __future__ import annotations

import json
import signal
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from PIL import Image

from helpers import make_model
from vitprune_env import Backbone, TokenGame, load_backbone, play
from vitprune_env.agents import (
    BackboneConfig,
    FinetuneConfig,
    LastBlocks,
    RandomSites,
    TokenDropping,
    TrainingStopped,
    finetune_backbone,
)
from vitprune_env.agents.finetuning import token_dropping
from vitprune_env.agents.finetuning.step import FineTuner
from vitprune_env.data import ImageFiles, open_images
from vitprune_env.errors import CheckpointError, SettingsError

NAME = "vit_tiny_patch16_224"
NAMES = ("Zebra", "ant", "bee")  # in timm's order ant, bee, Zebra
SHORT = BackboneConfig(steps=5, batch_size=6, layer_decay=0.5, head_views=1, amp="off", checkpoint_every=2)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six images of each of three colours."""
    root = tmp_path_factory.mktemp("colours")
    for index, name in enumerate(NAMES):
        (root / name).mkdir()
        for number in range(6):
            colour = [20 * number] * 3
            colour[index] = 255
            Image.new("RGB", (48, 40), tuple(colour)).save(root / name / f"{number}.png")
    return root


def network() -> Backbone:
    backbone = load_backbone(make_model(NAME, num_classes=3, drop_path_rate=0.1))
    backbone.class_names = ("ant", "bee", "Zebra")
    return backbone


@pytest.fixture
def files(root: Path) -> ImageFiles:
    return open_images(network(), root)


def run(files: ImageFiles, config: BackboneConfig = SHORT, **options: Any) -> Any:
    return finetune_backbone(network(), files, config, progress=False, **options)


def weights(backbone: Backbone) -> dict[str, torch.Tensor]:
    return backbone.model.state_dict()


def changed(one: Backbone, other: Backbone) -> set[str]:
    before, after = weights(one), weights(other)
    return {name for name in before if not torch.equal(before[name], after[name])}


def drawn(dropping: TokenDropping, batches: int, depth: int = 12) -> list[dict[int, float]]:
    policy, found = RandomSites(dropping, depth, torch.Generator().manual_seed(0)), []
    for _ in range(batches):
        policy.reset(2, 16)
        found.append(policy.rates)
    return found


def test_sites_and_rates_are_drawn_as_documented() -> None:
    batches = drawn(TokenDropping(dense=0.25, most_sites=3, keep_rates=(0.4, 0.8)), 4000)
    counts = torch.bincount(torch.tensor([len(rates) for rates in batches])) / 4000
    torch.testing.assert_close(counts, torch.full((4,), 0.25), atol=0.03, rtol=0)  # dense, then 1, 2, 3 sites alike
    sites = torch.bincount(torch.tensor([site for rates in batches for site in rates]))
    assert len(sites) == 10, "after blocks 1 to 9 of 12"
    assert sites[0] == 0
    torch.testing.assert_close(sites[1:] / sites.sum(), torch.full((9,), 1 / 9), atol=0.02, rtol=0)
    rates = torch.tensor([rate for rates in batches for rate in rates.values()])
    assert 0.4 <= rates.min() < 0.41 < 0.79 < rates.max() <= 0.8
    assert float(rates.mean()) == pytest.approx(0.6, abs=0.01)


def test_short_networks_have_fewer_sites() -> None:
    assert {len(rates) for rates in drawn(TokenDropping(dense=0.0), 200, depth=4)} == {1, 2, 3}
    assert {tuple(rates) for rates in drawn(TokenDropping(dense=0.0), 20, depth=1)} == {(1,)}


def test_a_batch_keeps_the_rounded_up_share_at_its_sites_and_all_elsewhere() -> None:
    backbone = network()  # 25 tokens, 4 blocks
    policy = RandomSites(TokenDropping(dense=0.0, most_sites=2), backbone.depth, torch.Generator().manual_seed(3))
    game = TokenGame(backbone, policy.default_sites(backbone.depth))
    images = torch.randn(5, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    sets = set()
    for _ in range(4):
        kept = play(game, policy, images).keep  # [T, B, N]
        left = torch.tensor(25)
        for site, keep in enumerate(kept, start=1):
            left = (left.double() * policy.rates.get(site, 1.0)).ceil()
            assert keep.sum(dim=1).tolist() == [left] * 5
        assert not torch.equal(kept[-1, 0], kept[-1, 1]), "each image loses tokens of its own"
        sets.add(tuple(sorted(policy.rates)))
    assert len(sets) > 1


def test_the_head_comes_first_and_then_the_last_blocks(files: ImageFiles) -> None:
    seen: list[tuple[int, set[str]]] = []
    before = network()
    result = run(files, after_step=lambda step, now: seen.append((step, changed(before, now))) or {"mark": float(step)})
    assert [step for step, _ in seen] == [0, 1, 2, 3, 4, 5]
    assert seen[0][1] == {"head.weight", "head.bias"}
    learnt = {
        name for name in weights(before) if name.startswith(("blocks.1.", "blocks.2.", "blocks.3.", "norm.", "head."))
    }
    assert seen[-1][1] == changed(before, result.backbone) == learnt
    assert [row["mark"] for row in result.history] == [1, 2, 3, 4, 5]
    assert len({row["gmacs"] for row in result.history}) > 1, "batches cost differently"
    assert not result.backbone.training


def test_earlier_blocks_learn_more_slowly() -> None:
    config = FinetuneConfig(trainable=LastBlocks(2, layer_decay=0.5), cache_images=0, lr=1e-2, warmup_steps=0)
    backbone, data = network(), [(torch.zeros(3, 40, 40), 0)]
    policy = RandomSites(TokenDropping(), 4, torch.Generator())
    tuner = FineTuner(backbone, data, config, policy, torch.Generator())  # type: ignore[arg-type]
    names = {id(value): name for name, value in backbone.model.named_parameters()}
    rates = {names[id(value)]: group["lr"] for group in tuner.optimizer.param_groups for value in group["params"]}
    shown = {name: rates[name] for name in ("head.weight", "blocks.3.attn.qkv.weight", "blocks.2.mlp.fc1.bias")}
    assert list(shown.values()) == pytest.approx([1e-2, 5e-3, 2.5e-3])
    assert not [name for name in rates if name.startswith(("blocks.0.", "blocks.1.", "patch_embed."))]


def test_interrupted_and_resumed_gives_the_same_bits(
    files: ImageFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = run(files)
    step, calls = FineTuner.step, []

    def interrupted(self: FineTuner, policy: Any) -> dict[str, float]:
        calls.append(policy)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGTERM)
        return step(self, policy)

    monkeypatch.setattr(FineTuner, "step", interrupted)
    with pytest.raises(TrainingStopped, match="after step 3 of 5"):
        run(files, output=tmp_path)
    monkeypatch.setattr(token_dropping, "fit_head", None)  # it is not fitted again
    resumed = run(files, replace(SHORT, checkpoint_every=1), output=tmp_path, resume=True)
    assert len(calls) == SHORT.steps
    assert not changed(straight.backbone, resumed.backbone)
    assert resumed.history == straight.history


def test_what_is_saved_is_the_network_with_its_classes(files: ImageFiles, tmp_path: Path) -> None:
    backbone = Backbone(deepcopy(network().model), NAME, class_names=network().class_names)
    result = finetune_backbone(backbone, files, SHORT, output=tmp_path, progress=False)
    sizes: dict[str, Any] = {"embed_dim": 48, "num_heads": 3, "depth": 4, "patch_size": 8}
    loaded = load_backbone(NAME, checkpoint=tmp_path / "backbone.safetensors", **sizes)
    assert (loaded.num_classes, loaded.image_size, loaded.class_names) == (3, (40, 40), ("ant", "bee", "Zebra"))
    assert not changed(result.backbone, loaded)
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert settings["recipe"]["dropping"] == {"name": "TokenDropping", "dense": 0.25, "most_sites": 4,
                                              "keep_rates": [0.3, 0.9]}  # fmt: skip
    assert (settings["classes"], settings["images"]) == (3, 18)


def test_a_run_with_other_settings_is_not_resumed(files: ImageFiles, tmp_path: Path) -> None:
    run(files, output=tmp_path)
    other = replace(SHORT, dropping=TokenDropping(dense=0.5), view_scale=(0.5, 1.0))
    with pytest.raises(CheckpointError, match=r"recipe.dropping.dense was 0.25, now is 0.5, .*view_scale"):
        run(files, other, output=tmp_path, resume=True)
    with pytest.raises(SettingsError, match="output: expected a folder without a run"):
        run(files, other, output=tmp_path)
    assert json.loads((tmp_path / "settings.json").read_text())["recipe"]["dropping"]["dense"] == 0.25


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"epochs": 0.0}, "epochs"),
        ({"steps": 0}, "steps"),
        ({"blocks": 0}, "blocks"),
        ({"blocks": 5}, "blocks: expected at most 4"),
        ({"head_views": 0}, "head_views"),
        ({"head_decay": -1.0}, "head_decay"),
        ({"layer_decay": 0.0}, "layer_decay"),
        ({"lr": 0.0}, "lr"),
        ({"view_scale": (0.0, 1.0)}, "scale"),
        ({"amp": "fp16"}, "amp: expected off, auto or bf16"),
    ],
)
def test_settings_refuse_nonsense_by_name(wrong: dict[str, Any], message: str, files: ImageFiles) -> None:
    with pytest.raises(ValueError, match=message):
        run(files, replace(SHORT, **wrong))


@pytest.mark.parametrize(
    "wrong", [{"dense": 1.5}, {"most_sites": 0}, {"keep_rates": (0.0, 0.5)}, {"keep_rates": (0.6, 0.5)}]
)
def test_dropping_refuses_nonsense_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TokenDropping(**wrong)


def test_passes_over_the_images_become_steps() -> None:
    config = BackboneConfig(epochs=1.5, batch_size=10)
    assert config.training(images=40, depth=12, device="cpu").steps == 6
    assert cast(LastBlocks, config.training(40, 12, "cpu").trainable).count == 8, "the later two thirds"
    assert replace(config, steps=9).training(40, 12, "cpu").steps == 9
