"""The commands on an image folder, from training with a paper's preset to evaluation, with random weights."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from vitprune_env import Backbone, PaperReward, TokenGame, load_backbone, save_backbone
from vitprune_env.agents import (
    PRESETS,
    GMACs,
    MAPPOConfig,
    RunConfig,
    Share,
    TokenActor,
    TokenPolicy,
    load_policy,
    save_policy,
    train,
)
from vitprune_env.baselines import EViT
from vitprune_env.benchmarking.presets import AT_KEEP_RATE
from vitprune_env.cli import evaluate, finetune, main
from vitprune_env.cli import train as train_command
from vitprune_env.cli.flags import ImageFlags
from vitprune_env.data import ImageFiles, classes, open_images
from vitprune_env.engine.cost import CostModel
from vitprune_env.types import parse_sites

SMALL = ["--img-size", "48", "--num-classes", "10", "--workers", "0", "--quick"]
BUDGET = 0.048  # GMACs, of 0.056


@cache
def stock_network(name: str) -> Backbone:
    return load_backbone(name)


def vitprune(*argv: object) -> None:
    """Run a command."""
    main(list(map(str, argv)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("digits")
    vitprune("digits-folder", "--output", root, "--train", 40, "--val", 60)
    return root


@pytest.fixture(scope="module")
def trained(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the preset of DeiT-S leaves behind, on a smaller network and a few images."""
    output = tmp_path_factory.mktemp("runs")
    network = ["--model", "deit_tiny_patch16_224", "--no-pretrained", *SMALL]
    network += ["--updates", "2", "--images", "8", "--cache-images", "16", "--calibration-images", "32"]
    vitprune("train", "--preset", "rl4evit-deit-s", "--data-dir", folder, "--target-gmacs", BUDGET, "--output", output,
             *network)  # fmt: skip
    return output


def results(output: Path, name: str = "evaluation.json") -> dict[str, Any]:
    return json.loads((output / name).read_text())


def test_training_on_a_folder_leaves_a_policy_and_its_comparison(trained: Path) -> None:
    summary, policy = results(trained, "summary.json"), load_policy(trained / "policy.safetensors")
    assert policy.info["backbone"] == "deit_tiny_patch16_224"
    assert policy.actor.hidden == (4 * 192, 256, 64)  # the widths that the paper prints, of this network
    assert [site.label for site in policy.sites or ()] == ["3", "6", "9"]
    assert [row["name"] for row in summary["rows"]][0::2] == ["dense", "untrained actor (mean of 1)", "EViT", "MAPPO"]
    assert summary["gmacs"] == pytest.approx(BUDGET, rel=0.05)
    assert (trained / "tokens.png").exists()


def test_training_reads_files_as_it_goes(folder: Path) -> None:
    """Without a cache every image is decoded whenever it is drawn: the setting for ImageNet."""
    backbone = load_backbone("vit_digits")
    files = open_images(backbone, folder, "train", workers=2)
    short = RunConfig(updates=2, images=8, cache_images=0, calibration_images=16)
    result = train(backbone, files, Share(0.6), run=short, progress=False)
    assert len(result.history) == 2
    assert result.train_macs == pytest.approx(result.target_macs, rel=0.05)


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_its_checkpoint_is_evaluated(trained: Path, folder: Path, tmp_path: Path, amp: str) -> None:
    vitprune("evaluate", "--checkpoint", trained, "--data-dir", folder, "--amp", amp, "--output", tmp_path,
        *SMALL)  # fmt: skip
    found, before = results(tmp_path), results(trained, "summary.json")
    dense, policy = found["rows"]
    assert policy["gmacs"] == pytest.approx(before["gmacs"], rel=0.02)  # the same weights, from the same seed
    assert dense["gmacs"] == pytest.approx(before["dense_gmacs"])
    assert dense["accuracy"] == pytest.approx(before["dense_accuracy"], abs=0.04)
    assert 0 <= policy["accuracy"] <= policy["top5"] <= 1
    assert found["trained"]["backbone"] == "deit_tiny_patch16_224"


def test_the_built_in_network_reads_its_task_from_files(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = folder / "val" / "0" / "broken.png"
    broken.write_bytes(b"nothing")
    options = ["--data-dir", folder, "--model", "vit_digits", "--policy", "evit", "--keep-rate", 0.8, "--workers", 0]
    try:
        vitprune("evaluate", *options, "--quick", "--output", tmp_path)
        shown = capsys.readouterr().out
        with pytest.raises(SystemExit):
            vitprune("evaluate", *options, "--quick", "--on-corrupt", "fail", "--output", tmp_path)
        assert "broken.png: not a readable image" in capsys.readouterr().err
    finally:
        broken.unlink()
    dense, evit = results(tmp_path)["rows"]
    assert dense["accuracy"] > 0.9  # trained on scenes, read from PNG files
    assert evit["gmacs"] < 0.8 * dense["gmacs"]
    assert results(tmp_path)["skipped"] == [str(broken)]
    assert "1 unreadable images were left out" in shown


def test_the_built_in_task_needs_no_files(tmp_path: Path) -> None:
    policy = TokenPolicy(TokenActor(48), info={"backbone": "vit_digits"})
    save_policy(policy, tmp_path / "policy.safetensors")
    vitprune("evaluate", "--checkpoint", tmp_path, "--quick", "--output", tmp_path, "--target-share", 0.7)
    dense, policy_row = results(tmp_path)["rows"]
    assert dense["accuracy"] > 0.9
    assert policy_row["gmacs"] == pytest.approx(0.7 * dense["gmacs"], rel=0.03)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "deit_tiny_patch16_224", "--policy", "evit"], "--data-dir: expected images for deit_tiny"),
        (["--preset", "evit-deit-s"], r"--preset: expected one of evit-deit-s-0\.8, "),
        (["--policy", "tome"], "--target-share: tome needs a budget"),
        (["--policy", "dynamicvit"], "--target-share: dynamicvit needs a budget"),
        (
            ["--policy", "evo_vit", "--sites", "published", "--target-share", "0.3"],
            "--target-gmacs: EvoViT reaches .*; up to the first",
        ),
        (
            ["--policy", "evit", "--keep-rate", "0.5", "--target-gmacs", "0.01"],
            "--keep-rate, --target-gmacs: expected one of",
        ),
    ],
)
def test_flags_that_make_no_sense(
    argv: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        vitprune("evaluate", *argv, "--quick", "--output", tmp_path)
    assert stopped.value.code == 2
    assert re.search(f"error: {message}", capsys.readouterr().err)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A head whose classes are the ten digits, from nine to zero."""
    network = load_backbone("deit_tiny_patch16_224", class_names=list("9876543210"), img_size=48, num_classes=10)
    return save_backbone(network, tmp_path_factory.mktemp("weights") / "weights.safetensors")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--weights", "{weights}", "--num-classes", 7],
            "--weights: expected .* head of 10 .*; --num-classes 10 gives",
        ),
        (["--weights", "nowhere.safetensors"], r"--weights: expected a weight file, got nowhere"),
        (["--weights", "nowhere.pth"], r"--weights: expected weights of this model, got nowhere"),
        (["--weights", "{weights}", "--data-dir", "nowhere"], "--data-dir: expected a folder of images, found none at"),
        (
            ["--weights", "{weights}", "--class-map", "nowhere.txt"],
            "--class-map: expected a file .* found none at nowhere",
        ),
        (["--weights", "{weights}", "--split", "test"], r"--split: expected a folder for 'test' in .*'train', 'val'"),
        (["--num-classes", 7], "classes: .* the images have 10, .* has 7; load the model with --num-classes 10"),
        ([], "has 1000; load the model with --num-classes 10, or .* with a --class-map file"),
        (["--model", "vit_digits", "--num-classes", 7], "--model: expected a name of timm beside --num-classes;"),
        (["--model", "deit_smal_patch16_224"], "unknown model 'deit_smal_patch16_224'; did you mean deit_small"),
        (
            ["--model", "vit_small_patch14_dinov2"],
            "--model: .* no classifier .*; --num-classes <how many> gives it one",
        ),
        (["--keep-rate", 2], "--keep-rate: expected"),
        (["--weights", "{weights}", "--images", 0], "--images: expected 1 or more, got 0"),
    ],
)
def test_mistakes_with_networks_and_images_name_the_flag(
    argv: list[Any], message: str, folder: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(word).format(weights=weights) for word in argv]
    with pytest.raises(SystemExit) as stopped:
        vitprune("evaluate", "--model", "deit_tiny_patch16_224", "--policy", "evit", "--data-dir", folder,
                 "--output", tmp_path, *given)  # fmt: skip
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(f"error: .*{message}", line)


def test_a_weight_file_says_what_network_and_which_classes(
    folder: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    classes._warn.cache_clear()
    vitprune("evaluate", "--weights", weights, "--data-dir", folder, "--policy", "evit", "--images", 12, "--quick",
             "--workers", 0, "--output", tmp_path)  # fmt: skip
    shown = capsys.readouterr()
    assert shown.err.splitlines() == [
        "warning: classes: 10 of 10 have another number among the images than in the network's head; labels are mapped "
        "by name"
    ]
    assert len(results(tmp_path)["rows"]) == 2
    assert results(tmp_path)["settings"]["images"] == "12"
    vitprune("info", "--weights", weights)
    shown = capsys.readouterr().out
    assert re.search(r"^architecture +deit_tiny_patch16_224$", shown, flags=re.MULTILINE)
    assert re.search(r"^class_names +9, 8, 7, .*, 0$", shown, flags=re.MULTILINE)


def test_images_for_several_purposes_are_apart(folder: Path) -> None:
    """Also where one folder serves as training and validation images."""
    backbone = load_backbone("vit_digits")
    for root, sizes in ((folder, (8, 32, 60)), (folder / "val", (8, 13, 39))):
        parts = ImageFlags(data_dir=root, workers=0).open_apart(
            backbone, ("train", 8, 1), ("train", 100, 2), ("validation", None, 3)
        )
        assert tuple(map(len, parts)) == sizes
        names = [{cast(ImageFiles, part).name(index) for index in range(len(part))} for part in parts]
        assert sum(map(len, names)) == len(set.union(*names))


def test_a_policy_of_another_width_is_refused(trained: Path, folder: Path) -> None:
    args = evaluate.parse(["--checkpoint", str(trained), "--data-dir", str(folder), "--model", "vit_digits"])
    with pytest.raises(ValueError, match=r"trained on deit_tiny_patch16_224 \(width 192\), vit_digits has width 48"):
        evaluate.load(args)


def test_presets_give_way_to_flags() -> None:
    args = evaluate.parse(["--preset", "evit-deit-b-0.7", "--keep-rate", "0.5", "--no-pretrained"])
    assert (args.source.model, args.source.pretrained) == ("deit_base_patch16_224", False)
    assert (args.policy, args.keep_rate) == ("evit", 0.5)
    args = evaluate.parse(["--preset", "tome-deit-s-3.0"])
    assert (args.policy, args.target_gmacs, args.target_share) == ("tome", 3.0, None)
    args = evaluate.parse(["--preset", "tome-deit-s-3.0", "--target-share", "0.4"])
    assert (args.policy, args.target_gmacs, args.target_share) == ("tome", None, 0.4)
    args = evaluate.parse(["--preset", "ats-dinov2-s-half"])
    assert (args.target_share, args.source.img_size, args.source.pretrained) == (0.5, 224, False)
    train = train_command.parse(["--preset", "rl4evit-deit-b", "--lr", "1e-4"])
    assert (train.images.model, train.images.pretrained) == ("deit_base_patch16_224", True)
    learner = cast(MAPPOConfig, train.settings.learner)
    assert (learner.lr, learner.epochs) == (1e-4, 15)
    assert learner.networks.actor_widths(768) == learner.networks.critic_widths(768) == (3072, 256, 64)


def test_local_weights_win_over_the_preset(folder: Path, tmp_path: Path) -> None:
    network = load_backbone("deit_tiny_patch16_224", img_size=32, num_classes=10)
    torch.save({"model": network.model.state_dict()}, tmp_path / "weights.pth")
    options = [
        "--model",
        "deit_tiny_patch16_224",
        "--weights",
        str(tmp_path / "weights.pth"),
        "--data-dir",
        str(folder),
    ]
    args = evaluate.parse(["--preset", "evit-deit-s-0.7", *options, *SMALL])
    _, backbone = evaluate.load(args)
    assert backbone.image_size == (48, 48)
    name = "blocks.3.mlp.fc1.weight"
    assert torch.equal(backbone.model.state_dict()[name], network.model.state_dict()[name])


def test_presets_are_what_the_papers_print() -> None:
    """Widths are four times the network's, sites its quarters; budgets lie where the network can be."""
    for preset in (PRESETS["rl4evit-deit-s"], PRESETS["rl4evit-deit-b"]):
        assert preset.model is not None
        backbone, learner = stock_network(preset.model), cast(MAPPOConfig, preset.learner)
        assert learner.networks.actor_widths(backbone.embed_dim)[0] == 4 * backbone.embed_dim
        assert preset.sites is not None
        assert list(map(str, preset.sites)) == [site.label for site in backbone.default_sites]
        assert (learner.lr, learner.epochs, type(preset.reward)) == (5e-5, 15, PaperReward)
        game = TokenGame(backbone, preset.sites)
        assert isinstance(preset.budget, GMACs)
        assert game.cost.floor(game.sites) < 1e9 * preset.budget.gmacs < game.cost.dense()


@pytest.mark.parametrize("name", AT_KEEP_RATE)
def test_published_settings_cost_what_was_printed(name: str) -> None:
    published = AT_KEEP_RATE[name]
    assert published.keep_rate is not None
    cost = CostModel.of(stock_network(published.model))
    policy, n, counts = EViT(published.keep_rate), cost.num_patches, []
    for _ in range(3):
        n = -int(-n * published.keep_rate // 1) + 1
        counts.append(n)
    depth = cost.num_halves // 2
    found = float(cost.forward(torch.tensor([counts]), parse_sites(policy.published_sites(depth), depth))) / 1e9
    assert found == pytest.approx(published.gmacs, rel=0.02)


def test_images_are_not_written_among_others(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(folder.rglob("*"))
    with pytest.raises(SystemExit):
        vitprune("digits-folder", "--output", folder, "--train", 1, "--val", 1)
    assert capsys.readouterr().err.startswith("error: --output: expected a folder without images, got one with")
    assert sorted(folder.rglob("*")) == before


def test_of_one_folder_nothing_is_both_learnt_from_and_reported_on(folder: Path) -> None:
    flags = ["--data-dir", str(folder / "val"), "--images", "20", "--train-images", "30"]
    args = finetune.parse(flags)
    task = finetune.open_task(args, stock_network("vit_digits"))
    files: list[Any] = [task.tune, cast(Any, task.test).files, task.train]
    parts = [{part.name(row) for row in range(len(part))} for part in files]
    assert [len(part) for part in parts] == [15, 11, 30]  # a quarter of 60, then of what is left
    assert len(set.union(*parts)) == sum(map(len, parts))
