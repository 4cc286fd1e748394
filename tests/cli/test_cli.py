"""The command `vitprune`: its subcommands, their flags, and what they say of mistakes."""

from __future__ import annotations

import json
import logging
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from places import ROOT
from vitprune_env import KeepAll, PaperReward, PrunedViT, TeamOutcome
from vitprune_env.agents import (
    PRESETS,
    BudgetRange,
    Equilibrium,
    GMACs,
    KeepRate,
    PPOSingleConfig,
    Share,
    TokenActor,
    TokenPolicy,
    save_policy,
)
from vitprune_env.cli import COMMANDS, benchmark, evaluate, explained, finetune, main
from vitprune_env.cli.flags import ImageFlags, ResumableFlags, in_flags, own_network, read_flags
from vitprune_env.cli.train import parse
from vitprune_env.data import Digits
from vitprune_env.errors import SettingsError
from vitprune_env.game.rewards import PaperCodeReward


def vitprune(*argv: object) -> None:
    """Run a command."""
    main(list(map(str, argv)))


def mistake(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """The one line that a wrong command line gets."""
    with pytest.raises(SystemExit) as stopped:
        vitprune(*argv)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    actor = TokenActor(48, generator=torch.Generator().manual_seed(0))
    save_policy(TokenPolicy(actor, info={"backbone": "vit_digits", "target_macs": 1e7}), folder / "policy.safetensors")
    return folder


def test_the_list_of_commands_comes_without_loading_torch() -> None:
    code = (
        "import sys\nfrom vitprune_env.cli import main\nmain(['--help'])\n"
        "print(*sorted({'torch', 'timm', 'tianshou', 'matplotlib', 'sklearn', 'scipy'} & set(sys.modules)), 'loaded')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    *shown, loaded = done.stdout.splitlines()
    assert loaded.strip() == "loaded"
    assert all(re.search(rf"^  {name} +\w", "\n".join(shown), flags=re.MULTILINE) for name in COMMANDS)


def test_a_reader_that_leaves_is_no_error() -> None:
    """As `head` does."""
    code = "from vitprune_env.cli import explained\nwith explained():\n    while True: print('line')"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    ) as run:
        assert run.stdout is not None
        assert run.stderr is not None
        assert run.stdout.readline() == b"line\n"
        run.stdout.close()
        assert run.stderr.read() == b""
    assert run.returncode == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_flags_in_groups_with_defaults(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stopped:
        vitprune(command, "--help")
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert f"usage: vitprune {command}" in shown
    _, *groups = re.split(r"^\W*(?:[\w.]+ )?options\W*$", shown, flags=re.MULTILINE)
    assert all("(default:" in group for group in groups)
    assert max(len(re.findall(r"^\W* --", group, flags=re.MULTILINE)) for group in groups) <= 20


@dataclass
class Flags:
    """What a command has."""

    inner: ResumableFlags = field(default_factory=ResumableFlags)
    first: int = 0
    """A text that goes on
    in the next line."""


def test_lines_of_help_end_where_the_terminal_does(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):  # the second time as well
        with pytest.raises(SystemExit):
            read_flags(Flags, ["--help"], "About.")
        shown = capsys.readouterr().out
        assert "A text that goes on in the next line. (default: 0)" in shown
        assert "Go on from what lies in the output folder" in shown
        assert "Attributes" not in shown


def test_flags_have_short_names(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        vitprune("train", "--help")
    shown = capsys.readouterr().out
    names = (
        "target-share target-gmacs target-keep preset keep-cost outcome-bonus adaptive finetune algorithm reward "
        "outcome resume output quick seed device threads amp data-dir model pretrained weights sites split lr updates "
        "images minibatch precision update-chunk cache-images checkpoint-every log-images-every wandb actor-hidden "
        "distill finetune-every discount charge-overhead test-images"
    )
    for name in names.split():
        assert re.search(rf"--{name}\b", shown), name


def test_mistakes_are_one_line_with_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "unknown command 'trian'; did you mean train?" in mistake(capsys, "trian")
    line = mistake(capsys, "train", "--quick", "--sites", 3, 99, "--output", tmp_path)
    assert line == "error: --sites: expected blocks 1 to 8, got '99'"
    line = mistake(capsys, "train", "--quick", "--target-share", 0.1, "--output", tmp_path)
    assert line.startswith("error: budget: expected above 0.00495")
    line = mistake(capsys, "train", "--epochs", 0, "--output", tmp_path)
    assert line == "error: --epochs: expected at least 1, got 0"
    line = mistake(capsys, "evaluate", "--checkpoint", "nowhere", "--output", tmp_path)
    assert re.search("error: .*nowhere.*expected a policy file, found none", line)
    for command in ("evaluate", "export"):
        line = mistake(capsys, command, "--checkpoint", "mine", "--keep-rate", 0.5, "--output", tmp_path)
        assert line.startswith("error: --keep-rate: expected none beside a saved policy")
    line = mistake(capsys, "benchmark", "--methods", "evt", "--output", tmp_path)
    assert "did you mean evit" in line
    line = mistake(capsys, "benchmark", "--images", 0, "--output", tmp_path)
    assert line == "error: --images: expected 1 or more, got 0"
    line = mistake(capsys, "benchmark", "--quick", "--budgets", 1.5, "--methods", "evit", "--output", tmp_path)
    assert "--budgets: expected shares of the dense GMACs between 0 and 1, got 1.5" in line
    (tmp_path / "file").touch()
    assert "--output: expected a folder" in mistake(capsys, "export", "--output", tmp_path / "file")
    assert "did you mean evit" in mistake(capsys, "info", "--method", "evt")
    assert "--policy: expected a baseline with a keep rate, got tome" in mistake(capsys, "export", "--policy", "tome")
    assert "expected a baseline without training, got ltmp" in mistake(capsys, "export", "--policy", "ltmp")


def test_arguments_of_the_library_are_called_by_their_flags() -> None:
    args = benchmark.Args
    assert in_flags("checkpoint: a head of 7 classes; num_classes=7 gives it", args) == (
        "--weights: a head of 7 classes; --num-classes 7 gives it"
    )
    assert in_flags("pretrained: pass checkpoint=<a file>, or pretrained=False", args) == (
        "--pretrained: pass --weights <a file>, or --no-pretrained"
    )
    assert in_flags("a class_map file, download=True", args) == "a --class-map file, --download"
    for kept in ("runs/class_map/x: an EViT(keep_rate=0.5)", "images are split", "the model: dense", "num_classes_x"):
        assert in_flags(kept, args) == kept
    assert in_flags("keep_rate: expected 0 to 1", args) == "keep_rate: expected 0 to 1"  # no flag of this command
    assert in_flags("keep_rate: expected 0 to 1", evaluate.Args) == "--keep-rate: expected 0 to 1"


def test_a_quick_run_takes_fewer_of_everything_and_never_more() -> None:
    assert evaluate.parse(["--quick"]).images == 100
    assert evaluate.parse(["--quick", "--images", "16"]).images == 16
    assert evaluate.parse(["--quick", "--images", "500"]).images == 100
    small = benchmark.parse(["--quick", "--images", "9", "--tune-images", "5", "--seeds", "1"])
    assert (small.images, small.tune_images, small.fit_images, small.seeds, small.pairs) == (9, 5, 256, 1, 2)
    args = parse(["--quick", "--images", "8", "--test-images", "20", "--updates", "1", "--cache-images", "0"])
    run = args.training.run
    assert (run.images, args.test_images, run.updates, run.cache_images) == (8, 20, 1, 0)
    tuned = finetune.parse(["--quick", "--images", "10", "--steps", "2"])
    assert (tuned.images, tuned.optimiser.steps, tuned.train_images) == (10, 2, 64)


def test_warnings_reach_stderr_as_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with explained(evaluate.Args):
        logging.getLogger("vitprune_env.data").warning("skipped %s; num_classes=%d", "a.png", 7)
    assert capsys.readouterr().err == "warning: skipped a.png; --num-classes 7\n"
    assert not logging.getLogger("vitprune_env").handlers


def test_a_device_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for device in ("cuda:99", "no-such-device"):
        line = mistake(capsys, "evaluate", "--policy", "evit", "--device", device, "--output", tmp_path)
        assert line.startswith(f"error: --device: expected one that torch finds, got '{device}'")


def test_a_programming_error_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitprune_env.cli.info.about_method", lambda _: int("x"))
    with pytest.raises(ValueError, match="invalid literal"):
        vitprune("info", "--method", "evit")


def test_preset_decides_defaults_and_flags_win() -> None:
    argv = ["--preset", "rl4evit", "--updates", "7", "--keep-cost", "2.5", "--outcome-bonus", "1.5"]
    settings, paper = parse(argv).settings, PRESETS["rl4evit"]
    assert settings.reward == PaperReward(keep_cost=2.5, outcome_bonus=1.5)
    assert (settings.learner, settings.run) == (paper.learner, replace(paper.run, updates=7, validate_every=10))
    assert isinstance(settings.budget, Equilibrium)  # two weights and no budget
    for name in ("rl4evit", "rl4evit-printed"):
        unwatched = parse([f"--preset={name}", "--validate-every", "0"])
        assert unwatched.settings == PRESETS[name]
    assert parse(["--reward", "paper_code"]).settings.reward == PaperCodeReward()
    letter = parse(["--reward", "paper", "--pay", "all", "--no-scaled", "--target-share", "0.5", "--sampled"]).settings
    assert letter.reward == PaperReward(outcome_bonus=1.0, scaled=False, pay="all")
    assert letter.budget == Share(0.5, sampled=True)
    settings, default = parse(["--validate-every=0"]).settings, PRESETS["default"]
    assert (settings.budget, settings.learner, settings.run) == (default.budget, default.learner, default.run)
    assert settings.reward == default.learner.default_reward()
    assert parse(["--target-gmacs", "0.01"]).settings.budget == GMACs(0.01)
    assert parse(["--target-keep", "0.6", "--price-rate", "0.1"]).settings.budget == KeepRate(0.6, price_rate=0.1)
    assert parse(["--adaptive", "0.2", "0.6"]).settings.budget == BudgetRange(0.2, 0.6)
    assert parse(["--paper-sizes"]).settings.budget == Share(0.6)
    single = parse(["--algorithm", "ppo_single"]).settings
    assert (single.learner, type(single.reward)) == (PPOSingleConfig(), TeamOutcome)
    assert parse(["--preset", "rl4evit-deit-s", "--target-gmacs", "2"]).settings.budget == GMACs(2.0, anneal_from=0.7)
    for argv in (["--target-gmacs", "0.01", "--target-share", "0.3"], ["--adaptive", "0.2"]):
        with pytest.raises(SettingsError, match="expected"):
            _ = parse(argv).settings


@pytest.mark.parametrize("mode", ["alternate", "after"])
def test_quick_runs_have_time_for_fine_tuning(mode: str) -> None:
    settings = parse(["--quick", "--finetune", mode]).settings
    assert settings.finetune is not None
    assert settings.finetune.when == mode
    assert settings.finetune.every <= settings.run.updates
    assert settings.finetune.steps <= 4


def test_weights_of_another_run_are_not_taken_for_fine_tuned_ones(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copy(checkpoint / "policy.safetensors", tmp_path)
    (tmp_path / "backbone.safetensors").write_bytes(b"left by a run that fine-tuned its network")
    _, backbone = evaluate.load(evaluate.Args(checkpoint=tmp_path))
    assert backbone.name == "vit_digits"


def test_a_network_is_fine_tuned_for_a_baseline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vitprune("finetune", "--quick", "--policy", "topk", "--target-share", 0.5, "--output", tmp_path)
    assert "| topk, fine-tuned |" in capsys.readouterr().out
    assert (tmp_path / "backbone.safetensors").exists()
    rates = [json.loads(line)["keep_rate"] for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert rates[0] == 1.0
    assert rates[-1] < 1.0


def test_a_policy_of_ones_own_is_evaluated_like_a_baseline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from vitprune_env import KeepAll\nfrom vitprune_env.baselines import TopK\n"
        "all_of_them = KeepAll()\nclass Mine(TopK): pass\nnothing = 3\n"
    )

    def loaded(name: str, *flags: str) -> Any:
        return evaluate.load(evaluate.parse(["--quick", "--policy", f"{file}:{name}", *flags]))[0]

    assert loaded("Mine").keep_rate == 0.7
    assert loaded("Mine", "--keep-rate", "0.4").keep_rate == 0.4
    assert 0.5 < loaded("Mine", "--target-share", "0.5").keep_rate < 0.8
    assert isinstance(loaded("all_of_them"), KeepAll)
    assert evaluate.parse(["--policy", f"{file}:Mine"]).common.output == Path("runs/evaluation-Mine")
    for name, flags, said in (
        ("all_of_them", ("--keep-rate", 0.5), "error: --keep-rate: expected none"),
        ("nothing", (), "error: --policy: expected a policy, or a class"),
    ):
        assert mistake(capsys, "evaluate", "--quick", "--policy", f"{file}:{name}", *flags).startswith(said)


def test_a_network_of_ones_own_is_named_by_its_file(tmp_path: Path) -> None:
    file = tmp_path / "net.py"
    sizes = "img_size=40, patch_size=8, num_classes=10, embed_dim=32, depth=4, num_heads=2"
    file.write_text(
        f"from timm.models.vision_transformer import VisionTransformer as V\ndef own_vit(): return V({sizes})\n"
    )
    flags = ImageFlags(data_dir=tmp_path, model=f"{file}:own_vit")
    backbone = flags.network(0, "cpu")
    assert (backbone.name, backbone.depth, backbone.image_size) == ("own_vit", 4, (40, 40))
    assert own_network("hf:own_vit") is None
    with pytest.raises(SettingsError, match=r"model: expected a name in .*net\.py, got 'other'"):
        replace(flags, model=f"{file}:other").network(0, "cpu")


def test_policies_are_compared(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--quick", "--methods", "topk", "--budgets", 0.4, "--sites", 2, 4, "--output", tmp_path)
    vitprune("benchmark", *flags, "--seeds", 1, "--checkpoints", f"mine={checkpoint}")
    shown = capsys.readouterr().out
    rows = {line.split("|")[1].strip(): line.split("|")[2].strip() for line in shown.splitlines() if line[:2] == "| "}
    assert {rows[name] for name in ("topk", "*random*", "*untrained actor*")} == {"2, 4"}
    assert rows["mine"] == "1, 3, 5"  # trained there
    page = (tmp_path / "table.md").read_text()
    assert page[page.index("###") :] in shown  # below the command and the settings


def test_a_quick_benchmark_has_the_budgets_that_are_asked_for() -> None:
    assert benchmark.parse(["--quick", "--budgets", "0.3", "0.4"]).budgets == (0.3, 0.4)
    assert benchmark.parse(["--quick"]).budgets == (0.5,)


def test_policies_of_a_label_share_a_line() -> None:
    args = benchmark.parse(["--methods", "topk", "--checkpoints", "a", "b", "mine=c"])
    assert benchmark.entries(args) == {"topk": "topk", "MAPPO": ["a", "b"], "mine": ["c"]}


def test_the_speed_of_a_trained_policy_is_measured(checkpoint: Path, tmp_path: Path) -> None:
    vitprune("speedup", "--quick", "--dtypes", "fp32", "--checkpoint", checkpoint, "--output", tmp_path)
    cases = json.loads((tmp_path / "speedup.json").read_text())["timings"]
    assert [case["batch"] for case in cases] == [1, 8]
    assert all(case["speedup"] > 0 and case["ideal"] > 0.9 for case in cases)
    assert len((tmp_path / "speedup.csv").read_text().splitlines()) == 3
    assert (tmp_path / "speedup.png").read_bytes().startswith(b"\x89PNG")


def test_a_pruned_model_is_exported(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, _ = Digits("test", size=3).batch(range(3))
    vitprune("export", "--checkpoint", checkpoint, "--output", tmp_path)
    assert PrunedViT.from_pretrained(tmp_path)(images).shape == (3, 10)
    asked: list[object] = []
    monkeypatch.setattr("vitprune_env.deploy.export.export_onnx", lambda _, path, batch: asked.append((path, batch)))
    vitprune("export", "--to", "onnx", "--checkpoint", checkpoint, "--output", tmp_path)
    vitprune("export", "--to", "onnx", "--policy", "evit", "--output", tmp_path)
    assert asked == [(tmp_path / "model.onnx", 1), (tmp_path / "model.onnx", None)]  # ragged: one image at a time
    with pytest.raises(SystemExit):
        vitprune("export", "--int8", "--policy", "evit", "--output", tmp_path)  # not of a folder


def test_info_says_what_there_is(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vitprune("info")
    shown = capsys.readouterr().out
    assert re.search(r"^torch +\d", shown, flags=re.MULTILINE)
    assert "baseline tome" in shown
    vitprune("info", "--method", "dynamicvit", "--checkpoint", checkpoint)
    shown = capsys.readouterr().out
    assert "Rao et al., 2021" in shown
    assert re.search(r"^backbone +vit_digits", shown, flags=re.MULTILINE)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("train --seed -1", "--seed: expected a number from 0 to 4294967295, got -1"),
        ("train --target-keep 2", "--target-keep: expected a number above 0 and at most 1, got 2.0"),
        ("train --untrained-actors 0", "--untrained-actors: expected 1 or more, got 0"),
        ("train --batch-size -1", "--batch-size: expected 1 or more, got -1"),
        ("train --epoch 3", "Unrecognized options: --epoch; did you mean --epochs?"),
        ("train --updates x", "Error parsing --updates: invalid literal for int() with base 10: 'x'"),
        ("evaluate --threads 100000", "--threads: expected a number from 1 to 1024, got 100000"),
        ("evaluate --device meta --policy evit", "--device: expected one that torch finds, got 'meta'"),
        ("evaluate --output=", "--output: expected a path, got none"),
        ("finetune --opt x", "--opt: expected an optimiser of timm, such as adamw or sgd, got 'x'"),
        ("finetune --sched x", "--sched: expected one of cosine, tanh, poly, step, multistep, got 'x'"),
        ("finetune --split x", "--split: expected one of ('train', 'validation', 'test'), got 'x'"),
        ("speedup --quick --keep 0.5", "--keep: expected a share for each of 3 sites, got 1 of them"),
    ],
)
def test_mistakes_end_before_time_is_spent(
    words: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert mistake(capsys, *words.split()).startswith(f"error: {said}")
